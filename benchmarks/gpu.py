"""One CUDA card: packhorse, TRL with Liger and a bare loop on 1.5B- and 8B-shaped random models,
rows of 8192.

    python benchmarks/gpu.py [--only 8B] [--rounds 1] [--budget-s 530]
    python benchmarks/gpu.py --tiny                                          (CPU, a dry run)

Shapes of Qwen2.5-1.5B and Llama-3.1-8B, weights random, rows packed from random documents: speed
does not depend on what they say. Reports real tokens per second (clock and counts as in common.py),
MFU and the card's peak memory; writes benchmarks/results/gpu_CARD.md. MFU counts what the model
needs: 6 FLOPs a weight and token, the head at trained positions, attention over causal pairs within
documents; recomputation is not counted. Alike for every arm.

Attention is torch's varlen kernel in all arms: it is handed to TRL too, which without flash-attn
would build a mask of T x T. What fits where, on a card of 141 GB (weights W in billions, bf16 2 W,
fp32 master and moments 12 W):
  1.5B  packhorse ZeRO-1, gradients in fp32 (4 W): 18 W = 28 GB and activations, no recomputation.
  8B    fp32 gradients would make 18 W = 145 GB: too much. Gradients accumulate in bf16 instead
        (16 W = 128 GB), as the table states; ZeRO-3, since its update goes by sub-groups and never
        holds all gradients in fp32. Optimizer offload would need 16 W = 128 GB of the host, which
        has 128 GiB.
  TRL   keeps weights, gradients and moments in bf16 (8 W): its fastest way, and a coarser update
        than the others'.

Needs torch >= 2.11 for CUDA and transformers >= 5.17 on the machine; no network. Wheels to bring
where missing (built beforehand where the index has a source archive only): deepspeed (build it),
hjson, liger-kernel, trl, datasets, dill, multiprocess, accelerate, pydantic, pydantic-core,
annotated-types, typing-inspection, httpx2, httpcore2, truststore, rensa, jsonschema,
jsonschema-specifications, referencing, rpds-py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gpu_longest
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

TOKENIZER = ROOT / "recipes" / "debug" / "model"
VERSIONS = ("torch", "transformers", "trl", "liger-kernel", "deepspeed")
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312}  # dense bf16, as the maker states them
LEAST_S = 45  # an arm is not started with less time left

QWEN_1_5B = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
}
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY |= {"intermediate_size": 128, "vocab_size": 512}


@dataclass(frozen=True)
class Arm:
    """A line of the table: `program` is packhorse or an arm of arms.py; `fields` change the job."""

    program: str
    label: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Case:
    name: str
    shape: dict[str, Any]
    fields: dict[str, Any]  # of the job, for all its arms
    arms: tuple[Arm, ...]


TRL: dict[str, Any] = {
    "bf16": False,
    "gradient_checkpointing": False,
}  # bf16 weights without autocast
CASES = (
    Case(
        "1.5B",
        QWEN_1_5B,
        {"global_batch_size": 4},
        (
            Arm("packhorse", "packhorse, ZeRO-1", {"deepspeed": "zero1"}),
            Arm("trl", "TRL + Liger, all in bf16", {"trl": TRL}),
            Arm("loop", "bare loop", {}),
        ),
    ),
    Case(
        "8B",
        LLAMA_8B,
        {"global_batch_size": 2, "activation_checkpointing": "full", "grad_dtype": "bfloat16"},
        (
            Arm("packhorse", "packhorse, ZeRO-3", {"deepspeed": "zero3"}),
            Arm("trl", "TRL + Liger, all in bf16", {"trl": TRL | {"gradient_checkpointing": True}}),
            Arm("loop", "bare loop", {}),
            Arm(
                "trl",
                "TRL + Liger, all in bf16, not recomputing",
                {"activation_checkpointing": "none", "trl": TRL},
            ),
        ),
    ),
)


def main() -> None:
    options = parse()
    card = "tiny" if options.tiny else card_name()
    work = Path(tempfile.mkdtemp(prefix="gpu_bench."))
    deadline_s = time.monotonic() + options.budget_s
    rows: dict[str, list[str]] = {}
    for case in CASES:
        if options.only not in (None, case.name):
            continue
        job = make_case(case, options, work)
        results: dict[str, list[Run] | str] = {}
        for _ in range(options.rounds):
            for arm in case.arms:
                done = results.setdefault(arm.label, [])
                if isinstance(done, str):
                    continue  # failed once: not tried again
                got = run_one(arm, job, options, work, deadline_s)
                if isinstance(got, str):
                    results[arm.label] = got
                else:
                    done.append(got)
                row = table_row(case, arm, job, results[arm.label], card)
                rows[f"{case.name} {arm.label}"] = row
                print(" | ".join(row), flush=True)
                # now, as the machine may be taken away before the next arm ends
                write_report([*rows.values()], card, options)
    left_s = deadline_s - time.monotonic()
    if options.only in (None, "longest") and left_s > LEAST_S:
        rows["longest"] = gpu_longest.table_row(
            options.tiny, left_s, {**os.environ, **environment(options.tiny)}
        )
        write_report([*rows.values()], card, options)
    shutil.rmtree(work)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="tiny shapes on CPU: shows that every arm runs, no speed",
    )
    parser.add_argument(
        "--only",
        choices=[*(case.name for case in CASES), "longest"],
        help="one of the models, or the longest sequence; default: all of them",
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8, help="of an arm")
    parser.add_argument("--warmup", type=int, default=3, help="of them not timed")
    parser.add_argument(
        "--budget-s", type=float, default=530.0, help="arms that do not fit are named, not run"
    )
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/gpu_CARD.md; none for --tiny"
    )
    options = parser.parse_args()
    if not options.tiny and shutil.which("nvidia-smi") is None:
        parser.error("there is no CUDA card here (no nvidia-smi); --tiny makes a dry run on CPU")
    return options


def card_name() -> str:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return (
        subprocess.run(query, capture_output=True, text=True, check=True)
        .stdout.splitlines()[0]
        .strip()
    )


# -------------------------------------------------------------------------------------- what is run


def make_case(case: Case, options: argparse.Namespace, work: Path) -> Job:
    """Write the model's folder (configuration and tokenizer), the documents, and their tokens."""
    folder = work / case.name
    shutil.copytree(TOKENIZER, folder / "model")
    (folder / "model" / "config.json").write_text(
        json.dumps(case.shape | (TINY if options.tiny else {}))
    )
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
    tokens = job.steps * job.global_batch_size * job.seq_len
    write_documents(Path(job.source), tokens, job.seq_len)
    command, _ = arm_command("prepare", job, folder)
    with (folder / "prepare.log").open("wb") as log:
        subprocess.run(
            command,
            check=True,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment(options.tiny)},
        )
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
            out.write(
                json.dumps({"text": "".join(draw.choices(letters, k=length)).strip() or "a"}) + "\n"
            )
            made += length


