"""Read and write the training state that DeepSpeed keeps in flat partitions.

In: the model and an optimizer that DeepSpeed made. Out: slices of parameters whose tensors are
views of the state, so that reading them saves it and writing to them restores it. All knowledge of
DeepSpeed 0.19's layouts is here:

stage 0     the optimizer is torch's own; every rank has all of every parameter
stage 1, 2  a group's parameters lie end to end in one buffer, of which each rank has a part
stage 3     each parameter is cut into ceil(n / world) elements a rank; sub-groups may be on NVMe
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from packhorse.trainer import dist
from packhorse.trainer.engine.moments import BLOCK, Piece, Piecewise, is_offloaded, moments_of
from packhorse.trainer.engine.sharded_state import (
    BESIDE,
    EMA,
    FROZEN,
    WEIGHT,
    Digests,
    Shards,
    Slice,
    add_digests,
    digests_of,
)
from packhorse.trainer.engine.streamed_adamw import (
    HostMaster,
    StreamedAdamW,
    move_to_host,
    page_locked,
)
from packhorse.trainer.model.load import persistent_buffers
from packhorse.trainer.model.quantisation import numel, parts_of

Names = Mapping[int, str]
"""id of a parameter -> its name."""

Averages = Mapping[int, torch.Tensor]
"""id of a master weight -> the moving average of it; empty without `optim.ema_decay`."""
NONE: Averages = MappingProxyType({})

Place = tuple[int, int, int]
"""A parameter's first element in a partition, the offset there, and how many it has; perhaps 0."""


@dataclass(frozen=True)
class Partition:
    """A rank's flat part of a group's fp32 master weights."""

    master: torch.Tensor
    kind: str  # of the optimizer that updates it
    parameters: list[Any]  # of the whole group, in the same order on every rank
    places: list[Place]  # of each of them
    weights: torch.Tensor | None = None  # the model's, where DeepSpeed does not make them follow


class TrainingState:
    """What a checkpoint holds of a model in training: fp32 weights, moments and buffers (C8).

    Parameters and buffers have the names that the transformers model gives them.

    Args:
        moment_bytes: of all ranks together (moments.moment_bytes).
        averages: keep a moving average of the weights, too.
        gathered: holds parameters whole inside its block (engine.gathered).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        stage: int,
        moment_bytes: int,
        averages: bool,
        gathered: Callable[..., AbstractContextManager[Any]],
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._stage = stage
        self._moment_bytes = moment_bytes
        self._gathered = gathered
        parts = _partitions(optimizer) if averages else ()
        self._averages = {id(part.master): part.master.detach().clone() for part in parts}

    def update_averages(self, decay: float) -> None:
        """Move the average of each weight towards the weight by 1 - `decay`."""
        for part in _partitions(self._optimizer):
            self._averages[id(part.master)].lerp_(part.master.detach(), 1 - decay)

    def bytes(self) -> int:
        """Return the bytes that all ranks together write: states in fp32, and the buffers."""
        trained = sum(map(numel, self._trained().values()))
        trained *= 2 if self._averages else 1
        return 4 * trained + self._moment_bytes + sum(piece.bytes for piece in self._buffers())

    def shapes(self) -> dict[str, list[int]]:
        """Return the shapes of the trained parameters and the buffers, by name."""
        named = [*self._trained().items(), *persistent_buffers(self._model)]
        return {name: list(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in named}

    def slices(self) -> Iterator[list[Slice]]:
        """Yield this rank's share of the state, a group at a time.

        A group's tensors are views, valid until the next group is asked for. Of what every rank
        has, rank 0 alone yields it.
        """
        if dist.is_main() and (buffers := self._buffers()):
            yield buffers
        if dist.is_main() or self._stage > 0:
            yield from read(self._optimizer, self.names(), self._averages)

    def restore(self, shards: Shards, updates: int) -> None:
        """Fill the state from a checkpoint that any world size, stage or offload has written.

        Every rank calls it. Hyperparameters stay the recipe's, frozen weights the model folder's.

        Args:
            updates: how many updates the checkpoint's weights have had.

        Raises:
            BadInput: the checkpoint is of another model.
        """
        with torch.no_grad():
            # a group at a time: one that is offloaded to NVMe needs no more memory than in training
            for group in write(self._optimizer, self.names(), updates, self._averages):
                for piece in group:
                    shards.fill(piece)
            for piece in self._buffers():
                shards.fill(piece)

    def digests(self) -> Digests:
        """Return this rank's share of the digests of the state and of what is frozen."""
        found = self.frozen_digests()
        for group in self.slices():
            add_digests(found, digests_of(group))
        return found

    def frozen_digests(self) -> Digests:
        """Return the digests of the parameters that are not trained, on rank 0; empty elsewhere.

        Every rank calls it.
        """
        return dict(self._frozen_digests)

    @cached_property
    def _frozen_digests(self) -> Digests:
        # computed once, as a run never changes them
        found: Digests = {}
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                with self._gathered([parameter]):
                    for part, tensor in parts_of(name, parameter) if dist.is_main() else ():
                        found |= digests_of([Slice(part, 0, {FROZEN: tensor.view(-1)})])
        return found

    def names(self) -> dict[int, str]:
        """Return the name of each parameter by its id."""
        return {id(parameter): name for name, parameter in self._model.named_parameters()}

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    def _buffers(self) -> list[Slice]:
        buffers = persistent_buffers(self._model)
        return [Slice(name, 0, {WEIGHT: buffer.view(-1)}) for name, buffer in buffers]


