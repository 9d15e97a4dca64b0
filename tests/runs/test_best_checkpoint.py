"""Runs keep their best checkpoint: it is the right one, and pruning, stops and rollbacks spare it.

Then `packhorse export --best`, `packhorse eval` and `packhorse compare` use it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from packhorse.trainer.checkpoint import checkpoint
from packhorse.trainer.checkpoint.best import best_step, evaluations
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.eval.compare import difference, read_results
from packhorse.trainer.report.runs import read_run
from packhorse.trainer.utils.json_lines import read_json_lines
from tests.ranks import ROOT, run_ranks

pytestmark = pytest.mark.runs

# The loss falls at every step: what a condition leaves out is the later ones, so that the best one
# has to be spared.
RULE = "eval.best={metric: eval_loss, subject_to: {eval_loss: '> 4.5'}, tie: answer_accuracy}"
BEST = 3
FIRST = "eval.best={metric: eval_loss, subject_to: {eval_loss: '> 5.5'}}"
NEVER = "eval.best={metric: eval_loss, subject_to: {eval_loss: '> 100'}}"
# no answer of a random model is right, so that the first evaluation stays the best
EARLY = "eval.early_stopping={metric: answer_accuracy, patience: 2}"
OFTEN = ("train.steps=6", "eval.every_steps=1", "eval.generate.max_new_tokens=8")


def case(root: Path, name: str, *overrides: str, **extra: Any) -> dict[str, Any]:
    common = (
        *OFTEN,
        "checkpoint.every_steps=null",
        "checkpoint.keep=1",
        f"data.cache={root / 'cache'}",
    )
    recipe = str(ROOT / "recipes" / "debug.yaml")
    return {
        "run": str(root / name),
        "recipe": recipe,
        "overrides": [*common, RULE, *overrides],
        **extra,
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on two ranks: without a stop; stopped on the way; with no best step; and rolled back.

    The last one's third step sends it back to its best step, the first. So it trains and evaluates
    the second step again.
    """
    root = tmp_path_factory.mktemp("best")
    cases = [
        case(root, "whole"),
        case(root, "stopped", stop_after=4),
        case(root, "stopped"),
        case(root, "never", NEVER),
        case(root, "early", EARLY),
        case(root, "early", EARLY),  # a second start, which finds the run done
        case(root, "back", FIRST, "guard.non_finite=rollback", changes=["nan_in_the_third_step"]),
    ]
    path = root / "cases.json"
    path.write_text(json.dumps(cases))
    run_ranks(2, ["-m", "tests.numerics.cases", str(path)])
    return root


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def packhorse(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "packhorse", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


# ----------------------------------------------------------------------------------- while training


def test_the_best_step_is_saved_even_where_no_save_is_due_and_pruning_spares_it(root: Path) -> None:
    losses = {step: line["eval_loss"] for step, line in evaluations(root / "whole").items()}
    assert list(losses) == [0, 1, 2, 3, 4, 5, 6]
    assert losses[BEST] > 4.5 > losses[BEST + 1], (
        "the rule of this test picks the step no more: choose another bound"
    )
    assert names(root / "whole") == ["best", "latest", "step-000003", "step-000006"]
    assert (root / "whole" / "checkpoints" / "best").read_text() == "step-000003"


def test_the_run_folder_names_the_best_step_and_why(root: Path) -> None:
    report = json.loads((root / "whole" / "best.json").read_text())
    assert report["step"] == best_step(root / "whole") == BEST
    assert [c["step"] for c in report["candidates"]] == [1, 2, 3, 4, 5, 6]
    assert [c["meets"] for c in report["candidates"]] == [True] * 3 + [False] * 3
    best = json.loads((root / "whole" / "summary.json").read_text())["best"]
    assert best["step"] == BEST
    assert best["rule"] == "the lowest eval_loss with eval_loss > 4.5, ties by answer_accuracy"
    assert set(best["metrics"]) == {"eval_loss", "answer_accuracy", "format_accuracy"}


def test_a_stopped_run_has_the_best_step_of_one_that_was_never_stopped(root: Path) -> None:
    assert json.loads((root / "stopped" / "best.json").read_text())["step"] == BEST
    assert names(root / "stopped") == names(root / "whole")
    whole, stopped = (evaluations(root / name) for name in ("whole", "stopped"))
    assert whole == stopped


def test_no_step_is_kept_where_none_meets_the_conditions(root: Path) -> None:
    assert names(root / "never") == ["latest", "step-000006"]
    best = json.loads((root / "never" / "summary.json").read_text())["best"]
    assert best["step"] is None
    assert "not > 100" in best["why"]


def test_a_run_whose_evaluations_do_not_improve_ends_early(root: Path) -> None:
    assert list(evaluations(root / "early")) == [0, 1, 2, 3]
    assert "step-000003" in names(root / "early")
    assert json.loads((root / "early" / "summary.json").read_text())["steps"] == 3
    steps = [line["step"] for line in read_json_lines(root / "early" / "metrics.jsonl")]
    assert max(steps) == 3
    assert read_run(root / "early").state == "done"


def test_evaluations_of_steps_that_are_trained_again_do_not_count(root: Path) -> None:
    """The third step sends the run back to step 1: the evaluation of step 2 is made again, and
    stands there once.
    """
    assert [line["step"] for line in read_json_lines(root / "back" / "evaluations.jsonl")] == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert [line["step"] for line in read_json_lines(root / "back" / "skipped_steps.jsonl")] == [3]
    assert names(root / "back") == ["best", "latest", "step-000001", "step-000006"]


# --------------------------------------------------------------------------------------- afterwards


@pytest.fixture(scope="module")
def exported(root: Path) -> Path:
    done = packhorse("export", str(root / "whole"), "--out", str(root / "best-model"), "--best")
    assert done.returncode == 0, done.stderr
    return root / "best-model"


def test_the_best_is_exported_and_the_card_says_by_which_rule(root: Path, exported: Path) -> None:
    saved, manifest = checkpoint.open_checkpoint(root / "whole", BEST)
    assert manifest.state.step == BEST
    for name, parameter in AutoModelForCausalLM.from_pretrained(exported).named_parameters():
        assert torch.equal(parameter, saved.whole(name)), name
    card = (exported / "README.md").read_text()
    assert (
        "Step 3 is the best of 6 evaluated ones: the lowest eval_loss with eval_loss > 4.5" in card
    )
    loss = evaluations(root / "whole")[BEST]["eval_loss"]
    assert f"| {loss:.4f} |" in card


def test_a_damaged_best_checkpoint_is_refused_and_not_replaced_by_another(
    root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root / "whole", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "step-000003").glob("rank*"):
        path.write_bytes(path.read_bytes()[:-1])
    done = packhorse("export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--best")
    assert done.returncode == 2
    assert "step-000003 cannot be used" in done.stderr
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000003")
    done = packhorse("export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--best")
    assert done.returncode == 2
    assert "no checkpoint of step 3; there are: 6" in done.stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadInput, match=r"there is no best checkpoint: .*step 6: eval_loss is"):
        best_step(root / "never")


