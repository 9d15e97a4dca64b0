"""Build the optimizer: AdamW, Lion, SGD, or Muon for matrices with AdamW for the rest.

In: parameter groups, each with the `kind` that updates it. Out: an optimizer for DeepSpeed, and the
fp32 states that it keeps beside each master weight. All that depends on the kind is here and in
`parameter_groups`. Each kind is exact: an update does not depend on how DeepSpeed cuts weights.
Optimizers with 8-bit or factored states are left out, as theirs would: a state of 8 bits has a
scale for each block of a rank's part, and Adafactor's rows and columns end where the part does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import OptimSection
from packhorse.trainer.engine.ds_config import offload_device, streams_optimizer
from packhorse.trainer.engine.optim import set_learning_rates
from packhorse.trainer.engine.streamed_adamw import StreamedAdamW
from packhorse.trainer.model.quantisation import numel

# The states that a kind keeps in fp32 beside each master weight, by the names that torch and
# DeepSpeed give them. Checkpoints, exports and the planner know them from here alone.
MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "sgd": ("momentum_buffer",),
    "muon": ("exp_avg",),
}
_MUON_STEPS = 5


def build_optimizer(
    groups: list[dict[str, Any]], section: OptimSection, config: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Return the optimizer of parameter groups; for AdamW DeepSpeed's own where it is offloaded.

    Args:
        groups: as `parameter_groups` makes them.
        config: DeepSpeed's configuration, which says where the optimizer's state lies.
    """
    adam: dict[str, Any] = {"lr": section.lr, "betas": section.betas, "eps": section.eps}
    optimizer: torch.optim.Optimizer
    if section.kind == "lion":
        optimizer = Lion(groups, {"lr": section.lr, "betas": section.betas})
    elif section.kind == "sgd":
        optimizer = torch.optim.SGD(groups, lr=section.lr, momentum=section.betas[0])
    elif section.kind == "muon":
        optimizer = Muon(groups, fused=True, **adam)
    elif offload_device(config, "optimizer") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **adam)
    elif streams_optimizer(config):
        optimizer = StreamedAdamW(groups, fused=True, **adam)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **adam)
    set_learning_rates(optimizer, section.lr)
    return optimizer


