"""Multiply by frozen weights in 4 bits, as bitsandbytes does, and hold none of them whole.

bitsandbytes' own product keeps a view of a weight's bytes until the backward: at ZeRO-3 that holds
all that was gathered, the whole base on each rank. Its forward also lays the weights out anew in
place, at the first evaluation on a CPU with bf16 instructions, which changes their digest and what
a checkpoint is compared with.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch

# bitsandbytes' own type annotations are wrong
_bnb: Any = bitsandbytes
Linear4bit: Any = _bnb.nn.Linear4bit
Params4bit: Any = _bnb.nn.Params4bit


class Nf4Linear(Linear4bit):
    """A linear module with a frozen weight in 4 bits: inputs (..., I), outputs (..., O)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return _Product.apply(x.to(self.compute_dtype), self.weight, bias).to(x.dtype)


class _Product(torch.autograd.Function):
    """x W^T + bias, of the bits that bitsandbytes' kernels give."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight  # itself and no view of it: ZeRO-3 exchanges its data meanwhile
        return _bnb.matmul_4bit(x, weight.data, bias=bias, quant_state=weight.quant_state)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, weight = gradients[0], ctx.weight
        weight_OI = _bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return gradient @ weight_OI.to(gradient), None, of_bias
