"""`packhorse init` writes a recipe that `packhorse prepare` accepts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from packhorse.trainer.config.recipe import load_recipe
from tests.ranks import ROOT

MODEL = "recipes/debug/model"


def command(*words: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "packhorse", *words]
    return subprocess.run(program, cwd=ROOT, env=os.environ, capture_output=True, text=True)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def distinct(count: int, words: int = 12) -> list[dict]:
    """Rows with no three words in common."""
    texts = [" ".join(f"{n * words + i}" for i in range(words)) for n in range(count)]
    return [{"question": text, "answer": text[::-1]} for text in texts]


def test_the_recipe_is_one_that_prepare_accepts(tmp_path: Path) -> None:
    data, out = write(tmp_path / "it's [mine].jsonl", distinct(60)), tmp_path / "recipe.yaml"
    done = command("init", MODEL, str(data), "--out", str(out))
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(out)
    (source,) = recipe.data.train
    assert (source.path, source.format) == (str(data), "question_answer")
    assert (recipe.model.name, recipe.data.eval_fraction) == (MODEL, 0.1)
    assert recipe.batch.seq_len == 512
    assert 'rows: 60; columns: "question", "answer"' in out.read_text()
    prepared = command("prepare", str(out), f"data.cache={tmp_path / 'cache'}")
    assert prepared.returncode == 0, prepared.stderr


def test_the_sequence_length_holds_the_longest_row(tmp_path: Path) -> None:
    data, out = write(tmp_path / "long.jsonl", distinct(5, words=300)), tmp_path / "recipe.yaml"
    assert command("init", MODEL, str(data), "--out", str(out)).returncode == 0
    recipe = load_recipe(out)
    assert recipe.batch.seq_len >= 1024
    assert not recipe.has_eval, "too few rows"
    prepared = command("prepare", str(out), f"data.cache={tmp_path / 'cache'}")
    assert prepared.returncode == 0, prepared.stderr


def test_a_model_that_is_no_folder_needs_no_network(tmp_path: Path) -> None:
    data, out = write(tmp_path / "a.jsonl", distinct(60)), tmp_path / "recipe.yaml"
    done = command("init", "some/model", str(data), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert load_recipe(out).batch.seq_len == 4096
    assert "no row was measured" in out.read_text()


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"a": 1}], "none of these sets of columns is there"),
        (None, "nowhere.jsonl"),
    ],
)
def test_data_that_cannot_be_trained_is_refused(
    tmp_path: Path, rows: list[dict] | None, sentence: str
) -> None:
    data = write(tmp_path / "a.jsonl", rows) if rows else tmp_path / "nowhere.jsonl"
    out = tmp_path / "recipe.yaml"
    done = command("init", MODEL, str(data), "--out", str(out))
    assert (done.returncode, out.exists()) == (2, False), done.stderr
    assert sentence in done.stderr


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    data, out = write(tmp_path / "a.jsonl", distinct(60)), tmp_path / "recipe.yaml"
    assert command("init", MODEL, str(data), "--out", str(out)).returncode == 0
    before = out.read_text()
    again = command("init", "some/model", str(data), "--out", str(out))
    assert (again.returncode, out.read_text()) == (2, before)


def test_names_may_hold_any_character(tmp_path: Path) -> None:
    """A pair of JSON's escapes, as for an emoji, is no text in YAML."""
    data, out = tmp_path / "\U0001f600 '\u202e\x7f\".jsonl", tmp_path / "my recipe.yaml"
    write(data, [{**row, "\x1b\x85\U0001f600": 1} for row in distinct(5)])
    done = command("init", "some/mo\x7fdel", str(data), "--out", str(out))
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(out)
    assert (recipe.model.name, recipe.data.train[0].path) == ("some/mo\x7fdel", str(data))
    assert out.read_text().isascii()
    assert f"preview '{out}'" in done.stdout
