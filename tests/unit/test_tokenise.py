"""Rows become documents in the rows' order, whatever the number of processes; long ones by the policy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import tokenise
from trainer.data.tokenise import Limits, Row, fit, tokenise_rows
from trainer.flow import Example, RowError


def example(flags: list[int]) -> Example:
    return Example(np.arange(len(flags), dtype=np.int32) + 10, np.array(flags, bool))


def trained_ids(parts: list[Example]) -> list[int]:
    return [token for part in parts for token in part.input_ids[part.trained].tolist()]


@pytest.mark.parametrize("too_long", ["reject", "truncate", "split"])
def test_an_example_that_fits_is_left_alone(too_long):
    whole = example([0, 1, 1, 1])
    assert fit(whole, Limits(4, too_long, packing_cuts=False)) == [whole]


def test_reject_leaves_out_what_is_too_long():
    with pytest.raises(RowError, match=r"^longer than max_tokens$"):
        fit(example([0, 1, 1, 1]), Limits(3, "reject", packing_cuts=True))


def test_truncate_cuts_what_is_not_trained():
    (part,) = fit(example([0, 1, 1, 0, 0]), Limits(3, "truncate", packing_cuts=False))
    assert part.input_ids.tolist() == [10, 11, 12]
    assert part.trained.tolist() == [False, True, True]


def test_truncate_rejects_an_answer_that_would_lose_its_end():
    with pytest.raises(RowError, match="would lose its end"):
        fit(example([0, 1, 1, 1, 0]), Limits(3, "truncate", packing_cuts=False))


def test_split_leaves_cutting_to_a_packing_that_cuts():
    whole = example([0, 1, 1, 1, 0])
    assert fit(whole, Limits(3, "split", packing_cuts=True)) == [whole]


@given(st.lists(st.booleans(), min_size=2, max_size=40), st.integers(2, 12))
def test_split_trains_every_trained_token_once_in_parts_that_fit(flags, most):
    flags = [False, *flags]
    if not any(flags):
        flags[-1] = True
    parts = fit(example(flags), Limits(most, "split", packing_cuts=False))
    assert trained_ids(parts) == trained_ids([example(flags)])
    for part in parts:
        assert len(part.input_ids) <= most
        assert not part.trained[0], "nothing predicts a first token"
        assert part.trained.any()


def test_an_example_without_a_trained_token_is_rejected():
    with pytest.raises(RowError, match="no trained token"):
        fit(example([0, 0]), Limits(9, "reject", packing_cuts=False))


def fake_tokenise(rows: list[Row]) -> list[Example | RowError]:
    return [
        RowError("every seventh") if row.number % 7 == 0 else example([0] + [1] * (1 + row.number % 5)) for row in rows
    ]


def rows(count: int) -> list[Row]:
    return [Row(number % 2, 0, number, None) for number in range(1, count + 1)]


def together(chunks) -> dict[str, list]:
    chunks = list(chunks)
    columns = ("lengths", "input_ids", "trained", "trained_counts", "sources", "files", "rows", "rejects")
    return {name: [item for chunk in chunks for item in list(getattr(chunk, name))] for name in columns}


def test_the_outcome_does_not_depend_on_the_number_of_processes(monkeypatch):
    limits = Limits(4, "split", packing_cuts=False)
    alone = together(tokenise_rows(rows(50), fake_tokenise, limits, workers=1))
    assert alone["rows"][:3] == [1, 2, 3]
    assert alone["rejects"][0] == (1, 0, 7, "every seventh")

    monkeypatch.setattr(tokenise, "CHUNK_ROWS", 3)
    monkeypatch.setattr(tokenise, "POOL_FROM_CHUNKS", 2)
    assert together(tokenise_rows(rows(50), fake_tokenise, limits, workers=2)) == alone


def failing_tokenise(rows: list[Row]) -> list[Example | RowError]:
    raise ZeroDivisionError("in the worker")


def test_a_fault_in_a_worker_reaches_the_caller(monkeypatch):
    monkeypatch.setattr(tokenise, "CHUNK_ROWS", 1)
    monkeypatch.setattr(tokenise, "POOL_FROM_CHUNKS", 2)
    with pytest.raises(ZeroDivisionError, match="in the worker"):
        list(tokenise_rows(rows(4), failing_tokenise, Limits(9, "reject", packing_cuts=False), workers=2))


def test_reading_keeps_only_a_few_chunks_ahead(monkeypatch):
    monkeypatch.setattr(tokenise, "CHUNK_ROWS", 1)
    monkeypatch.setattr(tokenise, "POOL_FROM_CHUNKS", 2)
    read = []

    def reading():
        for row in rows(100):
            read.append(row)
            yield row

    stream = tokenise_rows(reading(), fake_tokenise, Limits(9, "reject", packing_cuts=False), workers=2)
    next(stream)
    assert len(read) < 20
    stream.close()
