"""`packhorse runs` tells states from the folders' files, and names folders that it cannot read."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from packhorse.trainer import train as train_module
from packhorse.trainer.cli.main import app
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.report.runs import find_folders, read_run
from packhorse.trainer.utils.lease import SILENT_S
from tests.ranks import ROOT


def make_run(folder: Path, *overrides: str, steps: int = 18, logged: int = 6) -> Path:
    """Write what a run of `steps` steps has in its folder after `logged` of them."""
    folder.mkdir(parents=True)
    recipe = load_recipe(ROOT / "recipes/debug.yaml", [f"run.dir={folder}", *overrides])
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    (folder / "data.json").write_text(json.dumps({"train": {"steps": steps}}))
    lines: list[dict[str, float]] = [{"step": 0, "eval/loss": 6.0}]
    lines += [
        {"step": step, "train/loss": 7.0 - step / 10, "perf/tokens_per_s": 1000.0 + step}
        for step in range(1, logged + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluated = {"step": 0, "eval_loss": 6.0, "metrics": {}}
    (folder / "evaluations.jsonl").write_text(json.dumps(evaluated) + "\n")
    return folder


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def test_the_state_follows_from_the_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert (read_run(run).state, read_run(run).step) == ("failed", 6)
    write(run / "stop.json", {"step": 8})
    assert (read_run(run).state, read_run(run).step) == ("stopped", 8)
    write(run / "summary.json", {"steps": 18})
    assert (read_run(run).state, read_run(run).step) == ("done", 18)
    (run / "stop.json").unlink()
    write(run / "data.json", {"train": {"steps": 36}})  # extended, and killed since
    assert read_run(run).state == "failed"
    beat = run / ".lease-000001"
    beat.touch()
    assert read_run(run).state == "running"
    long_ago = time.time() - 2 * SILENT_S
    os.utime(beat, (long_ago, long_ago))
    assert read_run(run).state == "failed"
    (run / "checkpoints" / "step-1000000").mkdir(parents=True)
    assert read_run(run).step == 1_000_000


def test_a_run_is_alive_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(ROOT / "recipes/debug.yaml", [f"run.dir={tmp_path}"])

    def load_tokenizer(_section: object) -> None:
        assert read_run(tmp_path).state == "running"
        raise BadInput("no tokenizer")

    monkeypatch.setattr(train_module, "load_tokenizer", load_tokenizer)
    with pytest.raises(BadInput, match="no tokenizer"):
        train_module.train(recipe)
    assert read_run(tmp_path).state == "failed"
    assert not list(tmp_path.glob(".lease-*"))


def test_torn_lines_and_missing_files_are_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train/lo')
    (run / "data.json").unlink()
    (run / "evaluations.jsonl").unlink()
    found = read_run(run)
    assert (found.step, found.steps, found.evaluations) == (6, None, {})
    assert found.tokens_per_s == 1003.5


def test_runs_are_found_at_any_depth_but_not_inside_runs(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "deep" / "er" / "b")
    make_run(a / "evals" / "inside")
    evaluated = make_run(tmp_path / "evaluated")
    write(evaluated / "evaluated.json", {})
    (tmp_path / "notes").mkdir()
    assert find_folders(tmp_path) == ([a, b], [tmp_path / "notes"])
    assert find_folders(a) == ([a], [])
    (tmp_path / "recipe.yaml").write_text("model: {name: m}\n")  # as `packhorse init` writes it
    assert find_folders(tmp_path) == ([a, b], [tmp_path / "notes"])
    with pytest.raises(BadInput, match=r"not a run folder \(no run has begun there"):
        read_run(tmp_path)


def test_the_command_lists_runs_and_names_what_it_cannot_read(tmp_path: Path) -> None:
    make_run(tmp_path / "good", "optim.lr=1e-3")
    old = make_run(tmp_path / "old")
    (old / "recipe.yaml").write_text("model: {name: m}\nbatch: {rows_per_step: 4}\n")
    torn = make_run(tmp_path / "torn")
    (torn / "data.json").write_text("{")
    (tmp_path / "not[es").mkdir()  # rich would take [es] for markup
    done = CliRunner().invoke(app, ["runs", str(tmp_path)], env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    row = next(line for line in done.output.splitlines() if "good" in line).split()
    assert row[:4] == ["good", "failed", "6/18", "6.900"]
    assert "6.400" in row
    assert "1,004" in row
    assert f"{old / 'recipe.yaml'}: " in done.output
    assert "is now `batch.global_batch_size`" in done.output
    assert f"{torn}: its files are damaged" in done.output
    assert "no runs below: not[es" in done.output


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_the_table_has_the_terminals_width_and_cuts_nothing(tmp_path: Path, columns: str) -> None:
    make_run(tmp_path / "a-run-with-a-name-of-forty-characters-in-all")
    done = CliRunner().invoke(app, ["runs", str(tmp_path)], env={"COLUMNS": columns})
    assert "…" not in done.output
    assert all(len(line) <= int(columns) for line in done.output.splitlines())
    for cell in ("6.900", "6.400", "6/18", "1,004", "failed"):
        assert cell in done.output


@pytest.mark.parametrize(
    ("columns", "left_out"),
    [
        ("56", "last change"),
        ("44", "tokens/s, last change"),
        ("20", "step, loss, eval loss, tokens/s, last change"),
    ],
)
def test_a_narrow_terminal_has_fewer_columns_and_is_told_so(tmp_path, columns, left_out):
    make_run(tmp_path / "a-run-with-a-name-of-forty-characters-in-all")
    done = CliRunner().invoke(app, ["runs", str(tmp_path)], env={"COLUMNS": columns})
    assert "…" not in done.output
    assert all(len(line) <= int(columns) for line in done.output.splitlines())
    said = " ".join(done.output.split())
    assert f"left out: {left_out}; they need a wider terminal" in said
    for cell in ("failed", "a-run-wi"):
        assert cell in said


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["runs", str(tmp_path / "nowhere")])
    assert isinstance(done.exception, BadInput)
    assert "there is no such folder" in str(done.exception)


def test_the_name_of_a_folder_does_not_control_the_terminal(tmp_path: Path) -> None:
    make_run(tmp_path / "a").rename(tmp_path / "a\x1b]0;title\x07\u202e")
    (make_run(tmp_path / "b") / "data.json").write_text("{")
    (tmp_path / "b").rename(tmp_path / "b\x1b[31m")
    (tmp_path / "c\x1b[5m").mkdir()
    for folder in (tmp_path, tmp_path / "c\x1b[5m"):
        done = CliRunner().invoke(app, ["runs", str(folder)], env={"COLUMNS": "200"})
        assert done.exit_code == 0
        assert "␛[5m" in done.stdout
        assert not {"\x1b", "\x07", "\u202e"} & {*done.stdout}
