"""The documents agree with the code."""

import runpy

import yaml

from packhorse.trainer.config.recipe import parse_recipe
from tests.ranks import ROOT


def test_the_recipe_reference_is_current() -> None:
    """`python docs/make_recipe.py` updates it."""
    reference = runpy.run_path(str(ROOT / "docs" / "make_recipe.py"))["reference"]
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == reference()


def test_the_table_of_scale_is_current() -> None:
    """`python docs/make_scale.py` updates it."""
    page = runpy.run_path(str(ROOT / "docs" / "make_scale.py"))["page"]
    assert (ROOT / "docs" / "scale.md").read_text(encoding="utf-8") == page()


def test_the_scorers_of_the_page_are_a_recipes() -> None:
    section = (
        (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8").split("\n## Scorers\n")[1]
    )
    tree = yaml.safe_load(section.split("```yaml\n")[1].split("```")[0])
    data = {"train": [{"path": "train.jsonl"}], "eval": [{"path": "eval.jsonl"}]}
    recipe = parse_recipe({"model": {"name": "m"}, "data": data, "run": {"dir": "r"}, **tree})
    assert recipe.eval.generate is not None
    kinds = {scorer.kind for scorer in recipe.eval.generate.scorers.values()}
    assert kinds == {
        "format",
        "exact",
        "contains",
        "math",
        "choice",
        "json_schema",
        "tool_call",
        "refusal",
        "function",
        "judge",
    }
