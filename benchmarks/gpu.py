"""One call of 8 minutes on a card of 80 GiB or more: where packhorse stands, and what costs it.

    make gpu-check                                 (or: python benchmarks/gpu.py [--only 1.5B])
    python benchmarks/gpu.py --stages cases --only 8B   (all of 8B: 8 minutes more)
    python benchmarks/gpu.py --tiny                (CPU, a dry run)

One stage after the other, until the time is up; what has no time left is named:
  parts  gpu_parts.py: products, each attention kernel, a layer by its kernels, the loss; 60 s
  cases  packhorse, TRL with Liger and a bare loop on random models of gpu_cases.py, rows of 8192.
         packhorse profiles one step more: its top kernels, the busy share, the host's waits
  tests  pytest -m gpu
  longest  gpu_longest.py: the longest sequence of an 8B shape with LoRA, by doubling; 90 s. Alone:
         --stages longest
benchmarks/results/gpu_check_CARD.md (gpu_check_CARD_MODEL.md with --only) is written anew after
each part and arm, as the machine may be taken away.

Weights are random, and rows are packed from random documents: speed does not depend on what they
say. Tokens and clock are those of common.py. MFU counts what the model needs: 6 FLOPs a weight and
token, the head at trained positions, attention over causal pairs within documents; recomputation is
not counted. Alike for every arm.

Arms alternate (A B C, A B C, by --rounds), and each runs --warmup steps that are not timed. All
share one folder of compiled kernels; a timed step in which a file appears there compiled something,
and is thrown out. Attention: TRL and the loop take torch's varlen kernel (TRL without flash-attn
would build a mask of T x T), packhorse the one that it measures as fastest.

What fits where, on a card of 141 GB (weights W in billions, bf16 2 W, fp32 masters and moments
12 W): 1.5B and the 8 layers of 8B keep gradients in fp32 (18 W in all) and recompute nothing. All
of 8B does so with masters and moments on the host (6 W on the card, 12 W on a host of 128 GiB), or
accumulates in bf16 (16 W = 128 GB) at ZeRO-3, whose update never holds all gradients in fp32. TRL
keeps weights, gradients and moments in bf16 (8 W): its fastest way, and a coarser update.

Needs no network. What is missing is named, and costs the arms that need it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import gpu_trace
from common import (
    ROOT,
    ArmFailed,
    Job,
    Run,
    arm_command,
    machine,
    packhorse_command,
    run_arm,
    save_result,
    table,
)
from gpu_cases import CASES, TINY, Arm, Case
from gpu_report import HEAD, table_row

TOKENIZER = ROOT / "recipes" / "debug" / "model"
VERSIONS = ("torch", "transformers", "trl", "liger-kernel", "deepspeed")
WANTED = {
    "liger_kernel": "pip install liger-kernel",
    "trl": "pip install trl",
    "flash_attn_interface": "flash-attn 3, docs/performance.md",
    "flash_attn.cute": "pip install 'packhorse[flash-attn]'",
}
LEAST_S = 40  # nothing is started with less time left
PARTS_S, LONGEST_S = 60, 90
AFTER = 2  # steps after the timed ones: the profiled one, and one by whose line it is written


@dataclass
class Bench:
    """What the stages share: options, a folder for their files, the time, and the report so far."""

    options: argparse.Namespace
    card: str
    card_gib: float
    work: Path
    deadline_s: float
    rows: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # by case and arm
    sections: dict[str, str] = field(default_factory=dict)  # of the report, by heading

    def left_s(self) -> float:
        return self.deadline_s - time.monotonic()

    def write(self) -> None:
        """Write the report as far as it is known."""
        if self.options.out:
            save_result(self.options.out, report(self))


def main() -> None:
    options = parse()
    card, gib = ("tiny", 0.0) if options.tiny else read_card()
    for module, how in WANTED.items():
        if not is_found(module):
            print(f"missing: {module} ({how})", flush=True)
    name = slug(f"gpu check {card} {options.only or ''}".strip())
    options.out = options.out or (
        None if options.tiny else Path(__file__).parent / "results" / f"{name}.md"
    )
    work = Path(tempfile.mkdtemp(prefix="gpu_bench."))
    bench = Bench(options, card, gib, work, time.monotonic() + options.budget_s)
    for stage in options.stages:
        STAGES[stage](bench)
    if not options.out:
        print(f"\n{report(bench)}")
    shutil.rmtree(work)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU: shows no speed")
    parser.add_argument("--stages", default=",".join(STAGES), help="of them, with commas")
    parser.add_argument("--only", choices=[case.name for case in CASES], help="one of the models")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8, help="of an arm")
    parser.add_argument("--warmup", type=int, default=3, help="of them not timed")
    parser.add_argument("--budget-s", type=float, default=470.0)
    parser.add_argument("--out", type=Path, help="default: see above")
    options = parser.parse_args()
    options.stages = options.stages.split(",")
    if unknown := set(options.stages) - STAGES.keys():
        parser.error(f"unknown stages: {', '.join(sorted(unknown))}")
    if not options.tiny and shutil.which("nvidia-smi") is None:
        parser.error("there is no CUDA card here (no nvidia-smi); --tiny makes a dry run on a CPU")
    return options


def read_card() -> tuple[str, float]:
    """Return the first card's name and its memory in GiB."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    name, mib = said.splitlines()[0].rsplit(",", 1)
    return name.strip(), float(mib) / 1024


