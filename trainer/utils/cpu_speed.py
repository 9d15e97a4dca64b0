"""How fast this CPU multiplies in bfloat16 and in float32.

A CPU without AVX-512's bf16 instructions or AMX emulates bfloat16, and then training is 10 to 70
times slower than in float32. No list of processors says so reliably, so a product is timed.
"""

from __future__ import annotations

import timeit

EMULATED_FROM = 2.0  # times slower than float32: real bf16 instructions are as fast or faster
_ROUNDS = 3
_SHAPE = (512, 576, 1536)  # rows, and a small model's projection


def bf16_slowdown() -> float:
    """Return how many times longer a product takes in bfloat16 than in float32. Takes under 1 s."""
    import torch

    return _product_s(torch.bfloat16) / _product_s(torch.float32)


def _product_s(dtype: object) -> float:
    """Return the seconds of one product of matrices, the best of a few."""
    import torch

    rows, inner, columns = _SHAPE
    left = torch.ones(rows, inner, dtype=dtype)  # pyright: ignore[reportArgumentType]
    right = torch.ones(inner, columns, dtype=dtype)  # pyright: ignore[reportArgumentType]
    # the first call, which chooses and builds the kernel, is never the best one
    return min(timeit.repeat(lambda: torch.mm(left, right), number=1, repeat=1 + _ROUNDS))