def test_an_evaluation_that_is_stopped_ends_with_75_and_leaves_no_weights(root: Path) -> None:
    out = root / "stopped-results"
    changes = (*OFTEN, f"data.cache={root / 'cache'}")
    command = [
        "eval",
        str(root / "whole"),
        "recipes/debug.yaml",
        "--out",
        str(out),
        "--nproc",
        "2",
        *changes,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "packhorse", *command], cwd=ROOT, stderr=subprocess.PIPE
    )
    end = time.monotonic() + 300
    while not (out / "recipe.yaml").exists():  # it is written just before the workers start
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 75, err
    assert not (out / "exported").exists()


@pytest.fixture(scope="module")
def evaluated(root: Path) -> Path:
    """The best checkpoint, scored again by two processes."""
    changes = (*OFTEN, f"data.cache={root / 'cache'}")
    done = packhorse(
        "eval", str(root / "whole"), "recipes/debug.yaml", "--best", "--nproc", "2", *changes
    )
    assert done.returncode == 0, done.stderr
    assert "eval_loss" in done.stdout
    assert "format_accuracy" in done.stdout
    return root / "whole" / "evals" / "debug-step-000003"


def test_a_checkpoint_is_scored_as_it_was_in_training(root: Path, evaluated: Path) -> None:
    then, now = evaluations(root / "whole")[BEST], evaluations(evaluated)[BEST]
    assert now["eval_loss"] == pytest.approx(then["eval_loss"], rel=1e-6)
    assert now["metrics"] == then["metrics"]
    given = [
        line for line in read_json_lines(root / "whole" / "samples.jsonl") if line["step"] == BEST
    ]
    assert read_json_lines(evaluated / "samples.jsonl") == given
    assert not (evaluated / "exported").exists(), "the weights were for the evaluation alone"


def test_an_export_is_scored_as_its_checkpoint_whole_and_on_one_process(
    root: Path, exported: Path, evaluated: Path
) -> None:
    """It runs at ZeRO stage 2, which shards nothing without an optimizer; the other at stage 3."""
    changes = (*OFTEN, f"data.cache={root / 'cache'}", "parallel.deepspeed=zero2")
    out = root / "results"
    done = packhorse(
        "eval", str(exported), "recipes/debug.yaml", "--out", str(out), "--nproc", "1", *changes
    )
    assert done.returncode == 0, done.stderr
    a, b = read_results(str(evaluated)), read_results(str(out))
    assert b.step == 0
    assert b.eval_loss == pytest.approx(a.eval_loss, rel=1e-6)
    found = difference(a, b, "format_accuracy")
    assert found
    assert (found[0].value, found[0].p) == (0, 1)
    done = packhorse("compare", f"{root / 'whole'}@best", str(out))
    assert done.returncode == 0, done.stderr
    assert "format_accuracy" in done.stdout
    assert "+0.000" in done.stdout
