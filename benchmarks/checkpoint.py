"""What a checkpoint costs on CPU: saves while training, resumes at another world size, and
DeepSpeed's own ways.

    python benchmarks/checkpoint.py [--rounds 2] [--folder DIR]

A model of SmolLM2-135M's shape with random weights, ZeRO-3, two ranks. Every arm starts from files
that are not in the page cache (posix_fadvise), in fresh processes. Writes
benchmarks/results/checkpoint_cpu.md; about 6 minutes on 2 cores.

In: nothing but the debug recipe's tokenizer. Out: seconds and bytes. Bytes asked for are counted
where they are asked for: by the pass over checksums and by each slice that is filled. Bytes from
the disk are the kernel's (`read_bytes` in /proc/PID/io, which counts memory-mapped files, too).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from common import GIB, ROOT, machine, spread, table

RESULTS = ROOT / "benchmarks" / "results"
MIB = 2**20
WORLD = 2
STEPS_BESIDE = 4  # trained while an asynchronous save goes on
BYTES_A_PARAMETER = 12  # fp32 weight and two moments
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
VERSIONS = ("torch", "deepspeed", "transformers", "safetensors")


# ---------------------------------------------------------------------------------------- in a rank


def work(order: dict[str, Any]) -> None:
    """What the ranks of one arm do; rank 0 writes what was measured to `order["out"]`."""
    from packhorse.trainer import dist

    dist.start_logging()
    dist.log.setLevel("WARNING")
    with dist.process_group():
        found = ARMS[order["arm"]](Path(order["folder"]), order)
        if dist.is_main():
            Path(order["out"]).write_text(json.dumps(found))


def build(folder: Path, universal: bool = False) -> Any:
    """The engine as `packhorse train` builds it."""
    from packhorse.trainer import build_engine
    from packhorse.trainer.config.recipe import load_recipe
    from packhorse.trainer.model.load import load_tokenizer

    made = build_engine.deepspeed_config

    def config(*args: Any) -> dict[str, Any]:
        return made(*args) | ({"checkpoint": {"load_universal": True}} if universal else {})

    wanted = [f"model.name={folder / 'model'}", "model.dtype=bfloat16", f"run.dir={folder / 'run'}"]
    recipe = load_recipe(ROOT / "recipes" / "debug.yaml", wanted)
    with mock.patch.object(build_engine, "deepspeed_config", config):
        return build_engine.build_engine(recipe, folder / "run", load_tokenizer(recipe.model))


def step_s(engine: Any) -> float:
    """Return the seconds of one training step of 256 tokens a rank."""
    import torch

    from packhorse.trainer import dist
    from packhorse.trainer.datatypes import Batch
    from packhorse.trainer.metrics import Clock

    tokens = 256
    batch = Batch(
        input_ids=torch.arange(tokens),
        position_ids=torch.arange(tokens),
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32),
        lengths=(tokens,),
        trained_positions=torch.arange(tokens - 1),
        targets=torch.arange(1, tokens),
        weights=torch.full((tokens - 1,), 1 / tokens),
        document_keys=((0, 0, 0),),
        sequence_ids=(0,),
    )
    return seconds(lambda: engine.step([batch], 1e-4, Clock(dist.device())))


def seconds(call: Callable[[], object]) -> float:
    """Return the seconds of a call that all ranks make, until the last one has returned."""
    from packhorse.trainer import dist

    dist.barrier()
    began = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - began


def saver(folder: Path, engine: Any, asynchronous: bool) -> Any:
    from packhorse.trainer.checkpoint.saver import Saver
    from packhorse.trainer.config.recipe import CheckpointSection

    return Saver(folder, engine, CheckpointSection(keep=1, asynchronous=asynchronous))


def run_state(step: int) -> Any:
    from packhorse.trainer import dist
    from packhorse.trainer.checkpoint.manifest import RunState

    return RunState(
        step=step,
        updates=step,
        data="benchmark",
        micro_batch_size=1,
        recent_losses=(),
        world_size=dist.world_size(),
        stage=3,
    )


def save_arm(folder: Path, order: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds that a save takes from training, three ways in turn; leave a checkpoint of
    each kind.
    """
    engine = build(folder)
    plain_s = [step_s(engine) for _ in range(4)][1:]
    one_s = statistics.median(plain_s)
    found: dict[str, Any] = {
        "step": plain_s,
        "call": [],
        "asynchronous": [],
        "synchronous": [],
        "deepspeed": [],
    }
    for number in range(1, order["rounds"] + 1):
        with saver(folder / "asynchronous", engine, True) as beside:
            call_s = seconds(lambda: beside.save(run_state(number)))  # noqa: B023
            steps_s = sum(step_s(engine) for _ in range(STEPS_BESIDE))
            wait_s = seconds(beside.wait)
        found["call"].append(call_s)
        found["asynchronous"].append(call_s + steps_s + wait_s - STEPS_BESIDE * one_s)
        with saver(folder / "saved-2", engine, False) as now:
            found["synchronous"].append(seconds(lambda: now.save(run_state(number))))  # noqa: B023
        found["deepspeed"].append(
            seconds(lambda: engine._engine.save_checkpoint(str(folder / "deepspeed"), tag="saved"))
        )
    return found | {"state": engine.state.bytes()}


