"""Choose a run's attention kernel: where several work, the fastest on the run's own shapes.

In: the recipe, the plan and the run folder. Out: the recipe with the kernel's name. Rank 0 measures
all layers' attention over the fullest micro-batch, forward and backward; the other ranks take what
it chose. attention.json in the run folder holds the times, and a resumed run keeps the kernel: two
kernels round differently.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.data.batch_plan import Plan
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.estimate.model import AttentionShape, attention_shapes, build_empty_model
from packhorse.trainer.model import attention, attention_kernels
from packhorse.trainer.model.attention_kernels import Arguments, Bounds
from packhorse.trainer.run_folder import has_checkpoint
from packhorse.trainer.utils.files import read_json_file, write_json
from packhorse.trainer.utils.text import one_line

RECORD = "attention.json"  # in the run folder
MOST_TOKENS = 2**16
WARM_UP, CALLS = 3, 7  # a kernel's first call may compile it
# Of the preferred kernel's time. By less another one does not win: that is how far two measurements
# of one kernel differ, and two starts of a recipe should choose alike.
CLEARLY_FASTER = 0.95


def choose_attention(recipe: Recipe, plan: Plan, run_dir: Path) -> Recipe:
    """Return the recipe with the attention kernel's name, and let flash-attn be that version.

    Every rank calls it, in the process group. Without a fused kernel the recipe stays as it is:
    the model is loaded with the reference, or the kernel that is asked for is refused.
    """
    asked, dtype = recipe.model.attention, getattr(torch, recipe.model.dtype)
    own = attention.fused_kernels(dist.device(), dtype)
    own = [kernel for kernel in own if asked in ("auto", kernel.split()[0])]
    of_ranks = dist.gather(own)  # once, whatever a rank has: ranks with fewer gather no less often
    kernels = [kernel for kernel in own if all(kernel in theirs for theirs in of_ranks)]
    if not kernels:
        return recipe
    chosen = dist.broadcast(_choose(recipe, plan, run_dir, kernels) if dist.is_main() else None)
    model = recipe.model.model_copy(update={"attention": attention.pin(chosen)})
    return recipe.model_copy(update={"model": model})


def _choose(recipe: Recipe, plan: Plan, run_dir: Path, kernels: Sequence[str]) -> str:
    before = None
    if has_checkpoint(run_dir):  # one without a record had the preferred kernel
        before = read_json_file(run_dir / RECORD).get("kernel", kernels[0])
    if isinstance(before, str) and before in kernels:
        dist.log.info("attention: %s, as before", before)
        return before
    if before:
        dist.log.warning(
            "attention: the run had %s, which cannot be used here now; another kernel rounds "
            "differently",
            before,
        )
    times = _times(recipe, plan, kernels) if len(kernels) > 1 else {}
    chosen = fastest(times) or kernels[0]
    if times:
        ranked = ", ".join(f"{kernel} {ms:.2f} ms" for kernel, ms in times.items())
        dist.log.info("attention of a micro-batch, forward and backward: %s", ranked)
    write_json(run_dir / RECORD, {"kernel": chosen, "ms": times})
    return chosen


def _times(recipe: Recipe, plan: Plan, kernels: Sequence[str]) -> dict[str, float]:
    try:
        layers = attention_shapes(build_empty_model(recipe.model, recipe.adapter))
    except BadInput as error:
        dist.log.info("attention kernels are not timed: %s", error)
        return {}
    step, sequences = plan.fullest()[0]
    pieces = plan.pieces(step.epoch, sequences)
    # At a million tokens a call takes minutes, and the order of kernels shows long before that.
    ends = np.minimum(np.cumsum(pieces[:, 2] - pieces[:, 1]), MOST_TOKENS)
    lengths = [length for length in np.diff(ends, prepend=0).tolist() if length]
    return time_kernels(kernels, layers, lengths, dist.device(), getattr(torch, recipe.model.dtype))


def time_kernels(
    kernels: Sequence[str],
    layers: Sequence[AttentionShape],
    lengths: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Return the milliseconds of all layers' attention over documents of these lengths, forward and
    backward, by kernel. A kernel that fails is left out, and the log says why.
    """
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    bounds = Bounds(ends, max(lengths), tuple(lengths))
    times: dict[str, float] = {}
    for kernel in kernels:
        attend = getattr(attention_kernels, attention.pin(kernel))
        try:
            times[kernel] = sum(
                number * milliseconds(_attention_of(shape, attend, bounds, dtype), device)
                for shape, number in Counter(layers).items()
            )
        except Exception as error:  # a wheel for another GPU fails in ways of its own
            dist.log.info("attention: %s is left out: %s", kernel, one_line(error, 200))
    return times


def _attention_of(
    shape: AttentionShape, attend: Any, bounds: Bounds, dtype: torch.dtype
) -> Callable[[], None]:
    """Return a call of a layer's attention, forward and backward, on random numbers."""
    device = bounds.cu_seqlens.device
    sizes = [(shape.heads, shape.size), (shape.key_heads, shape.size)]
    sizes.append((shape.key_heads, shape.value_size))
    # (1, T, H, E), transposed as a layer's products leave them
    drawn = [torch.randn(1, bounds.own_tokens, *s, device=device, dtype=dtype) for s in sizes]
    qkv = [x.transpose(1, 2).requires_grad_() for x in drawn]
    sinks = torch.zeros(shape.heads, device=device, dtype=dtype) if shape.has_sinks else None
    asked = Arguments(None, shape.window, shape.softcap, sinks, shape.dropout, bounds)

    def run() -> None:
        out = attend("the layer", *qkv, asked)
        torch.autograd.grad(out, qkv, out.detach())

    return run


def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the median of CALLS calls, after WARM_UP others; each is waited for."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(WARM_UP + CALLS):
        wait()
        start = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[WARM_UP:])


def fastest(times: dict[str, float]) -> str | None:
    """Return the kernel to take, given milliseconds in the order of preference; None if none."""
    chosen: str | None = None
    for kernel, ms in times.items():
        if chosen is None or ms < CLEARLY_FASTER * times[chosen]:
            chosen = kernel
    return chosen
