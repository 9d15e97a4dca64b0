"""packhorse beside TRL's SFTTrainer and beside a bare loop, on CPU: same model, data, dtype, tokens
a step.

    python benchmarks/vs_trl.py [--model DIR] [--data gsm8k_train.jsonl] [--rounds 3] [--arms a,b,c]

Each round runs every arm once, in a fresh process on all cores; rounds alternate (A B C D, A B C D,
...), so that a machine that slows down slows all of them. The clock is this process's
(common.run_arm): from the end of the warm-up steps to the end of the last one, data loading and
logging inside, tokenizing and loading outside, for all arms. Writes
benchmarks/results/vs_trl_cpu.md. Needs the extra `bench` (TRL); about 40 minutes at the defaults on
2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import (
    ROOT,
    ArmFailed,
    Job,
    Run,
    arm_command,
    machine,
    packhorse_command,
    run_arm,
    spread,
    table,
    write_result,
)

MODEL = Path("~/.cache/packhorse/models/smollm2-135m-instruct")
DATA = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
VERSIONS = ("torch", "transformers", "trl", "deepspeed", "datasets", "accelerate")
DEFAULT_ARMS = "trl_best,trl_default,loop,loop_products,packhorse"

# What TRL is given over its defaults, arm by arm: fields of `Job`, and under `trl` those of
# SFTConfig. trl_best is packed and keeps documents apart, as those after it; `--arms` measures them
# side by side. It attends eagerly: on two cores of an AMD EPYC that was the fastest of them by a
# fifth, on an Intel Xeon sdpa was as fast.
BEST: dict[str, Any] = {
    "gradient_checkpointing": False,
    "bf16": False,
}  # no autocast: the weights have --dtype
TRL_ARMS: dict[str, dict[str, Any]] = {
    "trl_best": {"attention": "eager", "trl": BEST},
    "trl_sdpa": {"trl": BEST},
    "trl_autocast": {
        "attention": "eager",
        "dtype": "float32",
        "trl": {"gradient_checkpointing": False},
    },
    "trl_two_rows": {"attention": "eager", "trl": BEST | {"per_device_train_batch_size": 2}},
    "trl_worker": {"attention": "eager", "trl": BEST | {"dataloader_num_workers": 1}},
    "trl_our_attention": {
        "attention": "documents",
        "trl": BEST,
    },  # not TRL's: the loop's attention handed to it
    "trl_default": {"dtype": "float32", "packed": False},
}
LOOPS: dict[str, dict[str, Any]] = {
    "loop": {"attention": "documents"},
    "loop_products": {"attention": "products"},
    "loop_bf16_grads": {"attention": "documents", "grad_dtype": "bfloat16"},
}
KNOWN = ("packhorse", *LOOPS, *TRL_ARMS)
LABELS = {
    "packhorse": "packhorse",
    "loop": "bare loop (ceiling)",
    "loop_products": "bare loop, attention by matrix products",
    "loop_bf16_grads": "bare loop, accumulating in bf16",
    "trl_best": "TRL, best",
    "trl_default": "TRL, default",
}


def main() -> None:
    options = parse()
    work = Path(tempfile.mkdtemp(prefix="vs_trl."))
    job = shared_job(options, work)
    run_prepare(job, work)
    runs: dict[str, list[Run]] = {arm: [] for arm in options.arms}
    for number in range(1, options.rounds + 1):
        for arm in options.arms:
            run = run_one(arm, job, options, work)
            runs[arm].append(run)
            print(
                f"round {number} {arm:12} {run.rate('tokens'):6.1f} real tokens/s, peak "
                f"{run.peak_rss_gib:.2f} GiB",
                flush=True,
            )
    text = report(runs, options)
    shutil.rmtree(work)
    write_result(options.out, text)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="a Hugging Face folder")
    parser.add_argument("--data", type=Path, default=DATA, help="JSONL with question and answer")
    parser.add_argument(
        "--arms",
        default=DEFAULT_ARMS,
        help=f"of packhorse, loop, loop_bf16_grads, {', '.join(TRL_ARMS)}",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7, help="optimizer steps of an arm")
    parser.add_argument("--warmup", type=int, default=1, help="of them not timed")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument(
        "--micro-batch-size", type=int, default=4, help="packhorse's; TRL's are its arms' own"
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="of the weights, in every arm that has none of its own; float32 where the CPU has no "
        "AVX-512 bf16",
    )
    parser.add_argument("--deepspeed", default="zero2", help="packhorse's DeepSpeed template")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "vs_trl_cpu.md"
    )
    options = parser.parse_args(arguments)
    options.arms = options.arms.split(",")
    options.model, options.data = (
        options.model.expanduser().resolve(),
        options.data.expanduser().resolve(),
    )
    for path in (options.model, options.data):
        if not path.exists():
            parser.error(
                f"{path} does not exist; `make demo` fetches the model, and --data takes any such "
                f"JSONL"
            )
    unknown = set(options.arms) - set(KNOWN)
    if unknown:
        parser.error(f"unknown arms: {', '.join(sorted(unknown))}")
    return options


# ------------------------------------------------------------------------------------------ running


def shared_job(options: argparse.Namespace, work: Path) -> Job:
    return Job(
        model=str(options.model),
        init="pretrained",
        source=str(options.data),
        tokens=str(work / "tokens"),
        seq_len=options.seq_len,
        global_batch_size=options.rows,
        steps=options.steps,
        lr=2e-5,
        seed=0,
        device="cpu",
        dtype=options.dtype,
        deepspeed=options.deepspeed,
        micro_batch_size=options.micro_batch_size,
    )


def environment() -> dict[str, str]:
    """Return the environment of every arm: all cores, freed memory kept by the allocator (as our
    launcher does), no network.
    """
    cores = str(len(os.sched_getaffinity(0)))
    return {
        "OMP_NUM_THREADS": cores,
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }


def run_prepare(job: Job, work: Path) -> None:
    """Tokenize and pack for the arms that are not packhorse, in a process of its own, so that this
    one stays small.
    """
    command, _ = arm_command("prepare", job, work)
    subprocess.run(command, check=True, env={**os.environ, **environment()})


def run_one(arm: str, job: Job, options: argparse.Namespace, work: Path) -> Run:
    """One run of one arm in a folder of its own, which is removed when it went well."""
    folder = Path(tempfile.mkdtemp(prefix=f"{arm}.", dir=work))
    if arm == "packhorse":
        command, metrics = packhorse_command(job, folder, work / "cache")
    elif arm in LOOPS:
        command, metrics = arm_command("loop", replace(job, **LOOPS[arm]), folder)
    else:
        command, metrics = arm_command("trl", trl_job(arm, job), folder)
    try:
        run = run_arm(
            command,
            metrics,
            folder,
            environment(),
            skip=options.warmup,
            steps=job.steps,
            limit_s=300.0 * job.steps,
        )
    except ArmFailed as error:
        raise SystemExit(f"{arm} failed (its folder is {folder}): {error}") from None
    shutil.rmtree(folder)
    return run


def trl_job(arm: str, job: Job) -> Job:
    """The job with an arm's settings, and the accumulation that gives it the step's tokens."""
    fields = dict(TRL_ARMS[arm])
    trl = dict(fields.pop("trl", {}))
    if fields.get("packed", True):
        trl["gradient_accumulation_steps"] = job.global_batch_size // trl.get(
            "per_device_train_batch_size", 1
        )
    else:
        trl["gradient_accumulation_steps"] = (
            documents_per_step(job) // 8
        )  # TRL's default batch is 8 documents
    return replace(job, trl=trl, **fields)


def documents_per_step(job: Job) -> int:
    """Documents whose tokens about fill a step's rows, in whole batches of 8."""
    info = json.loads((Path(job.tokens) / "counts.json").read_text())
    return max(
        8, round(job.seq_len * job.global_batch_size * info["fill"] / info["mean_tokens"] / 8) * 8
    )