# ------------------------------------------------------------------------------ reading, writing


def read(optimizer: Any, names: Names, averages: Averages = NONE) -> Iterator[list[Slice]]:
    """Yield this rank's state a group at a time, valid until the next group is asked for."""
    for i, part in enumerate(_partitions(optimizer)):
        on_nvme = _is_on_nvme(optimizer, i)
        if on_nvme:
            optimizer._optimizer_states_and_gradient_swap_in(i)
        yield _slices(part, _base(optimizer), names, averages)
        if on_nvme:
            optimizer._release_swap_buffers(i)


def write(
    optimizer: Any, names: Names, updates: int, averages: Averages = NONE
) -> Iterator[list[Slice]]:
    """Yield groups as `read` does; what the caller writes into them becomes the state.

    Every rank runs through all groups.
    """
    if is_stage_3(optimizer):
        # cuts the small parameters, which DeepSpeed otherwise keeps whole
        optimizer.checkpoint_event_prologue()
    for i, part in enumerate(_partitions(optimizer)):
        on_nvme = _is_on_nvme(optimizer, i)
        if on_nvme:
            optimizer._optimizer_states_and_gradient_swap_in(i)
        yield _slices(part, _base(optimizer), names, averages, updates)
        if part.weights is not None:
            part.weights.copy_(part.master)
        if is_stage_3(optimizer):
            # the model's own shards follow the masters
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if on_nvme:
            optimizer._optimizer_states_and_gradient_swap_out(i)
    if is_stage_3(optimizer):
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):
        # stages 1 and 2: likewise; at stage 0 the masters are the model's weights
        optimizer.update_lp_params()


def is_stage_3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp16_partitioned_groups_flat")


def _is_on_nvme(optimizer: Any, group: int) -> bool:
    return getattr(optimizer, "swap_optimizer", False) and optimizer._swappable_optimizer_subgroup(
        group
    )