def resume_arm(folder: Path, order: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds and bytes of a resume, as train.py makes it; then save at this world size,
    if the order asks for it.
    """
    from packhorse.trainer import dist
    from packhorse.trainer.checkpoint import checkpoint
    from packhorse.trainer.engine import sharded_state

    engine = build(folder)
    asked = 0
    fill, checksum = sharded_state.Shards.fill, checkpoint.checksum

    def counted_fill(self: Any, piece: Any) -> None:
        nonlocal asked
        asked += piece.bytes
        fill(self, piece)

    def counted_checksum(path: Path) -> str:
        nonlocal asked
        asked += path.stat().st_size
        return checksum(path)

    run_dir = folder / order["checkpoint"]
    before = disk_bytes()
    with (
        mock.patch.object(sharded_state.Shards, "fill", counted_fill),
        mock.patch.object(checkpoint, "checksum", counted_checksum),
    ):
        found: list[Any] = []
        find_s = seconds(lambda: found.append(checkpoint.find(run_dir)))
        where, manifest = found[0]
        restore_s = seconds(lambda: checkpoint.restore(where, manifest, engine))
    counts = dist.sum_over_ranks([asked, disk_bytes() - before])
    if order.get("then_save"):
        with saver(folder / order["then_save"], engine, False) as now:
            now.save(run_state(1))
    return {"find": find_s, "restore": restore_s, "asked": counts[0], "disk": counts[1]}


def universal_arm(folder: Path, order: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds and bytes of DeepSpeed's own load of the converted checkpoint."""
    from packhorse.trainer import dist

    engine = build(folder, universal=True)
    before = [disk_bytes(), asked_bytes()]
    load_s = seconds(lambda: engine._engine.load_checkpoint(str(folder / "deepspeed")))
    counts = dist.sum_over_ranks([disk_bytes() - before[0], asked_bytes() - before[1]])
    return {"load": load_s, "disk": counts[0], "asked": counts[1]}


ARMS = {"save": save_arm, "resume": resume_arm, "universal": universal_arm}


# -------------------------------------------------------------------------------------------- bytes


def _io(key: str) -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def disk_bytes() -> int:
    """Return the bytes read from the disk by this process and by those that it has waited for."""
    return _io("read_bytes")


def asked_bytes() -> int:
    """Return the bytes read by calls, from the disk or from the page cache."""
    return _io("rchar")


def written_bytes() -> int:
    return _io("wchar")


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -------------------------------------------------------------------------------- the arms, in turn


def run_arm(arm: str, world: int, folder: Path, **order: Any) -> dict[str, Any]:
    from packhorse.launch.local import launch

    out = folder / "measured.json"
    text = json.dumps({"arm": arm, "folder": str(folder), "out": str(out), **order})
    shutil.rmtree(folder / "run", ignore_errors=True)
    code = launch([str(Path(__file__)), "--rank", text], folder / "run", nproc=world)
    assert code == 0, f"{arm} ended with {code}; see above"
    print(f"{arm} on {world}: {out.read_text()}", file=sys.stderr)
    return json.loads(out.read_text())


def convert(folder: Path) -> dict[str, float]:
    """DeepSpeed's own conversion, as its documentation has it."""
    source, target = folder / "deepspeed" / "saved", folder / "deepspeed" / "saved_universal"
    forget(source)
    before = asked_bytes(), written_bytes(), time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--input_folder",
        str(source),
    ]
    command += ["--output_folder", str(target), "--inject_missing_state"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = {
        "seconds": time.perf_counter() - before[2],
        "read": asked_bytes() - before[0],
        "written": written_bytes() - before[1],
    }
    (folder / "deepspeed" / "latest_universal").write_text(target.name)
    return found


def make_model(folder: Path) -> None:
    shutil.copytree(ROOT / "recipes" / "debug" / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | SHAPE))


