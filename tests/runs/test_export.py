"""An exported run loads into transformers, and a second run starts from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from packhorse.trainer.checkpoint.checkpoint import open_checkpoint
from packhorse.trainer.checkpoint.hf_export import _model_card, export
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.datatypes import BadInput
from tests.ranks import ROOT, run_ranks

pytestmark = pytest.mark.runs

SHORT = ("train.steps=3", "eval.generate=null", "eval.every_steps=null")


def train(world: int, root: Path, name: str, *overrides: str) -> Path:
    """Train a short debug run on `world` ranks; return its folder."""
    case = {
        "run": str(root / name),
        "recipe": str(ROOT / "recipes" / "debug.yaml"),
        "overrides": [*SHORT, f"data.cache={root / 'cache'}", *overrides],
    }
    path = root / f"{name}.json"
    path.write_text(json.dumps([case]))
    run_ranks(world, ["-m", "tests.numerics.cases", str(path)])
    return root / name


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(2, tmp_path_factory.mktemp("export"), "run", "run.profile_steps=[2, 2]")


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    return export(run_dir, run_dir.parent / "out")


def test_the_weights_are_the_checkpoints(run_dir: Path, exported: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported)
    saved, _ = open_checkpoint(run_dir)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved.whole(name)), name


def test_the_export_holds_what_generation_needs(exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    trained = load_recipe(ROOT / "recipes" / "debug.yaml").model.name
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(ROOT / trained).chat_template
    stops = GenerationConfig.from_pretrained(exported).eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (
        stops if isinstance(stops, list) else [stops]
    )
    card = (exported / "README.md").read_text()
    assert "3 steps" in card
    assert "eval_loss" in card


def test_the_card_says_what_the_chat_template_was_given(tmp_path: Path) -> None:
    recipe = load_recipe(
        ROOT / "recipes" / "debug.yaml", ["data.chat_template_kwargs.enable_thinking=false"]
    )
    assert "was given `enable_thinking=False`" in _model_card(tmp_path, recipe, 3, False)
    assert "was given" not in _model_card(
        tmp_path, load_recipe(ROOT / "recipes" / "debug.yaml"), 3, False
    )


def test_the_export_leaves_no_other_files(exported: Path) -> None:
    assert not list(exported.parent.glob(".*saving*"))


def test_a_second_run_starts_from_the_export(run_dir: Path, exported: Path) -> None:
    second = train(1, run_dir.parent, "second", f"model.name={exported}", "model.init=pretrained")
    before = json.loads((second / "summary.json").read_text())["before"]["eval/loss"]
    after = json.loads((run_dir / "summary.json").read_text())["after"]["eval/loss"]
    assert before == pytest.approx(after, rel=1e-5)


def test_the_profile_is_a_trace(run_dir: Path) -> None:
    (trace,) = (run_dir / "profile").glob("*.json")
    assert any(
        "backward" in event.get("name", "")
        for event in json.loads(trace.read_text())["traceEvents"]
    )


def test_a_damaged_run_is_not_exported(run_dir: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(run_dir, damaged)
    for path in damaged.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadInput, match="can be used"):
        export(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["no run", "a folder in the way"])
def test_bad_input_is_named(run_dir: Path, tmp_path: Path, what: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(
        BadInput, match="not a run folder" if what == "no run" else "not a model folder"
    ):
        export(tmp_path if what == "no run" else run_dir, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").exists()
