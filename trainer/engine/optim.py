"""Parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from trainer.config.recipe import OptimSection


def parameter_groups(model: nn.Module, section: OptimSection) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: decayed matrices, and the rest (norms, biases) without
    decay.

    Input embeddings and an output head tied to them count as matrices where `decay_embeddings` says
    so.
    """
    embeddings = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters()
    }
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        shape = getattr(
            parameter, "ds_shape", parameter.shape
        )  # ZeRO-3 leaves an empty shape behind
        is_matrix = len(shape) >= 2 and (
            section.decay_embeddings or id(parameter) not in embeddings
        )
        (decayed if is_matrix else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": section.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(step: int, steps: int, section: OptimSection) -> float:
    """The learning rate of step `step` (from 0) of `steps`: linear warm-up, then the schedule down
    to its floor.

    The first step has a rate above zero, the last one the floor (but for `constant`).
    """
    warmup_steps = math.ceil(section.warmup_ratio * steps)
    if step < warmup_steps:
        return section.lr * (step + 1) / warmup_steps
    floor = section.min_lr_ratio
    if section.lr_schedule == "wsd":
        decay_steps = max(1, math.ceil(section.wsd_decay * steps))
        progress = max(0.0, (step - (steps - 1 - decay_steps)) / decay_steps)
    else:
        progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    shares = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "wsd": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }
    return section.lr * (floor + (1.0 - floor) * shares[section.lr_schedule])
