"""Compare two ZeRO-3 ranks' gradients with plain PyTorch's, and let them disagree about a model.

`model_sharded` runs both on ranks that it has started anyway.
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from deepspeed.utils import safe_get_full_grad

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import LossSection, OptimSection
from packhorse.trainer.datatypes import Batch
from packhorse.trainer.engine import engine as engine_module
from packhorse.trainer.engine.engine import Engine
from packhorse.trainer.engine.optim import parameter_groups
from packhorse.trainer.model.logit_transform import LogitTransform
from packhorse.trainer.model.packing_check import prove_packing
from packhorse.trainer.model.sft import SftModel
from tests.model_helpers import CPU, documents, loss_and_gradients, pack, relative, tiny_llama
from tests.unit.test_packing_check import no_boundaries, with_backend


class Unused(SftModel):
    """Runs all layers once more, for an output that nobody uses."""

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        kept = super().hidden_states(batch)
        super().hidden_states(batch)
        return kept


def _made(case: str) -> SftModel:
    module = (Unused if case == "unused" else SftModel)(tiny_llama(), LossSection(), 0, CPU)
    module.transform = LogitTransform()
    if case == "shared":
        module.model.model.layers[1] = module.model.model.layers[0]
    return module


def _sharded(module: SftModel, config: dict[str, Any]) -> Engine:
    optim = OptimSection()
    return Engine(module, parameter_groups(module.model, optim), optim, config)


def gradient_difference(case: str, recomputes: bool, config: dict[str, Any]) -> float:
    """Return the largest relative difference of a gradient after two micro-batches a rank."""
    batches = [
        pack(documents(lengths, seed=seed), [[1, 2], [3], [0]], [0.5, 0.25, 0.25])
        for seed, lengths in enumerate([(9, 5, 7), (4, 6, 12), (8, 8, 3), (5, 11, 2)])
    ]
    module = _made(case)
    plain = copy.deepcopy(module)
    _, exact = loss_and_gradients(plain, *batches)
    engine = _sharded(module, config)
    module.attends_by_itself = case == "by document"
    module.train()
    if recomputes:
        module.model.gradient_checkpointing_enable({"use_reentrant": False})
    for last, batch in enumerate(batches[dist.rank() :: dist.world_size()]):
        engine._backward(engine._forward(batch, bool(last)))
    ours: dict[str, Any]
    ours = {name: safe_get_full_grad(p) for name, p in module.named_parameters()}
    assert ours.keys() == exact.keys()
    return max(relative(ours[name], exact[name]) for name in exact)


def gradient_differences(config: dict[str, Any]) -> dict[str, float]:
    """Return them by case, each with and without recomputation; and without our own hooks."""
    found = {
        f"{case}{', recomputed' if recomputes else ''}": gradient_difference(
            case, recomputes, config
        )
        for case in ("by document", "shared", "unused")
        for recomputes in (False, True)
    }
    with mock.patch.object(engine_module, "reduce_leaves_once"):
        try:
            found["control"] = gradient_difference("by document", False, config)
        except AssertionError:  # DeepSpeed 0.19.8 finds a gradient twice in a bucket
            found["control"] = math.inf
    return found


def verdicts(config: dict[str, Any]) -> list[str]:
    """Return why the model attends by itself on each rank, where only rank 1's kernel is wrong."""
    wrong = with_backend(no_boundaries) if dist.rank() == 1 else nullcontext()
    with wrong:
        module = _made("right")
        _sharded(module, config)
        proof = prove_packing(module, seq_len=64, one_document=False, seed=0)
    return dist.gather(proof.by_itself)
