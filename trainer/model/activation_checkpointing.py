"""Choose what the backward pass recomputes of each decoder layer (activation checkpointing).

In: a model and `model.activation_checkpointing`. Out: the same model, whose layers keep their input
alone (`full`), or also what costs most to compute and little to hold (`selective`). Gradients do
not change by a bit: the same operations run again on the same numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.feed_forward_tiles import WIDENING

# Products that `selective` keeps where they widen. A layer's queries and keys must not be kept:
# Liger's rotary kernel writes into them where torch cannot see it, and the recomputation would
# rotate them again.
_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
}
# Operations that attend, by name: flash-attn's, torch's varlen, and torch's own on a CPU. The
# packages that define them may be missing.
_ATTENTION = {
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::_flash_attn_forward",  # version 4 has no operation: it is recomputed
    "torch_attn::_varlen_attn",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "packhorse::planned_attention",  # the planner's stand-in for them
}


def save(*_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


def set_checkpointing(
    model: Any, mode: str, policy: Callable[..., CheckpointPolicy] = save
) -> None:
    """Let the model recompute as `mode` says: `none`, `selective`, `full` or `offload`.

    `offload` recomputes as `full` does; activation_offload.py moves what it keeps. `auto`, which
    nobody has resolved on a CPU or in an evaluation, is `full`.

    Args:
        policy: of torch's selective checkpointing, asked where `selective` keeps a result.

    Raises:
        BadInput: the model does not support activation checkpointing.
    """
    if not model.supports_gradient_checkpointing:
        if mode == "none":
            return
        raise BadInput(
            f"{type(model).__name__} does not support activation checkpointing; set "
            "model.activation_checkpointing=none"
        )
    # reentrant checkpointing loses gradients where a layer's input needs none, as under LoRA
    arguments: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        arguments["context_fn"] = lambda: tuple(
            map(_OfKept, create_selective_checkpoint_contexts(policy))
        )
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in WIDENING:
                module.register_forward_pre_hook(_Widening.enter)
                module.register_forward_hook(_Widening.leave, always_call=True)
    with warnings.catch_warnings():
        # transformers 5.23 warns that it gives these methods other names
        warnings.simplefilter("ignore", FutureWarning)
        if mode == "none":
            model.gradient_checkpointing_disable()
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


class _OfKept(TorchDispatchMode):
    """Shows torch's mode the operations alone whose results are kept.

    Torch asks that forward and recomputation run the same ones. At ZeRO-3 they do not: parameters
    are gathered inside a layer, and what was fetched ahead is not gathered again.
    """

    def __init__(self, mode: TorchDispatchMode) -> None:
        super().__init__()
        self._mode: Any = mode

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # fp8.py's casts stay compiled: nothing in them is kept

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kept = operation in _PRODUCTS if _Widening.depth else operation.name() in _ATTENTION
        if kept:
            return self._mode.__torch_dispatch__(operation, types, args, kwargs)
        return operation(*args, **(kwargs or {}))


class _Widening:
    """How many widening modules the forward is in: an adapter's lies around the plain one's."""

    depth = 0

    @classmethod
    def enter(cls, module: nn.Module, *_: Any) -> None:
        cls.depth += 1

    @classmethod
    def leave(cls, module: nn.Module, *_: Any) -> None:
        cls.depth -= 1
