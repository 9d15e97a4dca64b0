"""Keep gradients right where a micro-batch does not reach every trained parameter.

As a mixture whose experts are a list of modules, of which each token calls a few. Ranks then have
gradients of different parameters, or none. Each stage of DeepSpeed 0.19 goes wrong in its own way:

stage 0     one rank leaves the parameter out, several move it by its momentum
stage 1, 2  ranks reduce what comes first, and add up gradients of different parameters; in bf16
            at stage 1 a rank does not clip a gradient that came from others alone
stage 3     ranks gather different parameters, and the last step's gradient is applied again

Here a missing gradient is zero at every stage; what cannot be made right is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.decoder import untied, whole_layers
from packhorse.trainer.model.feed_forward_tiles import require_gradient, tiled_blocks


def fill_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give parameters that no token has reached a gradient of zero.

    Torch's optimizers leave out a parameter without one, where others move it by its momentum, as
    every stage with a flat buffer of gradients does.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def clip_all(optimizer: Any) -> None:
    """Let DeepSpeed's class for stage 1 in bf16 clip all gradients, the sums of all ranks.

    It would leave out those that this rank had no part in, and take the norm without them.
    """
    for has_gradient in getattr(optimizer, "fp32_groups_has_gradients", ()):
        has_gradient[:] = [True] * len(has_gradient)


def reduce_in_order(optimizer: Any) -> None:
    """Make ranks reduce a micro-batch's gradients when all are there, in the parameters' order.

    At stages 1 and 2. A rank then holds whole gradients to the end of a backward.
    """
    reduce_rest = optimizer.overlapping_partition_gradients_reduce_epilogue

    def reduce_all(**_: Any) -> None:
        optimizer.setup_buckets()
        if optimizer.use_grad_accum_attribute:
            optimizer.fill_grad_accum_attribute()
        for group, parameters in enumerate(optimizer.bit16_groups):
            for parameter in parameters:
                if optimizer.get_gradient_for_reduction(parameter) is None:
                    zeros = partial(torch.zeros_like, parameter)
                    if optimizer.use_grad_accum_attribute:
                        parameter.grad_accum = zeros(dtype=optimizer.gradient_accumulation_dtype)
                    else:
                        parameter.grad = zeros()
                optimizer.reduce_ready_partitions_and_remove_grads(parameter, group)
        reduce_rest()

    optimizer._coalesce_grad_reduction = True  # DeepSpeed's hooks then reduce nothing
    optimizer.overlapping_partition_gradients_reduce_epilogue = reduce_all  # which stage 2 calls
    optimizer.reduce_gradients = reduce_all  # and stage 1


def gather_whole(model: Any, partly_called: Sequence[nn.Module]) -> None:
    """Let ZeRO-3 gather some modules with all that is in them, before it makes its hooks."""
    from deepspeed.utils import set_z3_leaf_module

    layers = whole_layers(model)
    inside = {part for layer in layers for part in layer.modules()}
    # else a block's weights would be gathered again for each tile
    tiled = [block for block in tiled_blocks(model) if block not in inside]
    parts = [
        block
        for block in untied(model, partly_called)
        if block not in inside and block not in tiled
    ]
    for block in parts:
        block.register_forward_pre_hook(require_gradient)
    for part in (*layers, *tiled, *parts):
        set_z3_leaf_module(part, True)


def reduces_by_hooks(optimizer: Any) -> bool:
    """Return whether ranks reduce gradients as they come, at stages 1 and 2. DeepSpeed's class for
    stage 1 in bf16 sums all gradients first, whichever there are.
    """
    return hasattr(optimizer, "_coalesce_grad_reduction") and hasattr(optimizer, "bit16_groups")


def require_all_gradients(optimizer: Any) -> None:
    """Refuse a micro-batch at ZeRO 1 and 2 in which a trained parameter got no gradient.

    Ranks would add up gradients of different parameters. DeepSpeed counts those that have come.
    """
    missing = len(optimizer._grad_acc_hooks) - optimizer._hooks_fired_this_backward
    if missing > 0:
        # in bf16 there is no stage 0, and stage 1 sums all gradients
        stage = "zero0" if optimizer.dtype == torch.float32 else "zero1"
        raise BadInput(
            f"{missing} trained parameters got no gradient in a micro-batch, so that ranks would "
            f"mix those of different ones; set parallel.deepspeed={stage}"
        )


class GradientWatch:
    """Refuses a micro-batch at ZeRO-3 in which a trained parameter got no gradient.

    DeepSpeed leaves the last step's gradient in such a parameter's buffer and applies it again.
    Experts that no token chose are such parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # what is gathered as a whole is reduced as a whole, zeros in place of what is missing
        parts = {name: getattr(p, "ds_z3_leaf_module", name) for name, p in trained.items()}
        self._names = {part: name for name, part in parts.items()}
        self._waiting = set(self._names)
        for name, parameter in trained.items():
            parameter.register_hook(lambda _, part=parts[name]: self._waiting.discard(part))

    def check(self) -> None:
        """Raise BadInput if the backward left a parameter out; then start anew for the next one."""
        if self._waiting:
            raise BadInput(
                f"`{min(self._names[part] for part in self._waiting)}` and "
                f"{len(self._waiting) - 1} other parameters got no gradient in a micro-batch, for "
                "which ZeRO-3 would apply the last step's again; set parallel.deepspeed=zero2"
            )
        self._waiting.update(self._names)
