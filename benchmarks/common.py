"""What the side-by-side benchmarks share: run an arm in a fresh process, time it from outside, and
describe the machine.

In: a `Job`, the same for every arm, and a command that writes one JSON line a step into a
metrics.jsonl. Out: a `Run`: those lines, when each one landed by this process's clock, and the
arm's peak memory.

All arms are measured alike, ours too: only an arm's counts of tokens are used, nothing that it
reports about its own speed. This process imports no torch and computes nothing while an arm runs.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARMS = Path(__file__).resolve().parent / "arms.py"
POLL_S = 0.05
LOOK_S = 0.5  # between looks at memory
GIB = 2**30


def write_result(out: Path, text: str) -> None:
    """Print a result and write it to `out`, unless that is another file than an earlier result."""
    print(f"\n{text}")
    save_result(out, text)
    print(f"written to {out}")


def save_result(out: Path, text: str) -> None:
    title = text.splitlines()[0]
    if out.exists() and not out.read_text(errors="replace").startswith(f"{title}\n"):
        sys.exit(f"{out}: exists, and is no result of this benchmark; it is left as it is")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)


@dataclass(frozen=True)
class Job:
    """What arms.py is to run; each arm reads the fields it needs."""

    model: str  # a folder with config, tokenizer and, for `pretrained`, weights
    init: str  # pretrained | random
    source: str  # JSONL, the rows as they are
    tokens: str  # folder: `documents` and `packed`, made by `arms.py prepare`
    seq_len: int
    global_batch_size: int
    steps: int
    lr: float
    seed: int
    device: str  # cpu | cuda
    metrics: str = ""  # where the arm writes its lines
    dtype: str = "bfloat16"  # of the weights
    micro_batch_size: int = 1  # of packhorse
    attention: str = "sdpa"
    activation_checkpointing: str = "none"
    packed: bool = True
    liger: bool = False
    # of accumulation, in the loop and in packhorse; their master weights are fp32 always
    grad_dtype: str = "float32"
    deepspeed: str = "zero1"  # packhorse's template
    matmul: str = "bf16"  # packhorse's
    profile_step: int = 0  # that packhorse profiles; 0: none
    trl: dict[str, object] = field(
        default_factory=dict
    )  # SFTConfig as it is given to TRL, over the job's own

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)))
        return path


@dataclass(frozen=True)
class Run:
    """One arm, run once. `lines[i]` landed at `arrived_s[i]`; the first `skip` steps warm up, and
    neither they nor the last `after` steps are timed.
    """

    lines: list[dict[str, float]]
    arrived_s: list[float]
    skip: int
    peak_rss_gib: float  # of the largest process
    peak_gpu_gib: float  # of the whole card, caches included; 0 without one
    after: int = 0
    compiled: frozenset[int] = frozenset()  # numbers of the steps in which kernels were compiled

    @property
    def kept(self) -> list[int]:
        """The numbers of the timed steps."""
        timed = range(self.skip, len(self.lines) - self.after)
        return [i for i in timed if i not in self.compiled]

    @property
    def thrown_out(self) -> int:
        """How many steps would be timed, had they not compiled anything."""
        return len(self.lines) - self.after - self.skip - len(self.kept)

    @property
    def seconds(self) -> float:
        return sum(self.arrived_s[i] - self.arrived_s[i - 1] for i in self.kept)

    def rate(self, key: str) -> float:
        """Units of `key` (`tokens` or `train/trained_tokens`) a second over the timed steps."""
        return sum(self.lines[i][key] for i in self.kept) / self.seconds

    @property
    def losses(self) -> list[float]:
        return [line["train/loss"] for line in self.lines]


def packhorse_command(job: Job, folder: Path, cache: Path) -> tuple[list[str], Path]:
    """A recipe of the job and the command that anyone would type, and where its lines will be."""
    run = folder / "run"
    recipe = {
        "model": {
            "name": job.model,
            "init": job.init,
            "dtype": job.dtype,
            "activation_checkpointing": job.activation_checkpointing,
            "matmul": job.matmul,
        },
        "data": {"train": [{"path": job.source}], "train_on": "completion", "cache": str(cache)},
        "batch": {
            "seq_len": job.seq_len,
            "global_batch_size": job.global_batch_size,
            "micro_batch_size": job.micro_batch_size,
        },
        "optim": {
            "lr": job.lr,
            "weight_decay": 0.0,
            "warmup_ratio": 0.0,
            "lr_schedule": "constant",
        },
        "train": {"steps": job.steps, "seed": job.seed},
        "parallel": {"deepspeed": job.deepspeed, "grad_dtype": job.grad_dtype},
        "run": {
            "dir": str(run),
            "profile_steps": [job.profile_step] * 2 if job.profile_step else None,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    return [
        sys.executable,
        "-m",
        "packhorse",
        "train",
        str(path),
        "--nproc",
        "1",
    ], run / "metrics.jsonl"


def arm_command(arm: str, job: Job, folder: Path) -> tuple[list[str], Path]:
    """The command of an arm of arms.py, and where its lines will be."""
    metrics = folder / "metrics.jsonl"
    path = replace(job, metrics=str(metrics)).write(folder / "job.json")
    return [sys.executable, str(ARMS), arm, str(path)], metrics


class ArmFailed(RuntimeError):
    """An arm ended without its lines; the message has the end of its log."""


def run_arm(
    command: list[str],
    metrics: Path,
    folder: Path,
    env: dict[str, str],
    *,
    skip: int,
    steps: int,
    limit_s: float,
    after: int = 0,
    compiled_in: Sequence[str] = (),
) -> Run:
    """Run `command` until `steps` lines have landed in `metrics`, noting when each did (to POLL_S),
    and end it.

    Args:
        after: the last steps, which are not timed.
        compiled_in: folders in which a new file tells that a kernel was compiled.

    What an arm does after its last step (saving, a model card) is not compared and not waited for.

    Raises:
        ArmFailed: it ended before its last line, or ran past `limit_s`.
    """
    arrived_s: list[float] = []
    peaks_gib, looked_s = (0.0, 0.0), 0.0
    started_s, log = time.time(), folder / "log"  # not monotonic: files have such times
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, **env}, cwd=ROOT
        )
    try:
        while len(arrived_s) < steps:
            ended = process.poll() is not None
            now_s = time.time()
            landed = metrics.read_text().count('"train/loss"') if metrics.exists() else 0
            arrived_s += [now_s] * (landed - len(arrived_s))
            if now_s - looked_s > LOOK_S or landed >= steps:
                used = gpu_used_gib() if env.get("CUDA_VISIBLE_DEVICES") else 0.0
                seen = (peak_rss(process.pid), used)
                peaks_gib, looked_s = tuple(map(max, peaks_gib, seen)), now_s
            if landed < steps and (ended or now_s - started_s > limit_s):
                why = (
                    f"exit code {process.returncode}"
                    if ended
                    else f"still running after {limit_s:.0f} s"
                )
                raise ArmFailed(
                    f"{why}, {landed} of {steps} steps\n{log.read_text(errors='replace')[-3000:]}"
                )
            time.sleep(POLL_S)
    finally:
        end_family(process)
    texts = [text for text in metrics.read_text().splitlines() if '"train/loss"' in text]
    lines = [with_tokens(json.loads(text)) for text in texts]
    compiled = compiling_steps(arrived_s, compiled_in)
    return Run(lines, arrived_s, skip, peaks_gib[0], peaks_gib[1], after, compiled)


def compiling_steps(arrived_s: Sequence[float], folders: Sequence[str]) -> frozenset[int]:
    """Return the numbers of the steps in whose time a file was written below these folders.

    Args:
        arrived_s: the end of each step.
    """
    files = (path for folder in folders for path in Path(folder).rglob("*") if path.is_file())
    return frozenset(bisect_left(arrived_s, path.stat().st_mtime) for path in files)


def end_family(process: subprocess.Popen[bytes]) -> None:
    for pid in family(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def family(pid: int) -> list[int]:
    """The process and all that descend from it, by /proc."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def peak_rss(pid: int) -> float:
    """Peak resident memory of the largest process of the family so far, GiB."""
    peaks = [0.0]
    for each in family(pid):
        with suppress(OSError):
            status = Path(f"/proc/{each}/status").read_text()
            peaks += [
                float(line.split()[1]) * 1024 / GIB
                for line in status.splitlines()
                if line.startswith("VmHWM")
            ]
    return max(peaks)


