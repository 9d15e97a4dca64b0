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
    scales: torch.Tensor  # (O, 1)

    def expand(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the weight of codes, (O, I), whose bytes may be viewed in another type."""
        return codes.view(torch.int8).view(self.shape).to(self.scales.dtype) * self.scales

    def as_dict(self, packed: bool) -> dict[str, torch.Tensor]:
        return {"scales": self.scales}


class Int8Linear(nn.Linear):
    """A linear module with a frozen weight in int8.

    Args:
        plain: the module whose place it takes; its weight is held whole here.
        storage: the type that the bytes are viewed in, which ZeRO-3 gathers.
    """

    def __init__(self, plain: nn.Linear, storage: torch.dtype, device: torch.device) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        weight_OI = plain.weight.detach().to(device)
        largest_O1 = weight_OI.abs().amax(1, keepdim=True)
        # in the weights' type, so that a code times its scale is rounded once
        scales_O1 = (largest_O1.float() / 127).to(weight_OI.dtype)
        rounded = (weight_OI.float() / scales_O1.float().clamp_min(1e-30)).round()
        codes = rounded.clamp(-127, 127).to(torch.int8).view(-1).view(storage).view(-1, 1)
        self.weight: Any = nn.Parameter(codes, requires_grad=False)
        self.weight.quant_state = RowScales(weight_OI.shape, scales_O1)
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