def environment(tiny: bool) -> dict[str, str]:
    same = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    if tiny:
        return same | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return same | {
        "CUDA_VISIBLE_DEVICES": "0",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }


def run_one(
    arm: Arm, job: Job, options: argparse.Namespace, work: Path, deadline_s: float
) -> Run | str:
    """The run, or in a few words why there is none."""
    left_s = deadline_s - time.monotonic()
    if left_s < LEAST_S:
        return "not run: no time left"
    folder = Path(tempfile.mkdtemp(dir=work))
    job = replace(job, **arm.fields)
    if arm.program == "packhorse":
        command, metrics = packhorse_command(job, folder, work / "cache")
    else:
        if arm.program == "trl":
            trl = {
                "use_liger_kernel": job.liger,
                "gradient_accumulation_steps": job.global_batch_size,
                **job.trl,
            }
            job = replace(job, trl=trl)
        command, metrics = arm_command(arm.program, job, folder)
    try:
        run = run_arm(
            command,
            metrics,
            folder,
            environment(options.tiny),
            skip=options.warmup,
            steps=job.steps,
            limit_s=left_s,
        )
    except ArmFailed as error:
        print(f"{arm.label}: {error}", file=sys.stderr, flush=True)
        return (
            "out of memory"
            if "OutOfMemory" in str(error)
            else f"failed: {str(error).splitlines()[0]}"
        )
    shutil.rmtree(folder)
    return run


