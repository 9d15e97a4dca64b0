"""Experts, a hybrid and a model with towers learn the same with each optimizer (X2, X4, X7).

Two ranks at stage 3 hand over to one at stage 2, and equal one rank at stage 0. Tiny models, four
steps. AdamW on every architecture is in tests/models.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from packhorse.trainer.checkpoint.hf_export import export
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.model.load import load_model, load_tokenizer, model_class
from packhorse.trainer.model.lora import merged_weights
from tests.model_helpers import relative
from tests.models.shrunk import config_of
from tests.numerics.compare import Run, case, difference, is_same, report, run_cases
from tests.numerics.test_optimizers import CHOSEN, agrees
from tests.ranks import ROOT
from tests.runs.test_export_kinds import make_gemma

pytestmark = pytest.mark.runs

COMMON = ("train.steps=4", "batch.seq_len=128", "model.init=pretrained", "optim.weight_decay=0.5")
FAMILIES = {
    "experts": ("gpt_oss", {}),
    "sparse": ("gpt_oss", {"num_local_experts": 32}),  # a step's tokens leave some of them idle
    "hybrid": ("lfm2", {}),
    "towers": ("gemma3", {}),
    "mixture": ("qwen3_moe", {"moe_intermediate_size": 64}),  # rows of whole blocks
}
# Adapters on experts, and experts in 4 and 8 bits: gpt-oss's have biases, and inputs first. With
# the stages at which two ranks run them.
ADAPTERS = {
    "adapter": (
        "experts",
        "target_parameters: all-experts, trainable_token_indices: [4, 223]",
        ("zero1", "zero2"),
    ),
    "nf4": (
        "experts",
        "target_parameters: all-experts, base: nf4_double_quant",
        ("zero1", "zero3"),
    ),
    "frozen-nf4": ("mixture", "base: nf4", ("zero2", "zero3")),
    "int8": ("mixture", "target_parameters: [experts.down_proj], base: int8", ("zero3",)),
}
CASES = [
    *((family, kind) for family in ("experts", "hybrid", "towers") for kind in CHOSEN),
    ("sparse", "lion"),
]
CONTROLS = (
    *(("sparse", "stale_expert_gradients"), ("experts", "decay_everywhere")),
    ("towers", "towers_trained"),
)


def make(folder: Path, model_type: str, sizes: dict[str, Any]) -> None:
    shutil.copytree(ROOT / "recipes" / "debug" / "model", folder)
    torch.manual_seed(0)
    if model_type == "gemma3":
        make_gemma(folder)
    else:
        config = config_of(model_type)
        config.update(sizes)
        model_class(config).from_config(config, dtype=torch.float32).save_pretrained(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for family, (model_type, sizes) in FAMILIES.items():
        make(root / "models" / family, model_type, sizes)
    return root


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Run]:
    one: list[dict[str, Any]] = []
    two: list[dict[str, Any]] = []
    for family, kind in CASES:
        keys = [*COMMON, f"model.name={root / 'models' / family}"]
        keys += [key for key in CHOSEN[kind] if "optim.groups" not in key]
        one.append(case(root, f"{family}-{kind}-1", "zero0", *keys))
        moved = case(root, f"{family}-{kind}-moved", "zero3", *keys)
        two.append({**moved, "stop_after": 2})
        one.append(case(root, f"{family}-{kind}-moved", "zero2", *keys))
    for family, control in CONTROLS:
        keys = [*COMMON, f"model.name={root / 'models' / family}", *CHOSEN["lion"]]
        # stage 2 has a gradient of zero, and decay, where stage 0 has none
        stage = "zero2" if family == "towers" else "zero0"
        one.append(case(root, f"{family}-{control}", stage, *keys, changes=[control]))
    for name, (family, adapter, stages) in ADAPTERS.items():
        keys = [*COMMON, f"model.name={root / 'models' / family}", "optim.lr=1e-2"]
        keys.append(f"adapter={{rank: 4, target_modules: [q_proj], {adapter}}}")
        one.append(case(root, f"{name}-1", "zero0", *keys))
        two += [case(root, f"{name}-{stage}", stage, *keys) for stage in stages]
        moved = case(root, f"{name}-moved", "zero3", *keys)
        two.append({**moved, "stop_after": 2})
        one.append(case(root, f"{name}-moved", "zero2", *keys))
        if name == "nf4":
            resumed = case(root, "nf4-resumed", "zero3", *keys)
            two += [{**resumed, "stop_after": 2}, resumed]
            recomputed = (*keys, "model.activation_checkpointing=selective")
            two.append(case(root, "nf4-recomputed", "zero3", *recomputed))
            one.append(case(root, "nf4-unpacked", "zero0", *keys, changes=["experts_unpacked"]))
    return run_cases({2: two}, {1: one})


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_worlds_stages_and_resumes_change_nothing(
    runs: dict[str, Run], family: str, kind: str
) -> None:
    seen = difference(runs[f"{family}-{kind}-1"], runs[f"{family}-{kind}-moved"])
    report(f"{family}, {kind}, resumed by another world and stage", seen)
    assert agrees(kind, seen)


@pytest.mark.parametrize(("family", "control"), CONTROLS)
def test_controls_are_caught(runs: dict[str, Run], family: str, control: str) -> None:
    plain, changed = runs[f"{family}-lion-1"], runs[f"{family}-{control}"]
    if control == "towers_trained":
        assert not any("vision" in name for name in plain.changes)
        assert any("vision" in n and c.norm() > 0 for n, c in changed.changes.items())
        return
    seen = difference(plain, changed)
    report(f"{family}, control {control}", seen)
    assert seen.is_caught


@pytest.mark.parametrize(
    ("name", "other"),
    [(name, other) for name in ADAPTERS for other in (*ADAPTERS[name][2], "moved")]
    + [("nf4", "recomputed")],
)
def test_an_adapter_of_experts_learns_the_same_everywhere(
    runs: dict[str, Run], name: str, other: str
) -> None:
    seen = difference(runs[f"{name}-1"], runs[f"{name}-{other}"])
    report(f"adapter of experts, {name}, {other}", seen)
    assert seen.agrees
    experts = [part for part in runs[f"{name}-1"].changes if "experts.lora_B" in part]
    assert bool(experts) == ("target_parameters" in ADAPTERS[name][1])


def test_x3_packed_experts_resume_bit_by_bit(runs: dict[str, Run]) -> None:
    assert is_same(runs["nf4-zero3"], runs["nf4-resumed"])


def test_control_experts_that_are_not_packed_are_caught(runs: dict[str, Run]) -> None:
    seen = difference(runs["nf4-1"], runs["nf4-unpacked"])
    report("control, experts not packed", seen)
    assert seen.is_caught


@pytest.mark.parametrize("name", ["adapter", "nf4", "int8"])
def test_an_adapter_of_experts_is_exported(runs: dict[str, Run], root: Path, name: str) -> None:
    """Merged, and alone: on the base that it was trained on, peft's own code gives its logits."""
    run = runs[f"{name}-moved"].folder
    # the export itself compares the logits of what it wrote
    merged, alone = (export(run, root / f"{name}-{m}", merge=m) for m in (True, False))
    if name == "adapter":
        before, after = (
            load_file(folder / "model.safetensors") for folder in (root / "models/experts", merged)
        )
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert {re.sub(r"^model\.(layers\.\d+\.)?", "", name) for name in moved} == {
            *("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.q_proj.weight"),
            "embed_tokens.weight",
        }
    recipe = load_recipe(run / "recipe.yaml")
    assert recipe.adapter
    model = load_model(recipe.model, load_tokenizer(recipe.model), seed=0, adapter=recipe.adapter)
    base, whole = (AutoModelForCausalLM.from_pretrained(f) for f in (recipe.model.name, merged))
    base.load_state_dict(dict(merged_weights(model)))  # B is zero
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        expected, found = (
            m.eval()(input_ids=ids, use_cache=False).logits
            for m in (whole, PeftModel.from_pretrained(base, str(alone)))
        )
    assert relative(found, expected) < 1e-5
