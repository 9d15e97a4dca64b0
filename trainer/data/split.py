"""Decide which rows are held out for evaluation, row by row.

The data section enters; the `SourceSplit`s of the training or the evaluation side leave. A row's
side depends on the row alone, not on other rows, their number or their order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import xxhash

from packhorse.trainer.config.data import DataSection, Source
from packhorse.trainer.datatypes import BadInput, RowError

VERSION = 1  # part of the keys of what is split: raise it when a row may change sides


class SourceSplit(NamedTuple):
    """A source and which of its rows: all (None), those held out, or those not held out."""

    source: Source
    held_out: bool | None = None


def parts_of(data: DataSection, which: Literal["train", "eval"]) -> tuple[SourceSplit, ...]:
    """Return the sources of a side. Held-out rows of a train source count once each, whatever the
    source's weight."""
    if which == "train":
        side = False if data.eval_fraction else None
        return tuple(SourceSplit(source, side) for source in data.train)
    given = tuple(SourceSplit(source) for source in data.eval)
    if not data.eval_fraction:
        return given
    return given + tuple(
        SourceSplit(source.model_copy(update={"weight": 1.0}), held_out=True)
        for source in data.train
    )


def held_out(fields: Mapping[str, Any] | RowError, data: DataSection, where: str) -> bool:
    """Return whether a row of a train source is held out, by the hash of its group or, without
    data.group_by, of all its fields.

    Args:
        fields: the row as it was read. One that could not be read stays in train, where it is
            counted as a reject.
        where: file and row, for messages.

    Raises:
        BadInput: the row has no group, or its hash would not be the same in every process.
    """
    if isinstance(fields, RowError):
        return False
    value: Any = fields
    if data.group_by is not None:
        value = fields.get(data.group_by)
        if value is None:
            raise BadInput(
                f"{where}: the row has no `{data.group_by}`, so data.group_by cannot tell its "
                f"side; fill it in, or leave the row out"
            )
    # Sorted and without spaces: the hash may not depend on the order of a row's columns.
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_stable)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(
            f"{where}: data.eval_fraction cannot tell the row's side ({error}); leave the row out"
        ) from None
    return xxhash.xxh3_64_intdigest(text.encode()) < data.eval_fraction * 2**64


def _stable(value: Any) -> str:
    """Return a text, the same in every process, of a value that Parquet has and JSON has not."""
    if isinstance(value, bytes | date | time | timedelta | Decimal):  # a datetime is a date
        return repr(value)
    raise TypeError(f"a value of type {type(value).__name__}")