def is_offloaded(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer is one that keeps its state in the host's memory."""
    return type(optimizer).__name__ in ("DeepSpeedCPUAdam", "StreamedAdamW")


def moment_bytes(groups: Iterable[Mapping[str, Any]]) -> int:
    """Return the bytes of all moments of parameter groups, as `parameter_groups` makes them."""
    return sum(
        4 * len(MOMENTS[group["kind"]]) * sum(map(numel, group["params"])) for group in groups
    )


def moments_of(
    optimizer: torch.optim.Optimizer, master: torch.Tensor, kind: str, updates: int | None = None
) -> dict[str, torch.Tensor]:
    """Return the optimizer's moments of a master weight, by state name, in the weight's shape.

    Args:
        kind: of the group that the weight belongs to.
        updates: sets the step counter, from which AdamW computes its bias correction.
    """
    state = optimizer.state[master]
    for name in MOMENTS[kind]:
        if name not in state:  # as before the first update, or SGD's without momentum
            state[name] = torch.zeros_like(master)
    if updates is not None and kind == "adamw":
        # torch's fused AdamW wants the counter as a tensor beside the weight, the others a number
        as_tensor = not is_offloaded(optimizer)
        count = torch.tensor(float(updates), device=master.device)
        state["step"] = count if as_tensor else updates
    return {name: state[name] for name in MOMENTS[kind]}


class Lion(torch.optim.Optimizer):
    """Move each weight by the sign of its momentum (Chen et al., 2023), with decoupled decay."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                (momentum,) = moments_of(self, weight, "lion", updates=0).values()
                update = momentum.lerp(weight.grad, 1 - beta1).sign_()
                weight.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr)
                momentum.lerp_(weight.grad, 1 - beta2)


# ------------------------------------------------------------------------------------------- Muon


@dataclass(frozen=True)
class Piece:
    """This rank's elements [start, start + numel) of a matrix, at `offset` in a master weight."""

    shape: tuple[int, ...]
    start: int
    offset: int
    numel: int  # 0 where the rank has none of it


class Muon(torch.optim.AdamW):
    """Orthogonalise the momentum of matrices (Jordan et al., 2024); update the rest by AdamW.

    An update is scaled by 0.2 sqrt(max(m, n)), so that its root mean square is AdamW's and one
    learning rate and weight decay serve both (Liu et al., 2025, "Muon is scalable").

    Attributes:
        pieces: by the id of a master weight, this rank's piece of each of its matrices, in the same
            order on every rank. The engine sets it as soon as DeepSpeed has cut the weights.
        is_sharded: whether the pieces of all ranks make up a matrix; else each rank has all of it.
    """

    pieces: Mapping[int, list[Piece]]
    is_sharded: bool

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if group["kind"] == "adamw"]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for master in group["params"] if group["kind"] == "muon" else ():
                if master.grad is not None:
                    self._step_matrices(master, master.grad, group)

    def _step_matrices(
        self, master: torch.Tensor, gradient: torch.Tensor, group: Mapping[str, Any]
    ) -> None:
        beta, lr = group["betas"][0], group["lr"]
        (momentum,) = moments_of(self, master, "muon", updates=0).values()
        momentum.lerp_(gradient, 1 - beta)
        update = gradient.lerp(momentum, beta).view(-1)  # Nesterov's
        master.mul_(1 - lr * group["weight_decay"])
        flat = master.view(-1)
        pieces = self.pieces[id(master)]
        world = dist.world_size() if self.is_sharded else 1
        # one matrix a rank at a time: no rank computes what another does
        for first in range(0, len(pieces), world):
            batch = pieces[first : first + world]
            wholes = _orthogonalised_by_owners(batch, update, self.is_sharded)
            for piece, whole in zip(batch, wholes, strict=True):
                place = slice(piece.offset, piece.offset + piece.numel)
                flat[place].sub_(whole[piece.start : piece.start + piece.numel], alpha=lr)


def _orthogonalised_by_owners(
    batch: list[Piece], update: torch.Tensor, is_sharded: bool
) -> Iterator[torch.Tensor]:
    """Yield each matrix's orthogonalised update, whole and flat, on every rank.

    Rank i puts the i-th matrix together, from parts that do not overlap: sums with zeros are exact,
    so that the matrix is the same at every world size and in every stage's cut. A rank holds its
    own matrix and one more.
    """
    mine = dist.rank() if is_sharded else 0
    own = update.new_empty(0)
    for owner, piece in enumerate(batch):
        whole = update.new_zeros(torch.Size(piece.shape).numel())
        part = update[piece.offset : piece.offset + piece.numel]
        whole[piece.start : piece.start + piece.numel] = part
        if is_sharded:
            torch.distributed.reduce(whole, owner)
        own = whole if owner == mine else own
    if mine < len(batch):
        own = orthogonalised(own.view(batch[mine].shape)).reshape(-1)
    for owner, piece in enumerate(batch):
        whole = own if owner == mine else update.new_empty(torch.Size(piece.shape).numel())
        if is_sharded:
            torch.distributed.broadcast(whole, owner)
        yield whole


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix with singular values near 1, times 0.2 sqrt(max(m, n)).

    Five steps of Newton-Schulz leave singular values between 0.7 and 1.2. They run in fp32: in bf16
    the rounding of another world size would show in the weights.

    Args:
        matrix: (..., m, n); leading dimensions are experts.
    """
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    # a matrix of zeros, as of an expert that no token has reached yet, stays one
    x = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
    for _ in range(_MUON_STEPS):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    x = x if wide is matrix else x.mT
    return x * (0.2 * max(matrix.shape[-2:]) ** 0.5)
