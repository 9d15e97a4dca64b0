"""Each parameter group is updated at its own learning rate, before and after a resume."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import LossSection, ModelSection, OptimSection, ParallelSection
from packhorse.trainer.engine.ds_config import deepspeed_config
from packhorse.trainer.engine.engine import Engine, gathered, sharded_init
from packhorse.trainer.engine.sharded_state import File, Shards, write
from packhorse.trainer.metrics import Clock
from packhorse.trainer.model.logit_transform import LogitTransform
from packhorse.trainer.model.sft import SftModel
from tests.model_helpers import SIZES, documents, pack
from tests.ranks import run_ranks

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload_optimizer")
RATES = {"layers.0": 1e-2, "others": 1e-3}  # of the groups of `build` at the schedule's peak


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("groups")
    run_ranks(1, ["-m", "tests.numerics.test_parameter_groups", str(out)])
    return json.loads((out / "outcomes.json").read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_moves_each_group_by_its_own_rate(outcomes: dict[str, Any], stage: str) -> None:
    """AdamW's first update without decay is +-lr for every weight that has a gradient."""
    assert outcomes[stage]["largest_move"] == pytest.approx(RATES, rel=1e-2)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resume_keeps_each_groups_rate(outcomes: dict[str, Any], stage: str) -> None:
    seen = outcomes[stage]
    assert seen["rates"] == seen["resumed_rates"] == pytest.approx(list(RATES.values()))
    assert seen["weights"] == seen["resumed_weights"]


def test_zero_3_has_hooks_at_a_small_models_layers_and_not_at_their_modules(
    outcomes: dict[str, Any],
) -> None:
    layers = [f"layers.{i}" for i in range(SIZES["num_hidden_layers"])]
    hooked = outcomes["zero3"]["hooked"]
    assert [name for name in hooked if name.startswith("layers.")] == layers
    assert "embed_tokens" in hooked, "the control: DeepSpeed has hooks"
    assert not outcomes["zero2"]["hooked"]


def main(out: Path) -> None:
    """At each stage: a step, a checkpoint, another step; and that step after a resume."""
    torch.set_num_threads(1)
    outcomes = {}
    with dist.process_group():
        for name in STAGES:
            engine = build(name, out)
            before = weights(engine)
            take_step(engine)
            after = weights(engine)
            moves = {name: (after[name] - before[name]).abs().max() for name in before}
            shards = save(engine, out / name)
            take_step(engine)
            resumed = build(name, out)
            resumed.state.restore(shards, updates=1)
            take_step(resumed)
            outcomes[name] = {
                "largest_move": {
                    "layers.0": float(max(moves[n] for n in moves if "layers.0." in n)),
                    "others": float(max(moves[n] for n in moves if "layers.0." not in n)),
                },
                "hooked": hooked(engine),
                "rates": [group["lr"] for group in engine.hyperparameters()],
                "resumed_rates": [group["lr"] for group in resumed.hyperparameters()],
                "weights": {name: float(w.double().sum()) for name, w in weights(engine).items()},
                "resumed_weights": {
                    name: float(w.double().sum()) for name, w in weights(resumed).items()
                },
            }
    (out / "outcomes.json").write_text(json.dumps(outcomes))


def build(template: str, folder: Path) -> Engine:
    """Return a random Llama in two groups, of which the first layer's has ten times the rate."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from packhorse.trainer.model import attention
    from packhorse.trainer.model.new_weights import initialise

    optim = OptimSection(lr=1e-3, weight_decay=0.0, max_grad_norm=1e6)
    config = deepspeed_config(
        ParallelSection(deepspeed=template),
        ModelSection(name="x", dtype="float32"),
        optim,
        SIZES["hidden_size"],
        folder,
    )
    with sharded_init(config):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**SIZES), attn_implementation=attention.implementation("reference")
        )
        initialise(model, 0, gathered)
    module = SftModel(model, LossSection(), 0, dist.device())
    module.transform = LogitTransform()
    fast = [p for name, p in module.named_parameters() if "layers.0." in name]
    slow = [p for name, p in module.named_parameters() if "layers.0." not in name]
    groups = [
        {"params": fast, "kind": "adamw", "weight_decay": 0.0, "lr_scale": 10.0},
        {"params": slow, "kind": "adamw", "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    return Engine(module, groups, optim, config)


def hooked(engine: Engine) -> list[str]:
    """Return the decoder's modules that call DeepSpeed before their forward."""
    parts = engine.module.model.model.named_modules()
    calls = {
        name: [hook.__qualname__ for hook in part._forward_pre_hooks.values()]
        for name, part in parts
    }
    return [name for name in calls if any("DeepSpeed" in call for call in calls[name])]


def take_step(engine: Engine) -> None:
    batch = pack(documents([9, 5]), [list(range(8)), [1]], [0.1, 0.2])
    engine.step([batch], 1e-3, Clock(dist.device()))


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Return the weights by name; in float32 they are the optimizer's own."""
    parameters = dict(engine.module.named_parameters())
    with gathered(parameters.values()):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def save(engine: Engine, folder: Path) -> Shards:
    folder.mkdir()
    files: dict[str, File] = {}
    for i, group in enumerate(engine.state.slices()):
        files[f"{i}.safetensors"], _ = write(folder / f"{i}.safetensors", group)
    return Shards(folder, files, engine.state.shapes())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed leaves threads behind that now and then abort a process at its very end
