"""Hold frozen linear modules in 8 bits: int8 weights with a scale for each row.

Activations stay in the model's type, unlike in LLM.int8(), whose outliers are sought over a whole
micro-batch: packed documents would act on each other (C4). The weight is expanded where its module
runs, and once more in the backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class RowScales:
    """What an int8 weight stands for: code x scale of its row, in the scales' type.

    A weight has it as `quant_state`, as those of bitsandbytes do.
    """

    shape: torch.Size
    scales: torch.Tensor  # (O, 1), of experts (E, O, 1)

    def expand(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the weight of codes, whose bytes may be viewed in another type."""
        return codes.view(torch.int8).view(self.shape).to(self.scales.dtype) * self.scales

    def as_dict(self, packed: bool) -> dict[str, torch.Tensor]:
        return {"scales": self.scales}


def in_8_bits(weight: torch.Tensor, storage: torch.dtype, device: torch.device) -> nn.Parameter:
    """Return a frozen parameter of the weight's codes, on the device.

    Args:
        weight: (..., I), whole.
        storage: the type that the bytes are viewed in, which ZeRO-3 gathers.
    """
    exact = weight.detach().to(device)
    largest = exact.abs().amax(-1, keepdim=True)
    # in the weights' type, so that a code times its scale is rounded once
    scales = (largest.float() / 127).to(exact.dtype)
    rounded = (exact.float() / scales.float().clamp_min(1e-30)).round()
    codes = rounded.clamp(-127, 127).to(torch.int8).view(-1).view(storage).view(-1, 1)
    parameter: Any = nn.Parameter(codes, requires_grad=False)
    parameter.quant_state = RowScales(exact.shape, scales)
    return parameter


class Int8Linear(nn.Linear):
    """A linear module with a frozen weight in int8.

    Args:
        plain: the module whose place it takes.
        weight: the same weight, from in_8_bits.
    """

    def __init__(self, plain: nn.Linear, weight: Any) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight: Any = weight
        self.bias = plain.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = _Product.apply(x, self.weight)
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """x W^T, of which the backward expands W anew instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any) -> torch.Tensor:
        ctx.weight = weight  # ZeRO-3 exchanges its data meanwhile
        return F.linear(x, weight.quant_state.expand(weight.data))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] @ ctx.weight.quant_state.expand(ctx.weight.data), None
