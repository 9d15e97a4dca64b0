"""Muon: orthogonalised momentum for whole matrices, wherever ZeRO has cut them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from packhorse.trainer import dist
from packhorse.trainer.engine.moments import Group, Piece, Piecewise, moments_of

_STEPS = 5


class Muon(Piecewise):
    """Orthogonalise the momentum of matrices (Jordan et al., 2024); update the rest by AdamW.

    An update is scaled by 0.2 sqrt(max(m, n)), so that its root mean square is AdamW's and one
    learning rate and weight decay serve both (Liu et al., 2025, "Muon is scalable").
    """

    def update(self, master: torch.Tensor, gradient: torch.Tensor, group: Group) -> None:
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
    for _ in range(_STEPS):  # with the authors' coefficients
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    x = x if wide is matrix else x.mT
    return x * (0.2 * max(matrix.shape[-2:]) ** 0.5)
