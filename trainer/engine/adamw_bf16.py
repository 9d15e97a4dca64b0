"""AdamW with moments in bfloat16, rounded stochastically.

Rounding to the nearest would lose a second moment's small steps: 1 - beta2 is below the half of
bfloat16's spacing from 0.998 on. Here a moment takes the upper of its two neighbours as often as it
is near to it. The random bits belong to (seed, step, parameter, weight), whoever holds the weight,
so that every number of ranks rounds alike.
"""

from __future__ import annotations

import torch

from packhorse.trainer import dist
from packhorse.trainer.engine.moments import MOMENTS, Group, Piecewise, moments_of

_RUN = 2**22  # weights that are expanded to fp32 at a time
_ODD = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio, as splitmix64 has it


class AdamWBf16(Piecewise):
    """Update all weights by AdamW, and keep both moments in bfloat16."""

    def make_states(self, master: torch.Tensor) -> None:
        for name in MOMENTS["adamw_bf16"]:
            self.state[master][name] = torch.zeros_like(master, dtype=torch.bfloat16)

    def update(self, master: torch.Tensor, gradient: torch.Tensor, group: Group) -> None:
        moments = [m.view(-1) for m in moments_of(self, master, "adamw_bf16").values()]
        self.state[master]["step"] += 1
        step, (beta1, beta2) = self.state[master]["step"], group["betas"]
        weights, gradients, lr = master.view(-1), gradient.view(-1), group["lr"]
        for piece in self.pieces[id(master)]:
            for first in range(0, piece.numel, _RUN):
                numel = min(_RUN, piece.numel - first)
                here = slice(piece.offset + first, piece.offset + first + numel)
                g = gradients[here]
                m = moments[0][here].float().lerp_(g, 1 - beta1)
                v = moments[1][here].float().lerp_(g.square(), 1 - beta2)
                update = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt_() + group["eps"])
                weights[here].mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=lr)
                for name, kept, value in zip(MOMENTS["adamw_bf16"], moments, (m, v), strict=True):
                    key = dist.seed_from(self.seed, name, step, piece.name)
                    kept[here] = round_stochastically(value, key, piece.start + first)


def round_stochastically(values: torch.Tensor, key: int, first: int) -> torch.Tensor:
    """Return float32 values in bfloat16, each rounded by 16 random bits of (key, its index).

    Args:
        first: the index of the first value.
    """
    mixed = torch.arange(first, first + len(values), device=values.device) * _ODD + key
    for _ in range(2):  # int64 wraps around, and its right shift keeps the sign
        mixed = (mixed ^ (mixed >> 31)) * _ODD
    bits = values.view(torch.int32) + ((mixed >> 40) & 0xFFFF).int()
    return (bits & -0x10000).view(torch.float32).bfloat16()  # exact: the lower half is zero
