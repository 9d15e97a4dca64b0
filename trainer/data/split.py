"""Which rows are trained and which are held out, decided row by row: no other row, count or order
has a say.

The data section enters; the `SourceSplit`s of a side leave, and `held_out` says for one row on
which side it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import xxhash

from trainer.config.data import DataSection, Source
from trainer.datatypes import BadInput, RowError

VERSION = 1  # part of the keys of what is split: raise it when a row may change sides


class SourceSplit(NamedTuple):
    """A source and which of its rows: all, or where `held_out` is not None, those for which it is
    so.
    """

    source: Source
    held_out: bool | None = None


def parts_of(data: DataSection, which: Literal["train", "eval"]) -> tuple[SourceSplit, ...]:
    """Where the rows of a side come from. Held-out rows of a train source count once each, whatever
    its weight.
    """
    if which == "train":
        return tuple(
            SourceSplit(source, held_out=False if data.eval_fraction else None)
            for source in data.train
        )
    given = tuple(SourceSplit(source) for source in data.eval)
    if not data.eval_fraction:
        return given
    return given + tuple(
        SourceSplit(source.model_copy(update={"weight": 1.0}), held_out=True)
        for source in data.train
    )


def held_out(fields: Mapping[str, Any] | RowError, data: DataSection, where: str) -> bool:
    """Whether a row of a train source is held out: by the hash of its group, or else of all its
    fields.

    Args:
        fields: as they were read; what could not be read stays in train, whose rejects it is
            counted with.
        where: file and row, for messages.

    Raises:
        BadInput: the row has no group, or its hash would not be the same elsewhere.
    """
    if isinstance(fields, RowError):
        return False
    value: Any = fields
    if data.group_by is not None:
        value = fields.get(data.group_by)
        if value is None:
            raise BadInput(
                f"{where}: the row has no `{data.group_by}`, so data.group_by cannot tell its "
                f"side; "
                "fill it in, or leave the row out"
            )
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_stable)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(
            f"{where}: data.eval_fraction cannot tell the row's side ({error}); leave the row out"
        ) from None
    return xxhash.xxh3_64_intdigest(text.encode()) < data.eval_fraction * 2**64


def _stable(value: Any) -> str:
    """Values that Parquet has and JSON has not, where their text is the same in every process."""
    if isinstance(value, bytes | date | time | timedelta | Decimal):  # a datetime is a date
        return repr(value)
    raise TypeError(f"a value of type {type(value).__name__}")
