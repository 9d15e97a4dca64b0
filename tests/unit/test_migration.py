"""docs/migration.md: its recipes can be parsed, and the keys that it names exist."""

import ast
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from packhorse.trainer.config.base import Section
from packhorse.trainer.config.parsing import RENAMED_KEYS
from packhorse.trainer.config.recipe import Recipe, parse_recipe
from packhorse.trainer.datatypes import BadInput
from tests.ranks import ROOT

PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
BODY, RENAMED = PAGE.split("\n## Renamed keys\n")
TRAINERS = ("TRL", "Axolotl", "LLaMA-Factory", "torchtitan")


def section(title: str) -> str:
    return BODY.split(f"\n## {title}\n")[1].split("\n## ")[0]


def example(title: str) -> dict[str, Any]:
    """The recipe of ours in a section: the YAML block whose first line says so."""
    return yaml.safe_load(section(title).split("```yaml\n# recipe\n")[1].split("```")[0])


def keys_of(annotation: Any, prefix: str) -> Iterator[str]:
    """The dotted keys of the sections in a type; the items of a list or mapping add no part."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        for name, field in annotation.model_fields.items():
            yield f"{prefix}{name}"
            yield from keys_of(field.annotation, f"{prefix}{name}.")
    for inner in get_args(annotation):
        yield from keys_of(inner, prefix)


def named_keys(page: str) -> set[str]:
    """What stands between backticks in the second column of tables, and begins with a section."""
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    spans = [span for row in rows for span in re.findall(r"`([^`]*)`", row[1])]
    return {span.split(":")[0] for span in spans if re.match(r"[a-z]+\.[a-z_]+", span)}


@pytest.mark.parametrize("title", TRAINERS)
def test_the_recipe_of_each_trainer_is_one(title: str) -> None:
    assert parse_recipe(example(title)).run.dir


def test_the_recipe_of_the_readme_is_one() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert parse_recipe(yaml.safe_load(readme.split("```yaml\n")[1].split("```")[0])).has_eval


@pytest.mark.parametrize("title", TRAINERS)
def test_the_table_beside_it_has_every_key_of_the_example(title: str) -> None:
    written = {f"{name}.{key}" for name, values in example(title).items() for key in values}
    beside = named_keys(section(title))
    sources = {"data.train"} if any(key.startswith("data.train.") for key in beside) else set()
    assert written <= beside | sources


def test_every_key_that_the_tables_name_is_a_recipes() -> None:
    named = named_keys(BODY)
    assert len(named) > 60, "the tables were not read"
    assert named <= set(keys_of(Recipe, ""))


def test_a_key_that_is_no_recipes_is_found() -> None:
    named = named_keys("| theirs | `optim.momentum: 0.9`, `optim.lr` |")
    assert named - set(keys_of(Recipe, "")) == {"optim.momentum"}


def test_every_renamed_key_stands_in_its_table_with_its_new_name() -> None:
    """A key of data.eval is renamed as its twin of data.train is, which stands for both."""
    rows = [line.replace("[]", "").split(" | ") for line in RENAMED.splitlines() if "` | " in line]
    table = {re.split("[`:]", row[0])[1]: row[1] for row in rows}
    assert table.keys() == {old.replace("data.eval.", "data.train.") for old in RENAMED_KEYS}
    for old, new in RENAMED_KEYS.items():
        key = re.search(r"`([\w.]+)", new.replace("[]", "").replace(".eval.", ".train."))
        assert key is None or key[1] in table[old.replace("data.eval.", "data.train.")]


@pytest.mark.parametrize("title", TRAINERS)
def test_every_key_of_theirs_is_answered_with_ours(title: str) -> None:
    """An answer names one of the keys that stand beside theirs."""
    rows = [line.split(" | ") for line in section(title).splitlines() if line.startswith("| ")]
    answered = 0
    for theirs, ours in ((row[0], row[1]) for row in rows[1:]):
        table = re.search(r"\[([a-z_]+)\]", theirs)
        beside = re.findall(r"[a-z]+\.[a-z_]+", ours)
        for name in their_keys(theirs):
            answer = answer_of(table[1] if table else "", name)
            assert answer, f"{name} is not answered"
            assert not beside or any(key in answer for key in beside), (name, answer, beside)
            answered += 1
    assert answered > 20


def their_keys(cell: str) -> list[str]:
    """The names between backticks, without the values, tables and calls around them."""
    spans = (
        re.sub(r"^(LoraConfig\(|datasets\[\]\.|\[\w+\] )", "", span)
        for span in re.findall("`([^`]*)`", cell)
    )
    names = [name for span in spans for name in re.split("[:=)]", span)[0].strip().split(", ")]
    return [name for name in names if re.fullmatch("[a-z_0-9]+", name)]


def answer_of(table: str, name: str) -> str | None:
    """What is said about a key in the recipe, at its top or in torchtitan's table."""
    tree = {table: {name: 1}} if table else {name: 1}
    with pytest.raises(BadInput) as refused:
        parse_recipe({"data": {"train": [{"path": "x"}]}, "run": {"dir": "r"}} | tree)
    lines = [line for line in str(refused.value).splitlines() if f"{name}`" in line]
    return next((line for line in lines if "unknown key" not in line), None)


def test_the_names_of_trl_are_its_own() -> None:
    """Where TRL is installed: the fields of its configuration, of transformers' and of peft's."""
    if find_spec("trl") is None:
        pytest.skip("TRL is not installed")
    fields = (
        fields_of("trl/trainer/sft_config.py")
        | fields_of("transformers/training_args.py")
        | fields_of("peft/tuners/lora/config.py")
    )
    theirs = "".join(line.split(" | ")[0] for line in section("TRL").splitlines() if "|" in line)
    spans = re.findall(r"`(?:LoraConfig\()?([a-z_0-9, ]+)[^`]*`", theirs)
    names = {name for span in spans for name in span.split(", ")}
    assert names - {"model", "train_dataset", "eval_dataset"} <= fields


def fields_of(file: str) -> set[str]:
    """The annotated names of a file's classes, without importing it."""
    package, _, rest = file.partition("/")
    spec = find_spec(package)
    assert spec
    assert spec.submodule_search_locations
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / rest).read_text(encoding="utf-8"))
    return {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