# --------------------------------------------------------------------------------------- the report


def flops_per_token(shape: dict[str, Any], trained_share: float, pairs_per_token: float) -> float:
    """Training FLOPs a real token: 6 a weight (Kaplan et al. 2020), and 6 a channel of attention
    and pair of positions a layer, pairs being L^2 of a document of L tokens (half of it causal;
    scores and values)."""
    hidden, layers, heads = (
        shape["hidden_size"],
        shape["num_hidden_layers"],
        shape["num_attention_heads"],
    )
    kv_share = shape["num_key_value_heads"] / heads
    layer = hidden * hidden * (2 + 2 * kv_share) + 3 * hidden * shape["intermediate_size"]
    head = hidden * shape["vocab_size"] * trained_share
    return 6 * (layers * layer + head + hidden * layers * pairs_per_token)


def table_row(case: Case, arm: Arm, job: Job, done: list[Run] | str, card: str) -> list[str]:
    if isinstance(done, str):
        return [case.name, arm.label, done, "", "", ""]
    rates = [run.rate("tokens") for run in done]
    trained = [run.rate("train/trained_tokens") for run in done]
    shape = json.loads((Path(job.model) / "config.json").read_text())
    counts = json.loads((Path(job.tokens) / "counts.json").read_text())
    share = statistics.median(t / r for t, r in zip(trained, rates, strict=True))
    flops = flops_per_token(shape, share, counts["pairs_per_token"])
    peak = next((tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if name in card), None)
    mfu = (
        spread([100 * rate * flops / peak for rate in rates], "{:.1f}%")
        if peak
        else "no stated peak"
    )
    memory = spread([run.peak_gpu_gib or run.peak_rss_gib for run in done], "{:.1f}")
    return [case.name, arm.label, spread(rates), spread(trained), mfu, memory]


def write_report(rows: list[list[str]], card: str, options: argparse.Namespace) -> None:
    head = ["model", "arm", "real tokens/s", "trained tokens/s", "MFU", "peak memory, GiB"]
    modes = (
        "1.5B: gradients accumulate in fp32, no activation checkpointing. "
        "8B: gradients accumulate in bf16, activation checkpointing."
    )
    parts = [
        "# A dry run on CPU, shapes tiny: the figures say nothing"
        if options.tiny
        else f"# packhorse, TRL + Liger and a bare loop on one {card}",
        f"`python {' '.join(['benchmarks/gpu.py', *sys.argv[1:]])}`",
        machine(VERSIONS),
        f"Random weights and documents, rows of {256 if options.tiny else 8192}, "
        f"{options.steps - options.warmup} timed steps after {options.warmup}, rounds: "
        f"{options.rounds}. "
        "Attention: torch's varlen kernel in all arms. Memory: the whole card's, caches included, "
        "as nvidia-smi reads "
        f"it twice a second. {modes} packhorse and the loop keep fp32 master weights and moments, "
        f"TRL keeps bf16.",
        table(head, rows),
    ]
    text = "\n\n".join(parts) + "\n"
    default = Path(__file__).parent / "results" / f"gpu_{card.lower().replace(' ', '_')}.md"
    out = options.out or (None if options.tiny else default)
    if out:
        write_result(out, text)
    else:
        print(f"\n{text}")


if __name__ == "__main__":
    main()
