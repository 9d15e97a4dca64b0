"""Measure what a model does to its logits: a scale, a soft cap, or nothing.

In: a transformers model. Out: a LogitTransform, which the loss applies to the logits that it makes
from hidden states, or BadInput.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from packhorse.trainer import dist
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.attention import other_attention


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its head's output: cap x tanh(scale x logits / cap).

    Without a cap it is scale x logits.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits * self.scale if self.scale != 1.0 else logits
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits


def measure_transform(model: Any) -> LogitTransform:
    """Return what the model's forward does to its head's output.

    It is found by putting known numbers in the place of that output.

    Raises:
        BadInput: it is neither a scale nor a soft cap of the form cap x tanh(scale x logits / cap).
    """
    head = model.get_output_embeddings()
    vocabulary = model.config.get_text_config().vocab_size
    known: list[torch.Tensor] = []

    def replace(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        # small numbers show the scale, as a cap bends none of them; large ones show the cap
        magnitudes = torch.logspace(-3, 6, output.shape[-1] // 2, device=output.device)
        values = torch.cat([magnitudes, -magnitudes, magnitudes.new_zeros(output.shape[-1] % 2)])
        known.append(values)
        return values.expand(output.shape)

    ids = torch.arange(4, device=dist.device()).unsqueeze(0) % vocabulary
    hook = head.register_forward_hook(replace)
    try:
        with other_attention(model, "eager"):
            out = model(input_ids=ids, use_cache=False).logits[0, -1].double()
    finally:
        hook.remove()
    transform = _fit(known[-1].double(), out)
    if transform is None:
        raise BadInput(
            f"{type(model).__name__} changes its logits by more than a scale and a soft cap, "
            "which the loss does not know; this model cannot be trained here"
        )
    return transform


def _fit(given: torch.Tensor, out: torch.Tensor) -> LogitTransform | None:
    """Return the transform from `given` (float64, magnitudes 1e-3 to 1e6) to `out`, or None."""
    scale = float(out[0] / given[0])
    for cap in (None, float(out.abs().max())):
        fitted: Callable[[torch.Tensor], torch.Tensor] = LogitTransform(scale, cap)
        if out.shape == given.shape and torch.allclose(fitted(given), out, rtol=1e-3, atol=1e-6):
            # six digits: the model's own number, without the error of measuring it in its type
            rounded = float(f"{scale:.6g}")
            return LogitTransform(rounded, None if cap is None else float(f"{cap:.6g}"))
    return None
