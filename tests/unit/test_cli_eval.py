"""`packhorse eval`, `compare` and `export --best`: what they refuse, and with which message."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from packhorse.trainer import dist
from packhorse.trainer.cli import eval as cli_eval
from packhorse.trainer.cli import main
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.datatypes import BadInput
from tests.ranks import ROOT

DEBUG = "recipes/debug.yaml"


@pytest.fixture
def refused(monkeypatch, capsys):
    """Return a function that runs the command in this process and returns its error line."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(dist, "start_logging", lambda: None)  # it lasts longer than a test

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["packhorse", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.main()
        err = capsys.readouterr().err
        assert ended.value.code == 2, err
        assert err.startswith("packhorse: error: ")
        assert err.count("\n") == 1
        return err

    return run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Make a run folder without checkpoints."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(load_recipe(ROOT / DEBUG).to_yaml())
    return folder


def test_what_cannot_be_evaluated_is_told(refused, tmp_path, run_dir):
    assert "RUN_OR_MODEL: there is no folder" in refused("eval", "./nowhere", DEBUG)
    assert "RUN_OR_MODEL: there is no folder" in refused("eval", str(tmp_path / "nowhere"), DEBUG)
    (tmp_path / "empty").mkdir()
    assert "neither a run folder" in refused("eval", str(tmp_path / "empty"), DEBUG)
    assert "there are no held-out rows" in refused("eval", str(run_dir), DEBUG, "data.eval=[]")
    assert "there is no checkpoint yet" in refused("eval", str(run_dir), DEBUG)
    assert "there is no checkpoint of step 3; there is none at all" in refused(
        "eval", str(run_dir), DEBUG, "--step", "3"
    )
    assert "--best and --step: give one of them" in refused(
        "eval", str(run_dir), DEBUG, "--step", "3", "--best"
    )
    assert "its recipe has no eval.best" in refused("eval", str(run_dir), DEBUG, "--best")
    assert "this is no run folder" in refused("eval", "recipes/debug/model", DEBUG, "--step", "3")
    assert "--ema takes a run's averages" in refused("eval", "recipes/debug/model", DEBUG, "--ema")
    universal = ("export", str(run_dir), "--out", str(tmp_path / "out"), "--universal", "--ema")
    assert "--ema: a universal checkpoint is the training state" in refused(*universal)
    assert not list(run_dir.glob("evals/*/exported"))


def test_results_are_not_written_over_what_is_something_else(refused, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    said = refused("eval", "recipes/debug/model", DEBUG, "--out", str(tmp_path / "thesis"))
    assert "exists and holds no results of packhorse eval" in said
    assert (tmp_path / "thesis" / "thesis.tex").exists()


def test_the_same_evaluation_replaces_its_results_and_another_one_does_not(tmp_path):
    out = tmp_path / "results"
    cli_eval._start_results(out, "runs/a", 3)
    (out / "samples.jsonl").write_text("{}")
    for model, step in (("runs/b", 3), ("runs/a", 4)):
        with pytest.raises(BadInput, match="holds the results of runs/a at step 3; give another"):
            cli_eval._start_results(out, model, step)
    assert (out / "samples.jsonl").exists()
    cli_eval._start_results(out, "./runs/a/", 3)
    assert [path.name for path in out.iterdir()] == ["evaluated.json"]


def test_results_are_not_written_through_a_link(tmp_path):
    cli_eval._start_results(tmp_path / "results", "runs/a", 3)
    (tmp_path / "link").symlink_to("results")
    with pytest.raises(BadInput, match="holds no results"):
        cli_eval._start_results(tmp_path / "link", "runs/a", 3)
    assert (tmp_path / "results" / "evaluated.json").exists()


def test_an_export_leaves_the_run_and_the_base_model_alone(refused, tmp_path):
    base = tmp_path / "models" / "base"
    shutil.copytree(ROOT / "recipes" / "debug" / "model", base)
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(load_recipe(ROOT / DEBUG, [f"model.name={base}"]).to_yaml())
    (tmp_path / "link").symlink_to(base)
    before = sorted(tmp_path.rglob("*"))

    def said(out: Path, *more: str) -> str:
        return refused("export", str(run), "--out", str(out), "--overwrite", *more)

    for own in (base, base.parent, tmp_path / "link"):
        assert "is or holds the base model's folder" in said(own)
    assert "lies in the base model's folder" in said(base / "tuned")
    for own in (run, run.parent, run / "checkpoints" / ".." / ".." / "mine"):
        assert "is or holds the run folder" in said(own)
    for part in ("checkpoints/step-000009", "model", "serving/x", "evals/x", "sub/../checkpoints"):
        assert "the run uses this part of its folder" in said(run / part)
        assert "the run uses this part of its folder" in said(run / part, "--universal")
    assert "there is no whole checkpoint to export" in said(run / "export"), "a place of its own"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_tasks_that_is_not_there_is_told(refused, tmp_path):
    tasks = ("eval.lm_eval=[nowhere/gsm8k]",)
    said = refused("eval", "recipes/debug/model", DEBUG, *tasks, "--out", str(tmp_path / "out"))
    assert "eval.lm_eval: there is no folder nowhere" in said
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_as_the_best_is_told(refused, run_dir):
    out = ("--out", str(run_dir / "out"))
    assert "its recipe has no eval.best" in refused("export", str(run_dir), "--best", *out)
    assert "give one of them" in refused("export", str(run_dir), "--best", "--step", "3", *out)
    assert "no checkpoint of step 3" in refused("export", str(run_dir), "--step", "3", *out)
    rule = load_recipe(run_dir / "recipe.yaml", ["eval.best={metric: eval_loss}"])
    (run_dir / "recipe.yaml").write_text(rule.to_yaml())
    assert "there is no best checkpoint: no step was evaluated yet" in refused(
        "export", str(run_dir), "--best", *out
    )
    (run_dir / "evaluations.jsonl").write_text(
        json.dumps({"step": 7, "eval_loss": 1.0, "metrics": {}}) + "\n"
    )
    assert "there is no checkpoint of step 7" in refused("export", str(run_dir), "--best", *out)


def test_what_cannot_be_compared_is_told(refused, run_dir):
    assert "nothing was evaluated there" in refused("compare", str(run_dir), str(run_dir))
    assert "there is no such folder" in refused("compare", "nowhere", str(run_dir))