def measure(folder: Path, rounds: int) -> str:
    make_model(folder / "model")
    saved = run_arm("save", WORLD, folder, rounds=rounds)
    moves = []
    for source, world, then in (
        ("saved-2", 1, "saved-1"),
        ("saved-1", 2, None),
        ("saved-2", 3, None),
    ):
        forget(folder / source)
        found = run_arm("resume", world, folder, checkpoint=source, then_save=then)
        moves.append((f"{source[-1]} -> {world}", found))
    converted = convert(folder)
    loads = []
    for world in (1, 3):
        forget(folder / "deepspeed")
        loads.append((f"{WORLD} -> {world}", run_arm("universal", world, folder)))
    return report(
        saved,
        size(folder / "saved-2"),
        size(folder / "deepspeed" / "saved"),
        moves,
        converted,
        loads,
        rounds,
    )


Moves = list[tuple[str, dict[str, Any]]]  # what was resumed from and to, and what was seen


def saves_table(saved: dict[str, Any], ours: int, theirs: int) -> str:
    def row(name: str, key: str, written: int) -> list[str]:
        return [name, spread(saved[key], "{:.2f}"), f"{written / GIB:.2f}"]

    return table(
        ["save", "taken from training, s", "written, GiB"],
        [
            row("packhorse, beside training", "asynchronous", ours),
            row("... of which training stands still", "call", ours),
            row("packhorse, while training waits", "synchronous", ours),
            row("DeepSpeed's save_checkpoint", "deepspeed", theirs),
        ],
    )


def resumes_table(moves: Moves, converted: dict[str, float], loads: Moves, state: float) -> str:
    """Return the resumes of packhorse and of DeepSpeed, of a training state of so many bytes."""
    head = ["resume", "s", "parts, s", "state, MiB/s"]
    head += ["asked for / state", "from disk / state", "written / state"]

    def row(name: str, parts: tuple[float, float], asked: float, *rest: str) -> list[str]:
        seconds = sum(parts)
        spent = [f"{seconds:.1f}", f"{parts[0]:.1f} + {parts[1]:.1f}"]
        return [name, *spent, f"{state / MIB / seconds:.0f}", f"{asked / state:.2f}", *rest]

    ours = [
        row(
            *(f"packhorse, {move}", (found["find"], found["restore"]), found["asked"]),
            *(f"{found['disk'] / state:.2f}", "0"),
        )
        for move, found in moves
    ]
    stock = [
        row(
            *(f"DeepSpeed, {move}", (converted["seconds"], found["load"])),
            *(converted["read"] + found["asked"], "", f"{converted['written'] / state:.2f}"),
        )
        for move, found in loads
    ]
    return table(head, [*ours, *stock])


