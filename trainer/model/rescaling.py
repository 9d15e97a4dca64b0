"""Leave a model's weights as they are in evaluation.

RWKV's model in transformers halves weights of its later layers in place for an evaluation, and
their output with them, so that fp16 does not overflow; training doubles them again. The function is
the same. But an adapter beside such a weight would act twice as strongly, and packed bytes and
shards cannot be divided.
"""

from __future__ import annotations

from typing import Any


def is_rescaled(module: Any) -> bool:
    """Return whether a module as transformers has it divides weights in evaluation."""
    if not hasattr(module, "_rescale_layers"):
        return False
    return 0 < module.config.rescale_every < module.config.num_hidden_layers


def keep_scale(model: Any) -> None:
    """Let training and evaluation compute with the same weights. The configuration stays."""
    for module in model.modules():
        if hasattr(module, "_rescale_layers"):
            module._rescale_layers = lambda: None
