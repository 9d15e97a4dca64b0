"""Where DeepSpeed keeps the training state: its optimizers' flat partitions as slices of
parameters.

In: an optimizer that DeepSpeed made. Out: groups of slices whose tensors are views of it, so that
    reading them saves
the state and writing to them restores it. All that is known about the layouts of DeepSpeed 0.19 is
here:

stage 0     the optimizer is torch's own; every rank has all of every parameter
stage 1, 2  a group's parameters lie end to end in one buffer, of which each rank has a piece
stage 3     each parameter is cut into ceil(n / world) elements a rank; sub-groups may lie on the NVMe
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from trainer.engine.sharded_state import EXP_AVG, EXP_AVG_SQ, WEIGHT, Slice

Names = Mapping[int, str]
"""id of a parameter -> its name."""


def read(optimizer: Any, names: Names) -> Iterator[list[Slice]]:
    """The state of this rank, a group at a time; a group's tensors are valid until the next one is
    asked for.
    """
    for i, (master, places) in enumerate(_partitions(optimizer, names)):
        on_nvme = _is_on_nvme(optimizer, i)
        if on_nvme:
            optimizer._optimizer_states_and_gradient_swap_in(i)
        yield _slices(master, places, _moments(_base(optimizer), master))
        if on_nvme:
            optimizer._release_swap_buffers(i)


def write(optimizer: Any, names: Names, updates: int) -> Iterator[list[Slice]]:
    """As `read`, but what is put into a group's tensors becomes the state, after so many updates,
    and the model's weights follow. Every rank takes all groups."""
    is_stage_3 = hasattr(optimizer, "fp16_partitioned_groups_flat")
    if is_stage_3:
        # cut small parameters, which are kept whole otherwise
        optimizer.checkpoint_event_prologue()
    for i, (master, places) in enumerate(_partitions(optimizer, names)):
        on_nvme = _is_on_nvme(optimizer, i)
        if on_nvme:
            optimizer._optimizer_states_and_gradient_swap_in(i)
        yield _slices(master, places, _moments(_base(optimizer), master, updates))
        if is_stage_3:
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if on_nvme:
            optimizer._optimizer_states_and_gradient_swap_out(i)
    if is_stage_3:
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


def wait_for_prefetch(optimizer: Any) -> None:
    """Wait for the parameters that stage 3 fetches ahead of a forward that does not come: they
    cannot be gathered.
    """
    if hasattr(optimizer, "fp16_partitioned_groups_flat"):
        optimizer.checkpoint_event_prologue()
        optimizer.checkpoint_event_epilogue()


Place = tuple[str, int, int, int]
"""A parameter's name, the first element of it that lies in a partition, where in the partition, how
many.
"""


def _partitions(optimizer: Any, names: Names) -> Iterator[tuple[torch.Tensor, list[Place]]]:
    """This rank's flat partitions of fp32 weights, and what lies where in them."""
    if hasattr(optimizer, "fp16_partitioned_groups_flat"):  # stage 3
        for i, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            yield master, list(_stage_3_places(optimizer.fp16_groups[i], names))
    elif hasattr(optimizer, "bit16_groups") or hasattr(optimizer, "bf16_groups"):  # stages 1 and 2
        in_bf16 = hasattr(optimizer, "bf16_groups")  # stage 1 in bf16 is a class of its own
        groups = optimizer.bf16_groups if in_bf16 else optimizer.bit16_groups
        masters = (
            optimizer.fp32_groups_flat_partition
            if in_bf16
            else optimizer.single_partition_of_fp32_groups
        )
        for master, group in zip(masters, groups, strict=True):
            yield master, list(_stage_1_2_places(group, names))
    else:  # stage 0
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, [(names[id(parameter)], 0, 0, parameter.numel())]


def _stage_3_places(parameters: list[Any], names: Names) -> Iterator[Place]:
    """Padding at the parameter's end is not part of it."""
    offset = 0
    for parameter in parameters:
        share = parameter.partition_numel()
        start = share * parameter.ds_zero_partition_rank
        yield names[id(parameter)], start, offset, max(0, min(share, parameter.ds_numel - start))
        offset += share


def _stage_1_2_places(parameters: list[Any], names: Names) -> Iterator[Place]:
    for parameter in parameters:
        mapping = parameter._hp_mapping  # None where no element of it lies in this rank's partition
        if mapping is not None:
            here, of_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield names[id(parameter)], of_parameter.start, here.start, here.numel


def _slices(
    master: torch.Tensor, places: list[Place], moments: dict[str, torch.Tensor]
) -> list[Slice]:
    states = {
        name: tensor.detach().view(-1) for name, tensor in {WEIGHT: master, **moments}.items()
    }
    return [
        Slice(name, start, {state: flat[offset : offset + numel] for state, flat in states.items()})
        for name, start, offset, numel in places
        if numel > 0
    ]


def _moments(
    base: torch.optim.Optimizer, master: torch.Tensor, updates: int | None = None
) -> dict[str, torch.Tensor]:
    """AdamW's two moments; with `updates`, made where there are none yet, and its step counter set."""
    state = base.state[master]
    if updates is not None:
        for name in (EXP_AVG, EXP_AVG_SQ):
            state.setdefault(name, torch.zeros_like(master))
        of_torch = isinstance(
            base, torch.optim.AdamW
        )  # a tensor there, beside the weights; a number in DeepSpeed's
        state["step"] = torch.tensor(float(updates), device=master.device) if of_torch else updates
    return {name: state[name] for name in (EXP_AVG, EXP_AVG_SQ)}


def _base(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside DeepSpeed's."""
    return optimizer if isinstance(optimizer, torch.optim.AdamW) else optimizer.optimizer


def make_moments(optimizer: Any, names: Names) -> None:
    """Make AdamW's moments, of zeros, where there are none yet, as its first step would; not those
    off the GPU.
    """
    base = _base(optimizer)
    for master, _ in _partitions(optimizer, names) if isinstance(base, torch.optim.AdamW) else ():
        if not base.state[master]:
            _moments(base, master, 0)


def forget_gradients(optimizer: Any) -> None:
    """Leave no gradient behind a backward that no step follows, as DeepSpeed does where it does not
    apply one.
    """
    optimizer.zero_grad()  # at stage 3 the next micro-batch then overwrites what is in the buffers
    if hasattr(optimizer, "bit16_groups"):  # stages 1 and 2
        optimizer.micro_step_id = -1  # counted up before a step's first micro-batch
        optimizer._release_preflattened_grad_buffers()
        for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            kept.update(dict.fromkeys(kept))


def _is_on_nvme(optimizer: Any, group: int) -> bool:
    return getattr(optimizer, "swap_optimizer", False) and optimizer._swappable_optimizer_subgroup(
        group
    )