def sizes_table(moves: Moves, converted: dict[str, float], loads: Moves, state: float) -> str:
    """Return what larger models would take, by arithmetic."""
    ours_s = statistics.median(found["find"] + found["restore"] for _, found in moves) / state
    theirs_s = converted["seconds"] / state
    # the conversion's reads, and those of a load by 64 ranks
    reads = converted["read"] / state + 64 * loads[0][1]["asked"] / state
    rows = [
        [
            name,
            f"{billions * BYTES_A_PARAMETER:,.0f}",
            f"{2 * billions * BYTES_A_PARAMETER / 1000:,.2f}",
            f"{ours_s * billions * 1e9 * BYTES_A_PARAMETER / 60:,.1f}",
            f"{reads * billions * BYTES_A_PARAMETER / 1000:,.2f}",
            f"{converted['written'] / state * billions * BYTES_A_PARAMETER / 1000:,.2f}",
            f"{theirs_s * billions * 1e9 * BYTES_A_PARAMETER / 60:,.1f}",
        ]
        for name, billions in (("1B", 1), ("70B", 70), ("405B", 405))
    ]
    head = ["model", "state, GB", "packhorse reads, TB", "minutes"]
    return table([*head, "DeepSpeed reads, TB", "writes, TB", "minutes"], rows)


def report(
    saved: dict[str, Any],
    ours: int,
    theirs: int,
    moves: Moves,
    converted: dict[str, float],
    loads: Moves,
    rounds: int,
) -> str:
    state = saved["state"]
    resumes = (moves, converted, loads, state)
    return f"""# What a checkpoint costs, on CPU

`{" ".join(["python", "benchmarks/checkpoint.py", *sys.argv[1:]])}`

{machine(VERSIONS)}
- load average of the last minute, at the end: {os.getloadavg()[0]:.1f}

SmolLM2-135M's shape, random weights, bf16 with fp32 masters, ZeRO-3, {WORLD} ranks:
{state / GIB:.2f} GiB of state. A step of 256 tokens a rank takes
{spread(saved["step"], "{:.2f}")} s. {rounds} rounds, median (lowest to highest).

{saves_table(saved, ours, theirs)}

Taken from training: the save's own call, and what {STEPS_BESIDE} steps beside it take longer than
alone. The writer shares the ranks' cores here: beside a GPU it would not. packhorse brings every
byte to the disk (fsync) and hashes it twice (checksum, digest); DeepSpeed leaves it in the page
cache.

{resumes_table(*resumes)}

All ranks together, files not in the page cache before, building the engine left out. packhorse:
the pass over the checksums + reading, with the digests compared. Asked for: bytes of the checksum
pass and of the slices that are filled; what comes from the disk is less, as the second reading
finds the first one's pages. DeepSpeed: the conversion
(ds_to_universal, {state / MIB / converted["seconds"]:.0f} MiB/s; it read
{converted["read"] / GIB:.2f} GiB and wrote {converted["written"] / GIB:.2f} GiB) + the load; bytes
of its read and write calls.

## By arithmetic

{BYTES_A_PARAMETER} bytes a parameter; bytes as measured above, a load by 64 ranks for DeepSpeed;
minutes at this machine's speed, of all of packhorse's resume and of DeepSpeed's conversion alone. A
cluster's ranks share the work of a resume; the conversion runs on one node.

{sizes_table(*resumes)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--folder",
        type=Path,
        help="Where the checkpoints go, about 12 GiB; default: a temporary one.",
    )
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        work(json.loads(args.rank))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(
            0
        )  # DeepSpeed leaves threads behind that now and then abort a process at its very end
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="packhorse-checkpoint-", dir=args.folder))
    try:
        text = measure(folder, args.rounds)
    finally:
        shutil.rmtree(folder)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "checkpoint_cpu.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