def _base(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer that DeepSpeed's ZeRO optimizer wraps."""
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _partitions(optimizer: Any) -> Iterator[Partition]:
    """Yield this rank's flat partitions of fp32 master weights, and the places in each."""
    base, groups = _base(optimizer), optimizer.param_groups
    if base is optimizer:  # stage 0
        for group in groups:
            for parameter in group["params"]:
                yield Partition(parameter, group["kind"], [parameter], [(0, 0, parameter.numel())])
        return
    if isinstance(base, StreamedAdamW):
        base.wait()
    find_places = _stage_3_places if is_stage_3(optimizer) else _stage_1_2_places
    for i, (master, _, parameters) in enumerate(zip(*_flat_groups(optimizer), strict=True)):
        number = optimizer.sub_group_to_group_id[i] if is_stage_3(optimizer) else i
        kind, places = groups[number]["kind"], list(find_places(parameters))
        if isinstance(master, HostMaster):
            yield Partition(master.host, kind, parameters, places, master.weights)
        else:
            yield Partition(master, kind, parameters, places)


def _flat_groups(optimizer: Any) -> tuple[list[Any], list[torch.Tensor], list[list[Any]]]:
    """Return, by group, DeepSpeed's list of this rank's fp32 masters, the model's weights that
    follow them, and the whole group's parameters.
    """
    if is_stage_3(optimizer):
        masters = optimizer.fp32_partitioned_groups_flat
        return masters, optimizer.fp16_partitioned_groups_flat, optimizer.fp16_groups
    if hasattr(optimizer, "bf16_groups"):
        # stage 1 in bf16 is a class of its own, with other attribute names
        masters, parts = optimizer.fp32_groups_flat_partition, optimizer.bf16_partitioned_groups
        members = optimizer.bf16_groups
    else:
        masters = optimizer.single_partition_of_fp32_groups
        parts, members = optimizer.parallel_partitioned_bit16_groups, optimizer.bit16_groups
    return masters, [of_ranks[dist.rank()] for of_ranks in parts], members


def stream_state(optimizer: Any) -> None:
    """Move the fp32 masters to the host, if the optimizer is to be streamed."""
    base = _base(optimizer)
    if not isinstance(base, StreamedAdamW):
        return
    masters, weights, _ = _flat_groups(optimizer)
    before = list(masters)  # kept until the end, as their ids are looked up
    for i, (master, part) in enumerate(zip(before, weights, strict=True)):
        masters[i] = move_to_host(master, part)
        for moment in moments_of(base, masters[i].host, "adamw").values():
            page_locked(moment)
    base.attach({id(master): masters[i] for i, master in enumerate(before)})


def show_pieces(optimizer: Any, names: Names, seed: int) -> None:
    """Tell an optimizer that needs it where its parameters lie in the master weights of all ranks.

    Every rank calls it.
    """
    base = _base(optimizer)
    if not isinstance(base, Piecewise):
        return
    base.seed = seed
    base.is_sharded = base is not optimizer  # DeepSpeed cuts weights at every stage but 0
    parts = list(_partitions(optimizer))
    own = [part.places for part in parts]
    of_ranks = dist.gather(own) if base.is_sharded else [own]
    base.pieces = {}
    for i, part in enumerate(parts):
        base.pieces[id(part.master)] = pieces = []
        for k, parameter in enumerate(part.parameters):
            cuts = {start for start, _, numel in (theirs[i][k] for theirs in of_ranks) if numel}
            blocks = sorted({start // BLOCK for start in cuts if start % BLOCK})
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            pieces.append(Piece(shape, *part.places[k], names[id(parameter)], tuple(blocks)))


def _stage_3_places(parameters: list[Any]) -> Iterator[Place]:
    offset = 0
    for parameter in parameters:
        share = parameter.partition_numel()
        start = share * parameter.ds_zero_partition_rank
        # the last ranks' shares end in padding, which is not part of the parameter
        yield start, offset, max(0, min(share, parameter.ds_numel - start))
        offset += share


def _stage_1_2_places(parameters: list[Any]) -> Iterator[Place]:
    for parameter in parameters:
        if (mapping := parameter._hp_mapping) is None:  # none of it lies in this rank's partition
            yield 0, 0, 0
            continue
        here, of_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
        yield of_parameter.start, here.start, here.numel


def _slices(
    part: Partition,
    base: torch.optim.Optimizer,
    names: Names,
    averages: Averages,
    updates: int | None = None,
) -> list[Slice]:
    """Return a partition's slices; to be filled where `updates` are given, else to be saved."""
    moments = moments_of(base, part.master, part.kind, updates)
    tensors = {WEIGHT: part.master, **moments}
    if averages:
        tensors[EMA] = averages[id(part.master)]
    states = {name: tensor.detach().view(-1) for name, tensor in tensors.items()}
    found = []
    for parameter, (start, offset, count) in zip(part.parameters, part.places, strict=True):
        if count > 0:
            own = {state: flat[offset : offset + count] for state, flat in states.items()}
            found.append(Slice(names[id(parameter)], start, own))
    if isinstance(base, Piecewise) and part.kind != "adamw":
        for number, what, start, beside in base.states_beside(part.master, updates is None):
            name = names[id(part.parameters[number])]
            found.append(Slice(f"{name}{BESIDE}{what}", start, beside))
    return found


# --------------------------------------------------------------------------- around a step's work


def make_moments(optimizer: Any) -> None:
    """Create the moments as zeros where they are missing, as the first step would.

    An offloaded optimizer's are left alone: they take no memory of the GPU.
    """
    base = _base(optimizer)
    if is_offloaded(base):
        return
    for part in _partitions(optimizer):
        if not base.state[part.master]:
            moments_of(base, part.master, part.kind, 0)


def forget_gradients(optimizer: Any) -> None:
    """Drop the gradients of a backward that no step follows."""
    optimizer.zero_grad()  # at stage 3 the next micro-batch then overwrites the buffers
    if hasattr(optimizer, "bit16_groups"):
        # stages 1 and 2 keep gradients in places that zero_grad does not clear; this is what
        # DeepSpeed does after a step that it skips
        optimizer.micro_step_id = -1  # counted up before a step's first micro-batch
        optimizer._release_preflattened_grad_buffers()
        for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            kept.update(dict.fromkeys(kept))