def slug(name: str) -> str:
    return name.lower().replace(",", "").replace(" ", "_")


def is_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


# ----------------------------------------------------------------------------------- parts, tests


def measure_parts(bench: Bench) -> None:
    """Run gpu_parts.py."""
    given = ["--tiny"] if bench.options.tiny else ["--shape=8B", f"--budget-s={PARTS_S}"]
    keys = ("part", "ms", "predicted_ms", "tflops", "error")
    follow(bench, "The parts of a step", "gpu_parts.py", given, keys)


def find_longest(bench: Bench) -> None:
    """Run gpu_longest.py."""
    given = [f"--budget-s={min(LONGEST_S, bench.left_s())}"]
    given += ["--tiny", "--limit-mib=5"] if bench.options.tiny else []
    keys = ("tokens", "seconds", "peak_gib", "ended")
    follow(bench, "The longest sequence of an 8B shape with LoRA", "gpu_longest.py", given, keys)


def follow(
    bench: Bench, heading: str, script: str, given: Sequence[str], keys: Sequence[str]
) -> None:
    """Run a script that prints lines of JSON, in the time that is left; each line is in the report
    as soon as it is printed.

    Args:
        keys: of a line, in the order of the table's columns.
    """
    if bench.left_s() < LEAST_S:
        bench.sections[heading] = "not run: no time left"
        return bench.write()
    command = [sys.executable, str(ROOT / "benchmarks" / script), *given]
    out, log = bench.work / f"{script}.out", bench.work / f"{script}.log"
    with out.open("wb") as lines, log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=lines, stderr=errors, env=environment(bench))
        while process.poll() is None and bench.left_s() > 0:
            time.sleep(1)
            show_lines(bench, heading, out, keys)
    is_late = process.poll() is None
    process.kill()
    process.wait()
    show_lines(bench, heading, out, keys)
    if process.returncode:
        why = "stopped: no time left" if is_late else f"exit code {process.returncode}"
        said = log.read_text(errors="replace")[-1500:]
        bench.sections[heading] += f"\n\n{why}\n\n```\n{said}\n```"
        bench.write()


def show_lines(bench: Bench, heading: str, out: Path, keys: Sequence[str]) -> None:
    whole = out.read_text().rpartition("\n")[0].splitlines()
    lines = [json.loads(line) for line in whole if line.startswith("{")]
    text = table([*keys], [[str(line.get(key, "")) for key in keys] for line in lines])
    if bench.sections.get(heading) != text:
        bench.sections[heading] = text
        bench.write()


def run_gpu_tests(bench: Bench) -> None:
    """Run the tests that need a card, in the time that is left."""
    said = "not run: no card" if bench.options.tiny else "not run: no time left"
    if not bench.options.tiny and bench.left_s() > LEAST_S:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT, timeout=bench.left_s()
            )
            said = done.stdout
        except subprocess.TimeoutExpired as error:
            said = f"{(error.stdout or b'').decode(errors='replace')}\nstopped: no time left"
    bench.sections["pytest -m gpu"] = f"```\n{said[-2000:].strip()}\n```"
    bench.write()


# ------------------------------------------------------------------------------------------- cases


def run_cases(bench: Bench) -> None:
    for case in CASES:
        if bench.options.only in (None, case.name):
            run_case(bench, case)


def run_case(bench: Bench, case: Case) -> None:
    job = make_case(case, bench)
    results: dict[str, list[Run] | str] = {}
    for _ in range(bench.options.rounds):
        for arm in case.arms:
            done = results.setdefault(arm.label, [])
            if isinstance(done, str):
                continue  # failed once: not tried again
            got = run_one(case, arm, job, bench)
            if isinstance(got, str):
                results[arm.label] = got
            else:
                done.append(got)
            row = table_row(case, arm, job, results[arm.label], bench.card)
            bench.rows[case.name, arm.label] = row
            print(" | ".join(row), flush=True)
            bench.write()


