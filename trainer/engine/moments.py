"""Name and make the states that an optimizer keeps beside each master weight.

Checkpoints, exports and the planner know the states from here alone. Most kinds have one or two
numbers in fp32, or in bf16, for each weight. Two kinds save memory by states of another length,
which every cut of the weights by ranks must share alike:

    adafactor    the means of squared gradients by row and by column of each matrix; each rank has
                 all of them
    adamw_8bit   a code of 8 bits for each weight, and a scale for each BLOCK weights of a parameter
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# The states of a kind, by the names that torch and DeepSpeed give them.
MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "sgd": ("momentum_buffer",),
    "muon": ("exp_avg",),
    "adafactor": ("exp_avg_sq_row", "exp_avg_sq_col"),
    "adamw_8bit": ("exp_avg", "exp_avg_sq"),
    "adamw_bf16": ("exp_avg", "exp_avg_sq"),  # optim.state_dtype of adamw
}
# Bytes of those that have a number for each weight.
BYTES_PER_WEIGHT = {kind: 4 * len(names) for kind, names in MOMENTS.items()} | {
    "adafactor": 0,
    "adamw_8bit": 2,
    "adamw_bf16": 4,
}
BLOCK = 256  # weights of a parameter that share a scale; the first block starts with the parameter


@dataclass(frozen=True)
class Piece:
    """A rank's elements [start, start + numel) of a parameter, at `offset` in a master weight."""

    shape: tuple[int, ...]
    start: int
    offset: int
    numel: int  # 0 where the rank has none of it
    name: str = ""
    cut_blocks: tuple[int, ...] = ()  # blocks of the parameter that lie on more than one rank


Group = Mapping[str, Any]
"""A parameter group of torch.optim."""

Beside = tuple[int, str, int, dict[str, torch.Tensor]]
"""A parameter's number among `pieces`, what the states are of, their first element there, and the
states by name."""


class Piecewise(torch.optim.AdamW):
    """Update groups by a rule that needs more than a rank's part of a parameter; the others, which
    are of the kind `adamw`, by AdamW.

    Attributes:
        pieces: by the id of a master weight, this rank's piece of each of its parameters, in the
            same order on every rank. The engine sets it as soon as DeepSpeed has cut the weights.
        is_sharded: whether the pieces of all ranks make up a parameter; else each rank has all.
        seed: the run's.
    """

    pieces: Mapping[int, list[Piece]]
    is_sharded: bool
    seed: int = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if group["kind"] == "adamw"]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for master in group["params"] if group["kind"] != "adamw" else ():
                if master.grad is not None:
                    self.update(master, master.grad, group)

    def update(self, master: torch.Tensor, gradient: torch.Tensor, group: Group) -> None:
        """Apply one update to a master weight. Every rank calls it in the same order."""
        raise NotImplementedError

    def make_states(self, master: torch.Tensor) -> None:
        """Put the states of a master weight into `self.state`, as zeros."""
        raise NotImplementedError

    def states_beside(self, master: torch.Tensor, saves: bool) -> Iterator[Beside]:
        """Yield the states of another length than the weights', as views.

        Args:
            saves: yield what this rank saves; else all that it needs, to be filled.
        """
        return iter(())


def is_offloaded(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer is one that keeps its state in the host's memory."""
    return type(optimizer).__name__ in ("DeepSpeedCPUAdam", "StreamedAdamW")


def moment_bytes(groups: Iterable[Group]) -> int:
    """Return the bytes of all states of parameter groups, as `parameter_groups` makes them."""
    return sum(state_bytes(group["kind"], p) for group in groups for p in group["params"])


def state_bytes(kind: str, parameter: Any) -> int:
    """Return the bytes of the states of a whole parameter, which ZeRO-3 may hold in shards."""
    shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
    weights = shape.numel()
    if kind == "adafactor":
        return 4 * (weights // shape[-1] + weights // shape[-2])
    scales = 2 * -(-weights // BLOCK) if kind == "adamw_8bit" else 0
    return BYTES_PER_WEIGHT[kind] * weights + 4 * scales


def moments_of(
    optimizer: torch.optim.Optimizer, master: torch.Tensor, kind: str, updates: int | None = None
) -> dict[str, torch.Tensor]:
    """Return the states that have an element for each of a master weight's, by name.

    The others are made, too (see `Piecewise.states_beside`).

    Args:
        kind: of the group that the weight belongs to.
        updates: sets the step counter, on which the update depends: AdamW's bias correction, for
            one.
    """
    state, names = optimizer.state[master], MOMENTS[kind]
    if BYTES_PER_WEIGHT[kind] != 4 * len(names):
        assert isinstance(optimizer, Piecewise)
        if names[0] not in state:
            optimizer.make_states(master)
            state["step"] = 0
        if updates is not None:
            state["step"] = updates
        return {name: state[name] for name in names} if BYTES_PER_WEIGHT[kind] else {}
    if names[0] not in state and updates is None:  # AdamW makes none of its state after some of it
        updates = 0
    for name in names:
        if name not in state:  # as before the first update, or SGD's without momentum
            state[name] = torch.zeros_like(master)
    if updates is not None and kind == "adamw":
        # torch's fused AdamW wants the counter as a tensor beside the weight, the others a number
        as_tensor = not is_offloaded(optimizer)
        count = torch.tensor(float(updates), device=master.device)
        state["step"] = count if as_tensor else updates
    return {name: state[name] for name in names}
