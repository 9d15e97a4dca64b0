"""Compute the bytes of weights, gradients, master weights and moments of the fullest rank.

They are DeepSpeed's own buffers, byte for byte (tests/numerics/test_memory.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine.ds_config import count_sharing, offload_device, stage_of
from packhorse.trainer.engine.moments import BLOCK, BYTES_PER_WEIGHT
from packhorse.trainer.estimate.model import ModelSizes


@dataclass(frozen=True)
class StateBytes:
    """Bytes of the training state on the fullest rank after a backward, and where the parts lie."""

    weights: int
    # weights of parameters too small to cut, which stage 3 keeps whole on the GPU as well
    persistent: int
    gradients: int
    masters: int  # the optimizer's fp32 weights
    moments: int
    weights_on: str = "gpu"  # or cpu, nvme
    optimizer_on: str = "gpu"  # summed gradients, master weights and moments
    shared: int = 0  # second copies of weights (hpZ), from a forward to the step


def count_state_bytes(model: ModelSizes, config: Mapping[str, Any], world: int) -> StateBytes:
    """Return the training state under a filled DeepSpeed template, or refuse a combination that is
    not planned."""
    stage = stage_of(config)
    if stage == 3:
        return _count_stage_3(model, config, world)
    packed = sum(-(-elements * model.bits // 8) for elements in model.quantised)
    frozen = model.element * sum(model.frozen) + packed + model.scales_bytes
    if stage == 0:  # the weights are the master weights
        weights = model.element * model.trained
        return StateBytes(weights + frozen, 0, weights, 0, model.moment_bytes)
    if offload_device(config, "optimizer") != "none":
        raise BadInput(
            "offload_optimizer at ZeRO stages 1 and 2 is not planned; plan it at stage 3"
        )
    pieces = masters_of_groups(model, stage, world)
    flat, piece = [world * part for part in pieces], sum(pieces)
    if sums_whole_gradients(model, config):
        gradients = 4 * sum(flat)
    elif sum_bytes(config) != model.element:
        gradients = sum_bytes(config) * piece
    else:
        gradients = model.element * _count_touched(model.groups, flat, world)
    weights = model.element * sum(flat) + frozen
    cuts = [_cuts_of_flat(*of, world) for of in zip(model.groups, pieces, strict=True)]
    moments = _count_moments(model, pieces, cuts)
    return StateBytes(weights, 0, gradients, 4 * piece, moments)


def sum_bytes(config: Mapping[str, Any]) -> int:
    """Return the bytes of an element in which gradients are summed."""
    return 2 if config["data_types"]["grad_accum_dtype"] == "bf16" else 4


def sums_whole_gradients(model: ModelSizes, config: Mapping[str, Any]) -> bool:
    """Return whether DeepSpeed's class for stage 1 in bf16 sums all gradients in fp32; each in the
    model's type goes as soon as it is added.
    """
    return stage_of(config) == 1 and model.element == 2 and sum_bytes(config) == 4


def masters_of_groups(model: ModelSizes, stage: int, world: int) -> list[int]:
    """Return the elements of a rank's master weights of each group, above ZeRO stage 0."""
    if stage == 3:  # each parameter is cut by itself, and its last piece filled up
        return [sum(-(-size // world) for size in group) for group in model.groups]
    # DeepSpeed flattens each group and fills it up to a multiple of 2 elements a rank
    return [-(-sum(group) // (2 * world)) * 2 for group in model.groups]


def _count_stage_3(model: ModelSizes, config: Mapping[str, Any], world: int) -> StateBytes:
    zero, sharing = config["zero_optimization"], count_sharing(config, world)
    trained = [size for group in model.groups for size in group]
    pieces = masters_of_groups(model, 3, world)
    piece = sum(pieces)
    cuts = [
        (c for n in group for c in _cuts_of_flat([n], -(-n // world), world))
        for group in model.groups
    ]
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    # whole: gathered from the ranks' pieces, the last one's filling included
    # those that are quantised count by what their bytes are in the model's type
    in_a_number = 8 * model.element // model.bits
    frozen = [*model.frozen, *(n // in_a_number for n in model.quantised)]
    whole = [(size, world * -(-size // world)) for size in (*trained, *frozen)]
    persistent = sum(filled for size, filled in whole if size <= threshold)
    optimizer_on, weights_on = (
        offload_device(config, what).replace("none", "gpu") for what in ("optimizer", "param")
    )
    return StateBytes(
        weights=model.element * (piece + sum(-(-size // world) for size in frozen))
        + model.scales_bytes,
        persistent=model.element * persistent,
        # the CPU optimizer keeps a copy of its own on the host
        gradients=(sum_bytes(config) + 4 * (optimizer_on == "cpu")) * piece,
        masters=4 * piece,
        moments=_count_moments(model, pieces, cuts),
        weights_on=weights_on,
        optimizer_on=optimizer_on,
        shared=model.element * sum(filled for _, filled in whole) // sharing * (sharing > 1),
    )


def _cuts_of_flat(group: Sequence[int], piece: int, world: int) -> Iterator[np.ndarray]:
    """Yield where pieces of ranks cut each of the parameters that lie end to end, (ranks + 1,)."""
    start = 0
    for size in group:
        yield (np.arange(world + 1) * piece - start).clip(0, size)
        start += size


def _count_moments(
    model: ModelSizes, pieces: Sequence[int], cuts: Iterable[Iterable[np.ndarray]]
) -> int:
    """Return the bytes of the optimizer's states, and averages, on the rank that has the most.

    Args:
        pieces: elements of each group on a rank.
        cuts: where each parameter of each group is cut, (ranks + 1,).
    """
    of_ranks: Any = 0
    for kind, whole, piece, group in zip(
        model.kinds, model.group_moments, pieces, cuts, strict=True
    ):
        of_ranks += (BYTES_PER_WEIGHT[kind] + 4 * model.averaged) * piece
        if kind == "adafactor":  # every rank has the means of all rows and columns
            of_ranks += whole
        for at in group if kind == "adamw_8bit" else ():
            blocks = -(-at[1:] // BLOCK) - at[:-1] // BLOCK
            of_ranks = of_ranks + 2 * 4 * np.where(at[1:] > at[:-1], blocks, 0)
    return int(np.max(of_ranks))


def _count_touched(groups: Sequence[Sequence[int]], flat: Sequence[int], world: int) -> int:
    """Return the elements of the parameters that lie, wholly or in part, in the fullest rank's
    piece of each group: DeepSpeed keeps the gradients of those whole.
    """
    most = [0] * world
    for group, length in zip(groups, flat, strict=True):
        piece, ends = length // world, list(accumulate(group))
        for end, size in zip(ends, group, strict=True):
            for rank in range((end - size) // piece, (end - 1) // piece + 1):
                most[rank] += size
        for rank in range(world):  # beyond the last parameter a rank's piece is filled up
            most[rank] += min(piece, max(0, (rank + 1) * piece - ends[-1]))
    return max(most)
