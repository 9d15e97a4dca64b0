"""An exported run loads into transformers, and a second run starts from it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from packhorse.trainer.checkpoint.checkpoint import open_checkpoint
from packhorse.trainer.checkpoint.hf_export import export
from packhorse.trainer.checkpoint.model_card import model_card
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
    assert "was given `enable_thinking=False`" in model_card(tmp_path, recipe, 3, False)
    assert "was given" not in model_card(
        tmp_path, load_recipe(ROOT / "recipes" / "debug.yaml"), 3, False
    )


def test_the_export_leaves_no_other_files(exported: Path) -> None:
    assert not list(exported.parent.glob(".*saving*"))


def command(*arguments: str | Path, umask: int = 0o022) -> subprocess.CompletedProcess[str]:
    """Run `packhorse export`."""
    return subprocess.run(
        [sys.executable, "-m", "packhorse", "export", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        umask=umask,
    )


def test_the_command_says_what_it_exported_and_replaces_it_only_if_asked(
    run_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = command(run_dir, "--out", out, umask=0o027)
    assert (first.returncode, first.stdout) == (0, f"{out}\n"), first.stderr
    assert (
        f"exporting step 3 of {run_dir}: the last one; which is best is not known" in first.stderr
    )
    assert re.search(r"compared: all \d+ weights are bit by bit the trained", first.stderr)
    assert f"exported step 3 to {out}" in first.stderr
    assert {oct(path.stat().st_mode & 0o777) for path in out.iterdir()} == {"0o640"}
    assert oct(out.stat().st_mode & 0o777) == "0o750"

    second = command(run_dir, "--out", out)
    assert second.returncode == 2
    assert "holds the model of step 3 of run; give another --out, or --overwrite" in second.stderr
    third = command(run_dir, "--out", out, "--overwrite")
    assert third.returncode == 0, third.stderr
    assert f"it replaces the model of step 3 of run in {out}" in third.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_base_model_is_never_replaced(run_dir: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(ROOT / "recipes" / "debug" / "model", base)
    for more in ((), ("--overwrite",), ("--universal", "--overwrite")):
        done = command(run_dir, "--out", base, *more)
        assert done.returncode == 2
        assert "packhorse export did not write it; give another --out, or rem" in done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["base", *(path.name for path in (ROOT / "recipes" / "debug" / "model").iterdir())]
    )


def test_every_file_of_a_run_has_the_mode_that_the_umask_says(run_dir: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    others = [path for path in files if path.stat().st_mode & 0o777 != 0o666 & ~umask]
    assert not others


def test_chat_answers_as_the_export_does(run_dir: Path, exported: Path) -> None:
    question = "How many eggs are in 3 boxes with 4 eggs each?"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model: Any = AutoModelForCausalLM.from_pretrained(exported)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0]
    answer = tokenizer.decode(out[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    done = subprocess.run(
        [sys.executable, "-m", "packhorse", "chat", str(run_dir), "--max-tokens", "16"],
        cwd=ROOT,
        input=question,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, f"{answer}\n"), done.stderr


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


def test_a_description_that_was_altered_is_not_exported(run_dir: Path, tmp_path: Path) -> None:
    altered = tmp_path / "altered"
    shutil.copytree(run_dir, altered)
    tokenizer = altered / "model" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("the", "teh", 1))
    with pytest.raises(BadInput, match=r"not as the run wrote it: tokenizer\.json"):
        export(altered, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a run folder"):
        export(tmp_path, tmp_path / "out")
