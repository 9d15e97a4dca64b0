"""A line or file of a run that holds other values than were written is damaged, and said to be."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from packhorse.trainer.checkpoint.best import best_step, early_end, evaluations
from packhorse.trainer.cli.runs import _cells
from packhorse.trainer.config.best import EarlyStoppingSection
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.eval.compare import read_results, table_of_two
from packhorse.trainer.report import page
from packhorse.trainer.report.runs import read_run
from packhorse.trainer.run_folder import describe_end
from packhorse.trainer.utils.json_lines import cut_json_lines, read_json_lines
from packhorse.trainer.utils.log_lines import LOGS, check_evaluation

METRIC = {"value": 0.5, "count": 2, "low": 0.1, "high": 0.9}
SAMPLE = {"step": 2, "prompt": "2+2?", "answer": "4", "reference": "4", "scores": {"right": 1.0}}
EVALUATION = {"step": 2, "eval_loss": 1.5, "losses": {"a": 1.5}, "metrics": {"right": METRIC}}
GOOD: dict[str, Any] = {
    "metrics.jsonl": {"step": 2, "train/loss": 1.5, "perf/tokens_per_s": 9},
    "evaluations.jsonl": EVALUATION | {"held_out": "0", "tokenizer": "1"},
    "samples.jsonl": SAMPLE,
    "trace.jsonl": {"step": 2, "documents": []},
    "data.json": {"train": {"steps": 4, "histograms": {"x": {"edges": [0, 1], "counts": [2]}}}},
    "summary.json": {
        **{"before": {"eval/loss": 2.0}, "after": {"eval/loss": 1.5}, "steps": 4},
        **{"best": {"step": 2, "rule": "x"}, "skipped_steps": 0, "seconds": {"data": 0.5}},
        "tokens_per_s": 9.5,
    },
}
ODD = [None, "[/b]\x1b", [], {"x": "x"}, 10**400, float("nan")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    best = ["eval.best.metric=eval_loss", f"run.dir={folder}"]
    (folder / "recipe.yaml").write_text(load_recipe("debug", best).to_yaml())
    for name, content in GOOD.items():
        (folder / name).write_text(json.dumps(content) + "\n")
    return folder


def altered(tree: Any) -> Iterator[Any]:
    """Yield the tree with each of its values left out, and replaced by each odd one."""
    for place in places(tree):
        for value in (KeyError, *ODD):
            new = copy.deepcopy(tree)
            node = new
            for key in place[:-1]:
                node = node[key]
            if value is KeyError:
                del node[place[-1]]
            else:
                node[place[-1]] = value
            yield new


def places(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield (*above, key)
        if isinstance(tree[key], dict | list):
            yield from places(tree[key], (*above, key))


def look_at(run: Path) -> None:
    """Do what `runs`, `report`, `compare`, `export --best` and a run that is done do."""
    found = read_run(run)
    _cells(found, run)
    page.make_page([found])
    for work in (
        lambda: best_step(run),
        lambda: early_end(EarlyStoppingSection(metric="right", patience=1), evaluations(run)),
        lambda: Console(quiet=True).print(table_of_two(*[read_results(str(run))] * 2)),
        lambda: describe_end(found.recipe, run),
    ):
        with suppress(BadInput):
            work()


@pytest.mark.parametrize("name", GOOD)
def test_whoever_reads_a_run_folder_survives_what_it_holds(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(run / "recipe.yaml")  # not for each of hundreds of looks
    for module in ("report.runs", "checkpoint.best"):
        monkeypatch.setattr(f"packhorse.trainer.{module}.load_recipe", lambda _: recipe)
    for draw in ("draw_curves", "draw_bars", "draw_sample"):  # numbers alone, and slowly
        monkeypatch.setattr(page, draw, lambda *_, **__: "")
    look_at(run)
    before = (run / name).read_text()
    for content in altered(GOOD[name]):
        (run / name).write_text(json.dumps(content) + "\n")
        with suppress(BadInput):
            look_at(run)
    (run / name).write_text(before)


@pytest.mark.parametrize(
    "line",
    [
        {"step": 2, "eval_loss": 1.5},
        {**EVALUATION, "step": "2"},
        {**EVALUATION, "metrics": {"right": 0.5}},
        {**EVALUATION, "eval_loss": 10**400},
    ],
)
def test_a_damaged_line_is_set_aside_before_a_run_goes_on(tmp_path: Path, line: Any) -> None:
    path = tmp_path / "evaluations.jsonl"
    path.write_text(json.dumps(line) + "\n" + json.dumps(EVALUATION) + "\n")
    with pytest.raises(ValueError, match="is damaged"):
        read_json_lines(path, check=check_evaluation)
    cut_json_lines(path, lambda _: True, check_evaluation)
    assert read_json_lines(path, check=check_evaluation) == [EVALUATION]
    aside = path.with_name("evaluations.jsonl.damaged")
    assert json.loads(aside.read_text()) == line


def test_what_a_run_writes_is_not_damaged() -> None:
    missing = {"value": None, "count": 0, "low": None, "high": None, "missing": "no server"}
    check_evaluation({**EVALUATION, "metrics": {"right": missing, "other": METRIC}})
    LOGS["samples.jsonl"]({**SAMPLE, "scores": {"a": None}, "unscored": {"a": "no reference"}})
    LOGS["metrics.jsonl"]({"step": 3, "train/loss": float("nan"), "train/trained_tokens": 7})
