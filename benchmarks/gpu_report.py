"""A line of gpu.py's table: speed, where a step's time went, MFU, memory."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from common import Job, Run, spread
from gpu_cases import Arm, Case

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312}  # dense bf16, as the maker states them
SPENT_ON = ("data", "forward", "backward", "optimizer")
HEAD = ["model", "arm", "real tokens/s", "ms of a step", "MFU", "trained tokens/s"]
HEAD += ["predicted", "peak memory, GiB"]


def flops_per_token(shape: dict[str, Any], trained_share: float, pairs_per_token: float) -> float:
    """Return the training FLOPs of a real token: 6 a weight (Kaplan et al. 2020), and 6 a channel
    of attention and pair of positions a layer, pairs being L^2 of a document of L tokens (half of
    it causal; scores and values)."""
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    kv_share = shape["num_key_value_heads"] / shape["num_attention_heads"]
    layer = hidden * hidden * (2 + 2 * kv_share) + 3 * hidden * shape["intermediate_size"]
    head = hidden * shape["vocab_size"] * trained_share
    return 6 * (layers * layer + head + hidden * layers * pairs_per_token)


def table_row(case: Case, arm: Arm, job: Job, done: list[Run] | str, card: str) -> list[str]:
    if isinstance(done, str):
        return [case.name, arm.label, done, "", "", "", arm.predicted, ""]
    rates = [run.rate("tokens") for run in done]
    trained = [run.rate("train/trained_tokens") for run in done]
    shape = json.loads((Path(job.model) / "config.json").read_text())
    counts = json.loads((Path(job.tokens) / "counts.json").read_text())
    share = statistics.median(t / r for t, r in zip(trained, rates, strict=True))
    flops = flops_per_token(shape, share, counts["pairs_per_token"])
    peak = next((tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if name in card), None)
    mfu = spread([100 * r * flops / peak for r in rates], "{:.1f}%") if peak else "no stated peak"
    memory = spread([run.peak_gpu_gib or run.peak_rss_gib for run in done], "{:.1f}")
    thrown = sum(run.thrown_out for run in done)
    label = f"{arm.label} ({thrown} steps that compiled are left out)" if thrown else arm.label
    figures = [spread(rates), spent(done), mfu, spread(trained)]
    return [case.name, label, *figures, arm.predicted, memory]


def spent(done: list[Run]) -> str:
    """Return milliseconds of a step by part, as packhorse logs them, and the rest of it: waits."""
    lines = [run.lines[i] for run in done for i in run.kept]
    if not all("perf/forward_s" in line for line in lines):
        return ""
    ms = {k: 1000 * statistics.median(line[f"perf/{k}_s"] for line in lines) for k in SPENT_ON}
    whole = 1000 * statistics.median(line["perf/step_s"] for line in lines)
    return ", ".join(f"{k} {v:.0f}" for k, v in {**ms, "rest": whole - sum(ms.values())}.items())