def make_case(case: Case, bench: Bench) -> Job:
    """Write the model's folder (configuration and tokenizer), the documents, and their tokens."""
    options, folder = bench.options, bench.work / slug(case.name)
    shutil.copytree(TOKENIZER, folder / "model")
    shape = case.shape | (TINY if options.tiny else {})
    (folder / "model" / "config.json").write_text(json.dumps(shape))
    job = Job(
        model=str(folder / "model"),
        init="random",
        source=str(folder / "documents.jsonl"),
        tokens=str(folder / "tokens"),
        seq_len=256 if options.tiny else 8192,
        global_batch_size=1,
        steps=options.steps,
        lr=1e-5,
        seed=0,
        device="cpu" if options.tiny else "cuda",
        attention="documents",
        liger=not options.tiny,
    )
    job = replace(job, **case.fields)
    tokens = (job.steps + AFTER) * job.global_batch_size * job.seq_len
    write_documents(Path(job.source), tokens, job.seq_len)
    command, _ = arm_command("prepare", job, folder)
    with (folder / "prepare.log").open("wb") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment(bench))
    return job


def write_documents(path: Path, tokens: int, seq_len: int) -> None:
    """Write documents of random words, log-normal in length, with at least `tokens` tokens in all:
    no token has over 4 letters on average.
    """
    draw = random.Random(0)
    letters, made = "abcdefghijklmnopqrstuvwxyz     ", 0
    with path.open("w") as out:
        while made < 4 * tokens:
            length = min(seq_len - 16, max(16, int(draw.lognormvariate(0.0, 0.9) * seq_len / 6)))
            text = "".join(draw.choices(letters, k=length)).strip() or "a"
            out.write(json.dumps({"text": text}) + "\n")
            made += length


def caches(bench: Bench) -> dict[str, str]:
    """Return the folders of compiled kernels, which all arms share, by environment variable."""
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    return {name: str(bench.work / name.lower()) for name in names}


def environment(bench: Bench) -> dict[str, str]:
    same = {**os.environ, **caches(bench), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    if bench.options.tiny:
        return same | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    allocator = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    return same | allocator | {"CUDA_VISIBLE_DEVICES": "0"}


def run_one(case: Case, arm: Arm, job: Job, bench: Bench) -> Run | str:
    """Return the run, or in a few words why there is none."""
    if not bench.options.tiny and bench.card_gib < arm.needs_gib:
        return f"not run: needs {arm.needs_gib} GiB"
    left_s = bench.left_s()
    if left_s < LEAST_S:
        return "not run: no time left"
    if bench.options.tiny and "matmul" in arm.fields:
        return "not run: a CPU has no fp8"
    folder = Path(tempfile.mkdtemp(dir=bench.work))
    job, after = replace(job, **arm.fields), 0
    if arm.program == "packhorse":
        after = AFTER
        job = replace(job, steps=job.steps + after, profile_step=job.steps + 1)
        command, metrics = packhorse_command(job, folder, bench.work / "cache")
    else:
        own = {"use_liger_kernel": job.liger, "gradient_accumulation_steps": job.global_batch_size}
        job = replace(job, trl={**own, **job.trl})
        command, metrics = arm_command(arm.program, job, folder)
    settings = {"skip": bench.options.warmup, "steps": job.steps, "after": after}
    settings |= {"limit_s": left_s, "compiled_in": [*caches(bench).values()]}
    try:
        run = run_arm(command, metrics, folder, environment(bench), **settings)
    except ArmFailed as error:
        print(f"{arm.label}: {error}", file=sys.stderr, flush=True)
        first = str(error).splitlines()[0]
        return "out of memory" if "OutOfMemory" in str(error) else f"failed: {first}"
    if after:
        bench.sections[f"A step of {case.name}, {arm.label}"] = gpu_trace.newest(
            folder / "run" / "profile"
        )
    shutil.rmtree(folder)
    return run if run.kept else "every timed step compiled something"


# --------------------------------------------------------------------------------------- the report


def report(bench: Bench) -> str:
    options = bench.options
    missing = [f"{module} ({how})" for module, how in WANTED.items() if not is_found(module)]
    about = (
        f"Random weights and documents, rows of {256 if options.tiny else 8192}, "
        f"{options.steps - options.warmup} timed steps after {options.warmup}, rounds: "
        f"{options.rounds}. Memory: the whole card's, caches included, as nvidia-smi reads it "
        "twice a second. packhorse and the loop keep fp32 masters and moments, TRL keeps bf16. "
        "Predicted: for an H200, by arithmetic."
    )
    title = f"# GPU check: {bench.card}" if not options.tiny else "# A dry run on a CPU: no speeds"
    parts = [
        title,
        f"`{shlex.join(['python', 'benchmarks/gpu.py', *sys.argv[1:]])}`",
        machine(VERSIONS),
        *([f"Missing: {', '.join(missing)}."] if missing else []),
        about,
        *([table(HEAD, [*bench.rows.values()])] if bench.rows else []),
        *(f"## {heading}\n\n{text}" for heading, text in bench.sections.items()),
    ]
    return "\n\n".join(parts) + "\n"


# In this order, each with the time that those before it left. A further stage goes to the end.
STAGES: dict[str, Callable[[Bench], None]] = {
    "parts": measure_parts,
    "cases": run_cases,
    "tests": run_gpu_tests,
    "longest": find_longest,
}

if __name__ == "__main__":
    main()
