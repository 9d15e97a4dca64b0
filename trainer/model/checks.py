"""Refuse what a loaded model cannot train on, in a sentence that names it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

import torch
from torch import nn

from packhorse.trainer import dist
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.decoder import decoder_of
from packhorse.trainer.utils.text import one_line


def require_positions(model: Any, longest: int) -> None:
    """Raise BadInput if the model's table of positions is shorter than the longest document."""
    tables = [
        module.weight
        for name, module in decoder_of(model).named_modules()
        if isinstance(module, nn.Embedding) and re.search(r"wpe|position|pos_emb", name)
    ]
    # ZeRO-3 keeps the shape beside an empty tensor
    rows = min((getattr(table, "ds_shape", table.shape)[0] for table in tables), default=longest)
    trained_for = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if rows < longest:
        raise BadInput(
            f"data.max_length: documents have up to {longest:,} tokens, and {type(model).__name__} "
            f"has a table of {rows:,} positions; set data.max_length={trained_for or rows}"
        )
    if trained_for and longest > trained_for:
        dist.log.warning(
            "documents may have %s tokens, more than the %s that the model was made for "
            "(max_position_embeddings); set data.max_length=%s, or scale its positions",
            *(f"{longest:,}", f"{trained_for:,}", trained_for),
        )


def require_finite_weights(model: nn.Module) -> None:
    """Raise BadInput if a weight on any rank is not finite, which would look like a fault of the
    kernels."""
    # ZeRO-3 keeps this rank's share in ds_tensor
    bad = [
        name
        for name, p in model.named_parameters()
        if p.is_floating_point() and not getattr(p, "ds_tensor", p).isfinite().all()
    ]
    if bad := sorted({name for names in dist.gather(bad) for name in names}):
        raise BadInput(
            f"model.name: the weights have NaN or infinity in `{bad[0]}`"
            f"{f' and {len(bad) - 1} more tensors' if len(bad) > 1 else ''}; give an undamaged copy"
        )


def draws_random_numbers(model: nn.Module, forward: Callable[[], Any]) -> bool:
    """Return whether the forward of training draws random numbers; the model is left in training.

    The generators are asked, as configurations name their randomness in many ways: a dropout, a
    layer that is left out, the jitter of a router.
    """
    on_gpu = dist.device().type == "cuda"
    model.train()
    with torch.random.fork_rng([dist.device()] if on_gpu else []):
        read = [torch.get_rng_state, *([torch.cuda.get_rng_state] if on_gpu else [])]
        before = [state() for state in read]
        forward()
        return not all(torch.equal(state(), old) for state, old in zip(read, before))


@contextmanager
def failures_explained(model: nn.Module) -> Iterator[None]:
    """Turn an error of the model's own code inside the block into a BadInput that names the module.

    It has a defect, needs more than token ids, or reads a weight that `adapter.base` has packed
    outside of the module whose weight it is.
    """
    try:
        yield
    except (BadInput, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        where = type(raising_module(error) or model).__name__
        how, what = "on token ids alone", "take another model"
        if any(hasattr(parameter, "quant_state") for parameter in model.parameters()):
            how, what = "with its weights in 4 or 8 bits", "take adapter.base out"
        raise BadInput(
            f"{type(model).__name__} cannot run {how}: {where} fails with "
            f"{type(error).__name__}: {one_line(error)}; {what}"
        ) from error


@contextmanager
def plan_failures_explained() -> Iterator[None]:
    """Turn an error of a model's own code on the meta device into a BadInput.

    Families fail there in ways of their own: a table of attention kernels without ours, a table
    that an earlier forward fills, a tower's library that is missing.
    """
    try:
        yield
    except (BadInput, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        module = raising_module(error)
        where = type(module).__name__ if module else "its own code"
        raise BadInput(
            f"the model cannot be planned: without weights {where} fails with "
            f"{type(error).__name__}: {one_line(error, 200)}; measure it with `packhorse train` on "
            "one GPU"
        ) from error


def raising_module(error: BaseException) -> nn.Module | None:
    """Return the innermost module in whose forward the error arose."""
    callers = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
    modules = [caller for caller in callers if isinstance(caller, nn.Module)]
    return modules[-1] if modules else None
