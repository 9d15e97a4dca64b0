"""Build the optimizer of a run.

In: parameter groups, each with the `kind` that updates it. Out: an optimizer for DeepSpeed. Each
kind is exact: an update does not depend on how DeepSpeed cuts weights. What each keeps beside the
weights is in moments.py; which parameters it updates, and AdamW the others, in optim.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from packhorse.trainer.config.recipe import OptimSection
from packhorse.trainer.engine.adafactor import Adafactor
from packhorse.trainer.engine.adamw_8bit import AdamW8bit
from packhorse.trainer.engine.adamw_bf16 import AdamWBf16
from packhorse.trainer.engine.ds_config import offload_device, streams_optimizer
from packhorse.trainer.engine.moments import moments_of
from packhorse.trainer.engine.muon import Muon
from packhorse.trainer.engine.optim import set_learning_rates
from packhorse.trainer.engine.streamed_adamw import StreamedAdamW

PIECEWISE = {"muon": Muon, "adafactor": Adafactor, "adamw_8bit": AdamW8bit, "adamw_bf16": AdamWBf16}


def build_optimizer(
    groups: list[dict[str, Any]], section: OptimSection, config: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Return the optimizer of `parameter_groups`; for AdamW DeepSpeed's own if it is offloaded."""
    adam: dict[str, Any] = {"lr": section.lr, "betas": section.betas, "eps": section.eps}
    optimizer: torch.optim.Optimizer
    if section.kind == "lion":
        optimizer = Lion(groups, {"lr": section.lr, "betas": section.betas})
    elif section.kind == "sgd":
        optimizer = torch.optim.SGD(groups, lr=section.lr, momentum=section.betas[0])
    elif section.rule in PIECEWISE:
        optimizer = PIECEWISE[section.rule](groups, fused=True, **adam)
    elif offload_device(config, "optimizer") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **adam)
    elif streams_optimizer(config):
        optimizer = StreamedAdamW(groups, fused=True, **adam)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **adam)
    set_learning_rates(optimizer, section.lr)
    return optimizer


class Lion(torch.optim.Optimizer):
    """Move each weight by the sign of its momentum (Chen et al., 2023), with decoupled decay."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                (momentum,) = moments_of(self, weight, "lion", updates=0).values()
                update = momentum.lerp(weight.grad, 1 - beta1).sign_()
                weight.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr)
                momentum.lerp_(weight.grad, 1 - beta2)
