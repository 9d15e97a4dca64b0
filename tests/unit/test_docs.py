"""What the documents say is what the code is."""

import runpy

from tests.ranks import ROOT


def test_the_recipe_reference_is_current() -> None:
    """`python docs/make_recipe.py` brings it up to date."""
    reference = runpy.run_path(str(ROOT / "docs" / "make_recipe.py"))["reference"]
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == reference()


def test_the_table_of_scale_is_current() -> None:
    """`python docs/make_scale.py` brings it up to date."""
    page = runpy.run_path(str(ROOT / "docs" / "make_scale.py"))["page"]
    assert (ROOT / "docs" / "scale.md").read_text(encoding="utf-8") == page()