# --------------------------------------------------------------------------------------- the report


def report(runs: dict[str, list[Run]], options: argparse.Namespace) -> str:
    home = str(Path.home())
    command = shlex.join(["python", "benchmarks/vs_trl.py", *sys.argv[1:]]).replace(home, "~")
    first = next(iter(runs.values()))[0]
    parts = [
        "# packhorse beside TRL, on CPU",
        f"`{command}`",
        machine(VERSIONS),
        f"{options.model.name}, {options.data.name}, rows of {options.seq_len}, {options.rows} "
        f"rows a step "
        f"(about {first.lines[0]['tokens']:.0f} tokens), {options.dtype}, learning rate 2e-5, "
        f"no decay, "
        f"{options.steps - options.warmup} timed steps after "
        f"{options.warmup}; {options.rounds} alternating rounds, a fresh process each, median "
        f"(lowest to highest).",
        speed_table(runs),
        ratio_lines(runs),
        "## Loss by step",
        loss_table(runs),
        NOTES,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def speed_table(runs: dict[str, list[Run]]) -> str:
    head = ["", "real tokens/s", "trained tokens/s", "peak RSS, GiB", "packhorse / it"]
    rows = []
    for arm, done in runs.items():
        rates = [run.rate("tokens") for run in done]
        trained = [run.rate("train/trained_tokens") for run in done]
        peaks = [run.peak_rss_gib for run in done]
        ratio = spread(ratios(runs, arm), "{:.2f}") if "packhorse" in runs else ""
        rows.append(
            [LABELS.get(arm, arm), spread(rates), spread(trained), spread(peaks, "{:.2f}"), ratio]
        )
    return table(head, rows)


def ratios(runs: dict[str, list[Run]], arm: str) -> list[float]:
    """packhorse over `arm` in real tokens a second, round by round."""
    pairs = zip(runs["packhorse"], runs[arm], strict=True)
    return [ours.rate("tokens") / theirs.rate("tokens") for ours, theirs in pairs]


def ratio_lines(runs: dict[str, list[Run]]) -> str:
    """The two aims, and whether the medians meet them."""
    lines = []
    for arm, aim in (("trl_best", 2.1), ("loop", 1.0)):
        if arm in runs and "packhorse" in runs:
            got = statistics.median(ratios(runs, arm))
            lines.append(
                f"- aim: at least {aim:g} x {LABELS[arm]}: {got:.2f}, "
                f"{'met' if got >= aim else 'NOT met'}"
            )
    return "\n".join(lines)


def loss_table(runs: dict[str, list[Run]]) -> str:
    steps = range(len(next(iter(runs.values()))[0].lines))
    rows = [
        [str(step + 1), *(f"{done[0].losses[step]:.4f}" for done in runs.values())]
        for step in steps
    ]
    return table(["step", *(LABELS.get(arm, arm) for arm in runs)], rows)


NOTES = """\
All losses are means over the step's trained tokens. TRL's packed arms and the loop train on the
same rows in the same order; TRL's default takes the same documents one by one, and packhorse packs
its own rows (two a micro-batch; TRL is slower with two), so their steps hold other documents. TRL's
best keeps its optimizer states and updates in the weights' type (without DeepSpeed it has no fp32
master weights); the loop and packhorse keep fp32 masters and accumulate in fp32. Peak RSS is of the
largest process."""


if __name__ == "__main__":
    main()
