"""AdamW with moments in 8 bits, in blocks of 256 weights (Dettmers et al., 2022, arXiv:2110.02861).

A moment is a level of the paper's dynamic map times its block's largest. Blocks are counted from a
parameter's first weight, whoever holds it: where ZeRO cuts a block, its ranks agree on the largest,
so that codes and scales are the same at every number of ranks. Unlike in the paper, the second
moment's root is kept: it spans half as many decades, and a small weight's does not become zero,
which would blow up its update.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.functional import pad

from packhorse.trainer.engine.moments import (
    BLOCK,
    MOMENTS,
    Beside,
    Group,
    Piece,
    Piecewise,
    moments_of,
)

_SCALES = "scales"
_RUN = 2**14  # blocks that are expanded to fp32 at a time


@dataclass(frozen=True)
class _Run:
    """Weights that are updated at once: `numel` from `offset` on in a master weight, of `blocks`
    blocks from the scale `scale` on, the first of which lacks its first `lead` weights here.
    """

    offset: int
    numel: int
    lead: int
    scale: int
    blocks: int


@dataclass(frozen=True)
class _Layout:
    """Where the blocks of a master weight lie, and those that other ranks hold a part of.

    `shared` counts those of all ranks, in an order that all ranks know. `weights`, `scales` and
    `slots` are places of this rank's weights in such blocks: in the master weight, among its own
    scales, and among the shared ones.
    """

    runs: list[_Run]
    scales_at: list[int]  # where the scales of each piece begin, and the end of the last
    shared: int
    weights: torch.Tensor
    scales: torch.Tensor
    slots: torch.Tensor


class AdamW8bit(Piecewise):
    """Update matrices with moments of 8 bits; embeddings and vectors by AdamW in fp32."""

    def make_states(self, master: torch.Tensor) -> None:
        state, layout = self.state[master], self._layout(master)
        for name in MOMENTS["adamw_8bit"]:
            state[name] = torch.zeros(master.numel(), dtype=torch.uint8, device=master.device)
        state[_SCALES] = master.new_zeros(2, layout.scales_at[-1])

    def states_beside(self, master: torch.Tensor, saves: bool) -> Iterator[Beside]:
        layout, pieces = self._layout(master), self.pieces[id(master)]
        ranges = pairwise(layout.scales_at)
        for number, (piece, (at, end)) in enumerate(zip(pieces, ranges, strict=True)):
            # a cut block's scale is saved by the rank that has its first weight
            at += saves and at < end and piece.start % BLOCK > 0
            if at < end:
                scales = zip(MOMENTS["adamw_8bit"], self.state[master][_SCALES], strict=True)
                first = _last_block(piece) + 1 - (end - at)
                yield number, "blocks", first, {name: own[at:end] for name, own in scales}

    def update(self, master: torch.Tensor, gradient: torch.Tensor, group: Group) -> None:
        moments_of(self, master, "adamw_8bit")
        state, layout = self.state[master], self._layout(master)
        state["step"] += 1
        codes = [state[name] for name in MOMENTS["adamw_8bit"]]
        weights, gradients, scales = master.view(-1), gradient.view(-1), state[_SCALES]
        largest = self._largest_of_shared(layout, codes, scales, gradients, group["betas"])
        lr, (beta1, beta2) = group["lr"], group["betas"]
        unbiased1, unbiased2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        for run in layout.runs:
            here = slice(run.offset, run.offset + run.numel)
            own = slice(run.lead, run.lead + run.numel)
            fill = (run.lead, run.blocks * BLOCK - run.lead - run.numel)
            # code 0 stands for 0 in both maps, so that what is filled up is no block's largest
            old = [pad(code[here], fill).view(-1, BLOCK) for code in codes]
            of_blocks = slice(run.scale, run.scale + run.blocks)
            g = pad(gradients[here], fill).view(-1, BLOCK)
            moments = _next_moments(old, scales[:, of_blocks, None], g, (beta1, beta2))
            # moments[1] is a root, and so is its correction
            update = moments[0] / unbiased1 / (moments[1] / unbiased2**0.5 + group["eps"])
            weights[here].mul_(1 - lr * group["weight_decay"]).sub_(update.view(-1)[own], alpha=lr)
            found = torch.stack([moment.abs().amax(1) for moment in moments])
            found = torch.where(largest[:, of_blocks] > 0, largest[:, of_blocks], found)
            scales[:, of_blocks] = found
            for code, moment, scale, signed in zip(
                codes, moments, found, (True, False), strict=True
            ):
                code[here] = _encode(moment, scale[:, None], signed).view(-1)[own]

    def _largest_of_shared(
        self,
        layout: _Layout,
        codes: list[torch.Tensor],
        scales: torch.Tensor,
        gradients: torch.Tensor,
        betas: tuple[float, float],
    ) -> torch.Tensor:
        """Return the largest moments of cut blocks over all ranks, (2, scales); 0 for others."""
        found = torch.zeros_like(scales)
        if layout.shared:
            old = [code[layout.weights] for code in codes]
            of_weights = scales[:, layout.scales]
            moments = _next_moments(old, of_weights, gradients[layout.weights], betas)
            shared = scales.new_zeros(2, layout.shared)
            places = layout.slots.expand(2, -1)
            shared.scatter_reduce_(1, places, torch.stack(moments).abs(), "amax")
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
            found[:, layout.scales] = shared[:, layout.slots]
        return found

    def _layout(self, master: torch.Tensor) -> _Layout:
        layouts = self.__dict__.setdefault("_layouts", {})
        if id(master) not in layouts:
            layouts[id(master)] = _lay_out(self.pieces[id(master)], master.device)
        return layouts[id(master)]


def _last_block(piece: Piece) -> int:
    return (piece.start + piece.numel - 1) // BLOCK


def _lay_out(pieces: list[Piece], device: torch.device) -> _Layout:
    runs: list[_Run] = []
    scales_at = [0]
    weights: list[int] = []
    scales: list[int] = []
    slots: list[int] = []
    shared = 0
    for piece in pieces:
        at = scales_at[-1]
        first, stop = piece.start // BLOCK, piece.start + piece.numel
        last = _last_block(piece) if piece.numel else first - 1
        to_master = piece.offset - piece.start
        for block in range(first, last + 1, _RUN):
            low, high = max(piece.start, block * BLOCK), min(stop, (block + _RUN) * BLOCK)
            count = min(_RUN, last + 1 - block)
            run = _Run(low + to_master, high - low, low % BLOCK, at + block - first, count)
            runs.append(run)
        for slot, block in enumerate(piece.cut_blocks, shared):
            low, high = max(piece.start, block * BLOCK), min(stop, (block + 1) * BLOCK)
            weights += range(low + to_master, high + to_master)
            scales += [at + block - first] * (high - low)
            slots += [slot] * (high - low)
        scales_at.append(at + last + 1 - first)
        shared += len(piece.cut_blocks)
    places = (
        torch.tensor(one, dtype=torch.int64, device=device) for one in (weights, scales, slots)
    )
    return _Layout(runs, scales_at, shared, *places)


# ------------------------------------------------------------------------------------------- 8 bits


@functools.cache
def _dynamic_map(signed: bool, device: torch.device) -> torch.Tensor:
    """Return the 256 levels of the paper's dynamic map, sorted: 7 decades, the upper ones finer."""
    levels = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float64)
        means = 10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2
        levels += [means, -means] if signed else [means]
    return torch.cat(levels).sort().values.float().to(device)


_ZERO = {True: 127, False: 0}  # where the level 0 is; its code is 0


def _decode(codes: torch.Tensor, scales: torch.Tensor, signed: bool) -> torch.Tensor:
    levels = _dynamic_map(signed, codes.device)
    return levels[(codes.int() + _ZERO[signed]) % 256] * scales


def _encode(moments: torch.Tensor, scales: torch.Tensor, signed: bool) -> torch.Tensor:
    """Return the codes of the nearest levels."""
    levels = _dynamic_map(signed, moments.device)
    shares = moments / scales.clamp_min(torch.finfo(scales.dtype).tiny)
    nearest = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    return ((nearest - _ZERO[signed]) % 256).to(torch.uint8)


def _next_moments(
    codes: list[torch.Tensor],
    scales: torch.Tensor,
    gradients: torch.Tensor,
    betas: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first moments, and the roots of the second ones, after these gradients."""
    first = _decode(codes[0], scales[0], signed=True).lerp_(gradients, 1 - betas[0])
    second = _decode(codes[1], scales[1], signed=False).square_()
    return first, second.lerp_(gradients.square(), 1 - betas[1]).sqrt_()
