"""A run folder runs no code without consent, and every key that can is in one table."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from packhorse.trainer.cli import main
from packhorse.trainer.config.base import Section, items_of, sections_of
from packhorse.trainer.config.code_keys import CODE_KEYS, require_trust, used_code_keys
from packhorse.trainer.config.recipe import Recipe, parse_recipe
from packhorse.trainer.datatypes import BadInput
from tests.ranks import ROOT

SOURCE = {"path": "x.jsonl", "function": "mine:read", "filters": {"function": "mine:keep"}}
HOSTILE: dict[str, Any] = {
    "model": {"name": "model", "trust_remote_code": True},
    "data": {"train": [SOURCE], "eval": [SOURCE]},
    "eval": {
        "generate": {"scorers": {"a.b": {"kind": "function", "function": "mine:score"}}},
        "vllm_python": "/evil/python",
        "vllm_args": ["--tool-parser-plugin", "/evil.py"],
        "lm_eval": ["evil/task"],
    },
    "run": {"dir": "runs/x"},
}


def run_folder(folder: Path, **sections: Any) -> Path:
    """Return a run folder of somebody else, with the sections in place of harmless ones."""
    tree = {key: HOSTILE[key] for key in ("model", "data", "run")}
    tree = tree | {"model": {"name": "model"}, "data": {"train": [{"path": "x.jsonl"}]}} | sections
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(parse_recipe(tree).to_yaml())
    return folder


descriptions = runpy.run_path(str(ROOT / "docs" / "make_recipe.py"))["descriptions"]


def keys(section: type[Section], place: str = "") -> Iterator[tuple[str, str]]:
    """Yield each key of the recipe, as in CODE_KEYS, with its description."""
    texts = descriptions(section)
    for name, field in section.model_fields.items():
        key = f"{place}.{name}".lstrip(".")
        yield key, texts.get(name, "")
        for inner in sections_of(field.annotation):
            yield from keys(inner, key)
        items = items_of(field.annotation)
        of_mapping = "dict[" in str(field.annotation)
        for inner in sections_of(items) if items else ():
            yield from keys(inner, key + (".*" if of_mapping else "[]"))


def test_every_key_that_runs_code_is_in_the_table_and_no_other() -> None:
    described = dict(keys(Recipe))
    assert CODE_KEYS.keys() <= described.keys()
    words = ("module:function", "Python code", "the Python of", "arguments of vLLM", "Tasks of lm-")
    by_name = {key for key in described if key.endswith(("function", "_python", "_code"))}
    by_text = {key for key, text in described.items() if any(word in text for word in words)}
    assert by_name | by_text == CODE_KEYS.keys()


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    assert [line for line in page.splitlines() if line.startswith("| `") and ("." in line)] == [
        f"| `{key}` | {what} |" for key, what in CODE_KEYS.items()
    ]


def test_all_keys_that_are_used_are_found() -> None:
    assert used_code_keys(parse_recipe(HOSTILE)) == [
        "model.trust_remote_code=True",
        "data.train.0.function=mine:read",
        "data.train.0.filters.function=mine:keep",
        "data.eval.0.function=mine:read",
        "data.eval.0.filters.function=mine:keep",
        "eval.generate.scorers.a.b.function=mine:score",
        "eval.vllm_python=/evil/python",
        "eval.vllm_args=['--tool-parser-plugin', '/evil.py']",
        "eval.lm_eval=['evil/task']",
    ]
    assert used_code_keys(parse_recipe({**HOSTILE, "model": {"name": "m"}, "eval": {}}))
    harmless = {"model": {"name": "m"}, "data": {"train": [{"path": "x"}]}, "run": {"dir": "r"}}
    assert used_code_keys(parse_recipe(harmless)) == []


@pytest.mark.parametrize(
    "command",
    [["export", "RUN", "--out", "out"], ["chat", "RUN"], ["eval", "RUN", "RUN/recipe.yaml"]],
)
def test_a_hostile_run_folder_is_refused_by_every_command(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    run = run_folder(tmp_path / "run", **HOSTILE)
    words = [word.replace("RUN", str(run)) for word in command]
    monkeypatch.setattr(sys, "argv", ["packhorse", *words])
    with pytest.raises(SystemExit) as ended:
        main.main()
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert "has code run by model.trust_remote_code=True" in err
    assert "give --trust-run" in err
    assert ("eval.vllm_python=/evil/python" in err) == (command[0] == "eval")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"], "nothing was begun"


def test_a_recipe_counts_as_the_folders_wherever_in_it_it_lies(tmp_path):
    run = run_folder(tmp_path / "run")
    recipe = parse_recipe({**HOSTILE, "model": {"name": "model"}})
    link = tmp_path / "mine.yaml"
    link.symlink_to(run / "recipe.yaml")
    for file in (run / "recipe.yaml", run / "sub" / ".." / "other.yaml", link):
        with pytest.raises(BadInput, match=r"eval.lm_eval=\['evil/task'\]"):
            require_trust(run, trusted=False, recipe=recipe, recipe_file=file)
    elsewhere = tmp_path / "own.yaml"
    require_trust(run, trusted=False, recipe=recipe, recipe_file=elsewhere)
    require_trust(run, trusted=True, recipe=recipe, recipe_file=run / "recipe.yaml")


def test_the_users_functions_do_not_stand_in_the_way_of_an_export(tmp_path):
    sections = {key: HOSTILE[key] for key in ("data", "eval")}
    require_trust(run_folder(tmp_path / "run", **sections), trusted=False)
    tree = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert tree["data"]["train"][0]["function"] == "mine:read"
