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
from safetensors.torch import load_file

from packhorse.trainer.checkpoint.hf_export import export
from packhorse.trainer.model.load import model_class
from tests.models.shrunk import config_of
from tests.numerics.compare import Run, case, difference, report, run_cases
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
    adapted = (
        *(*COMMON, f"model.name={root / 'models' / 'experts'}", "optim.lr=1e-2"),
        "adapter={rank: 4, target_parameters: all-experts, target_modules: [q_proj], "
        "trainable_token_indices: [4, 223]}",
    )
    one.append(case(root, "adapter-1", "zero0", *adapted))
    two += [case(root, f"adapter-{stage}", stage, *adapted) for stage in ("zero1", "zero2")]
    moved = case(root, "adapter-moved", "zero3", *adapted)
    two.append({**moved, "stop_after": 2})
    one.append(case(root, "adapter-moved", "zero2", *adapted))
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


@pytest.mark.parametrize("other", ["zero1", "zero2", "moved"])
def test_an_adapter_of_experts_learns_the_same_everywhere(runs: dict[str, Run], other: str) -> None:
    seen = difference(runs["adapter-1"], runs[f"adapter-{other}"])
    report(f"adapter of experts, {other}", seen)
    assert seen.agrees
    for part in ("experts.lora_B", "embed_tokens.trainable_tokens_delta"):
        assert any(part in name for name in runs["adapter-1"].changes)


@pytest.mark.parametrize("merge", [True, False])
def test_an_adapter_of_experts_is_exported(runs: dict[str, Run], root: Path, merge: bool) -> None:
    """The export itself compares the logits of what it wrote."""
    out = export(runs["adapter-moved"].folder, root / f"out-{merge}", merge=merge)
    if merge:
        before = load_file(root / "models" / "experts" / "model.safetensors")
        after = load_file(out / "model.safetensors")
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert {re.sub(r"^model\.(layers\.\d+\.)?", "", name) for name in moved} == {
            *("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.q_proj.weight"),
            "embed_tokens.weight",
        }
