"""The table of architectures calls a difference above its bound one."""

from __future__ import annotations

from tests.models.table import page, works

RIGHT = {"losses": 1e-8, "weights": 1e-5, "logits": 1e-6}


def test_a_difference_at_any_stage_is_no_success() -> None:
    assert works({"works": "packed", "zero0": RIGHT, "zero3": RIGHT}) == "packed"
    for wrong in (1e-5, float("nan")):
        off = {**RIGHT, "losses": wrong}
        assert works({"works": "packed", "zero0": RIGHT, "zero3": off}) == "differs"


def test_the_page_counts_and_says_why() -> None:
    text = page(
        {
            "b": {"works": "refused", "why": "a | sentence"},
            "a": {"works": "packed", "zero0": RIGHT, "zero3": RIGHT},
        },
        "5",
    )
    assert "**1 refused, 1 packed**." in text
    assert text.index("| `a` | packed | 1e-08 | 1e-05 | 1e-06 |") < text.index("| `b` | refused |")
    assert "a / sentence" in text
