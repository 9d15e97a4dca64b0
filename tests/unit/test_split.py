"""A row's side follows from the row alone, or from its group: whatever else is in the data."""

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest

from packhorse.trainer.config.data import DataSection
from packhorse.trainer.data.split import SourceSplit, held_out, parts_of
from packhorse.trainer.datatypes import BadInput, RowError


def data(fraction: float = 0.3, **more: Any) -> DataSection:
    return DataSection.model_validate(
        {"train": [{"path": "a", "weight": 3}], "eval_fraction": fraction, **more}
    )


def side(fields: Mapping[str, Any], of: DataSection | None = None) -> bool:
    of = of or data()
    return held_out(fields, of, of.train[0], "a.jsonl:1")


ROWS = [{"question": f"What is {n}?", "answer": str(n)} for n in range(2000)]


def test_about_the_share_asked_for_is_held_out():
    assert sum(map(side, ROWS)) / len(ROWS) == pytest.approx(0.3, abs=0.03)
    assert not any(side(row, data(0)) for row in ROWS)


def test_a_larger_share_holds_out_the_same_rows_and_more():
    assert all(side(row, data(0.5)) for row in ROWS if side(row))


def test_the_side_is_the_same_in_every_version():
    """Were the hash another one, rows would move between the sides of runs that are compared."""
    assert [n for n in range(20) if side(ROWS[n])] == [3, 4, 8, 11, 18]


def test_the_order_of_the_fields_changes_nothing():
    assert [side(row) for row in ROWS] == [side(dict(reversed(row.items()))) for row in ROWS]


BY_TREE = data(train=[{"path": "a", "group_by": "tree"}])


def test_a_group_stays_whole():
    sides = {
        tree: {side({"tree": tree, "n": n}, BY_TREE) for n in range(50)} for tree in range(100)
    }
    assert all(len(found) == 1 for found in sides.values())
    assert {True, False} == {found.pop() for found in sides.values()}


def test_each_source_has_a_group_of_its_own():
    sources = [{"path": "a", "group_by": "tree"}, {"path": "b", "group_by": "thread"}]
    mixed = data(train=sources)
    trees, threads = mixed.train
    for n in range(100):
        row, alone = {"tree": n, "thread": n + 1}, {"thread": n + 1}
        by_thread = held_out(alone, mixed, threads, "b.jsonl:1")
        assert held_out(row, mixed, threads, "b.jsonl:1") == by_thread
        assert held_out(row, mixed, trees, "a.jsonl:1") == side({"tree": n}, BY_TREE)
    with pytest.raises(BadInput, match="the row has no `thread`"):
        held_out({"tree": 1}, mixed, threads, "b.jsonl:1")


@pytest.mark.parametrize("fields", [{"n": 1}, {"tree": None}])
def test_a_row_without_its_group_is_refused_by_name(fields):
    with pytest.raises(BadInput, match=r"a\.jsonl:1: the row has no `tree`"):
        side(fields, BY_TREE)


def test_a_row_that_could_not_be_read_is_counted_with_train():
    of = data(0.9)
    assert not any(
        held_out(RowError(f"broken {n}"), of, of.train[0], "a.jsonl:1") for n in range(20)
    )


def test_values_of_parquet_have_a_side():
    assert side({"at": datetime(2026, 1, 1), "cost": Decimal("1.10"), "key": b"\x00"}) in (
        True,
        False,
    )


@pytest.mark.parametrize("value", [object(), {1: 2, "a": 3}])
def test_a_value_without_a_text_of_its_own_is_refused(value):
    with pytest.raises(BadInput, match=r"a\.jsonl:1: data\.eval_fraction cannot tell"):
        side({"image": value})


def test_both_sides_together_are_the_train_sources_and_held_out_rows_count_once():
    of = data(eval=[{"path": "b"}])
    (source,) = of.train
    assert parts_of(of, "train") == (SourceSplit(source, held_out=False),)
    given, held = parts_of(of, "eval")
    assert given == SourceSplit(of.eval[0])
    assert (held.source.path, held.source.weight, held.held_out) == ("a", 1.0, True)


def test_without_a_share_all_train_rows_are_trained():
    of = data(0, eval=[{"path": "b"}])
    assert parts_of(of, "train") == (SourceSplit(of.train[0]),)
    assert parts_of(of, "eval") == (SourceSplit(of.eval[0]),)