def with_tokens(line: dict[str, float]) -> dict[str, float]:
    """Return the line with `tokens`, which packhorse logs as a rate and a time, and the other arms
    count.
    """
    if "tokens" in line:
        return line
    return {**line, "tokens": float(round(line["perf/tokens_per_s"] * line["perf/step_s"]))}


def gpu_used_gib() -> float:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return (
        float(
            subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        )
        / 1024
    )


def spread(values: list[float], form: str = "{:.0f}") -> str:
    """`median (lowest to highest)`."""
    middle, low, high = (
        form.format(value) for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# they make a processor act as an older one
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def machine(packages: tuple[str, ...]) -> str:
    """Describe processor, cores, memory, and versions of Python and `packages`, in two Markdown
    items.
    """
    cpu = Path("/proc/cpuinfo").read_text()
    names = [
        line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")
    ]
    flags = "with" if "avx512_bf16" in cpu else "without"
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    found = ", ".join(f"{name} {installed(name)}" for name in packages)
    name, cores = names[0] if names else platform.machine(), len(os.sched_getaffinity(0))
    kept_to = "".join(f", {limit}={os.environ[limit]}" for limit in LIMITS if limit in os.environ)
    return (
        f"- {name} ({flags} AVX-512 bf16), {cores} cores, {memory_gib:.0f} GiB{kept_to}\n"
        f"- Python {platform.python_version()}, {found}"
    )


def installed(package: str) -> str:
    """Return a package's version, or that it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"
