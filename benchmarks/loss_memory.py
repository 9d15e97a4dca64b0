"""Peak memory of the loss against vocabulary and tokens, for each kernel: the head's weight and
gradient left out.

    python benchmarks/loss_memory.py [--hidden 1024] [--tokens 512,2048] [--vocabularies
    8192,...,262144]

Memory is what forward and backward hold at most beyond what lay there before and beyond the
weight's gradient. On a GPU the allocator counts it; on a CPU torch's profiler does, from every
allocation and release. Prints a markdown table and writes it to
benchmarks/results/loss_memory_<device>.md.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from packhorse.trainer.model.loss import BLOCK_HIDDEN, linear_cross_entropy

RESULTS = Path(__file__).resolve().parent / "results"


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `work` holds at once, beyond what was held before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        work()
    recorded: Any = profiler.profiler
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def loss_workspace(
    kernel: str, tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str
) -> int:
    """Bytes of one forward and backward beyond the head's weight and its gradient."""
    torch.manual_seed(0)
    hidden_NH = torch.randn(tokens, hidden, dtype=dtype, device=device, requires_grad=True)
    weight_VH = (
        (torch.randn(vocabulary, hidden, device=device) * hidden**-0.5).to(dtype).requires_grad_()
    )
    targets_N = torch.randint(vocabulary, (tokens,), device=device)
    weights_N = torch.full((tokens,), 1 / tokens, device=device)

    def work() -> None:
        loss = linear_cross_entropy(hidden_NH, weight_VH, targets_N, weights_N, kernel)
        torch.autograd.grad(loss, [hidden_NH, weight_VH])

    return peak_bytes(work, torch.device(device)) - weight_VH.numel() * weight_VH.element_size()


def table(
    kernels: list[str], tokens: list[int], hidden: int, vocabularies: list[int], device: str
) -> str:
    """The markdown table, MiB."""
    lines = [
        f"| tokens | vocabulary | {' | '.join(kernels)} | tokens x hidden |",
        f"|---|---|{'---|' * len(kernels)}---|",
    ]
    for n in tokens:
        for v in vocabularies:
            cells = [
                loss_workspace(k, n, hidden, v, torch.bfloat16, device) / 2**20 for k in kernels
            ]
            unit = n * hidden * 2 / 2**20
            lines.append(f"| {n} | {v} | {' | '.join(f'{c:.1f}' for c in cells)} | {unit:.2f} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=4096 if device == "cuda" else 512)
    parser.add_argument("--tokens", default="2048,8192" if device == "cuda" else "128,512")
    parser.add_argument("--vocabularies", default="8192,32768,131072,262144")
    args = parser.parse_args()
    kernels = ["reference", "chunked", *(["liger"] if device == "cuda" else [])]
    numbers = [[int(n) for n in text.split(",")] for text in (args.tokens, args.vocabularies)]
    machine = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU"
    )
    text = f"""# Memory of the loss

Forward and backward of the head and the loss in bfloat16, hidden {args.hidden}: the most memory
held at once, MiB, less the size of the weight's gradient. `chunked` works on {BLOCK_HIDDEN} x
hidden entries of the vocabulary. {machine}; Python {platform.python_version()}, torch
{torch.__version__}{_liger_version(kernels)}. `python benchmarks/loss_memory.py`

{table(kernels, numbers[0], args.hidden, numbers[1], device)}
"""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"loss_memory_{device}.md").write_text(text, encoding="utf-8")
    print(text)


def _liger_version(kernels: list[str]) -> str:
    from importlib.metadata import version

    return f", liger-kernel {version('liger-kernel')}" if "liger" in kernels else ""


if __name__ == "__main__":
    main()
