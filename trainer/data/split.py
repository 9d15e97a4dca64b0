"""Decide which rows are held out for evaluation, row by row, and read the rows of a side.

The data section enters; the `SourceSplit`s of the training or the evaluation side, or their rows
(`SplitRows`) leave. A row's side depends on the row alone, not on other rows, their number or
their order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import xxhash

from packhorse.trainer.config.data import DataSection, Source
from packhorse.trainer.data.row_files import RawRow
from packhorse.trainer.data.source import count_rows, read_rows, shown, source_files
from packhorse.trainer.datatypes import BadInput, Row, RowError

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


def held_out(
    fields: Mapping[str, Any] | RowError, data: DataSection, source: Source, where: str
) -> bool:
    """Return whether a row of a train source is held out, by the hash of its group or, without a
    `group_by`, of all its fields.

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
    if source.group_by is not None:
        value = fields.get(source.group_by)
        if value is None:
            raise BadInput(
                f"{where}: the row has no `{source.group_by}`, so group_by cannot tell its side; "
                "fill it in, name another column, or leave the row out"
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


def rows_of(data: DataSection, part: SourceSplit) -> Iterator[RawRow]:
    """Yield the rows of a source that are on its side of the train/eval split."""
    for row in read_rows(part.source):
        if part.held_out is None or part.held_out == held_out(
            row.fields, data, part.source, f"{row.file or part.source.name}:{row.number}"
        ):
            yield row


class SplitRows:
    """The train or eval rows: `parts` and `names` of their sources, and all `files` in order."""

    def __init__(self, data: DataSection, which: Literal["train", "eval"]) -> None:
        self.data = data
        self.parts = parts_of(data, which)
        self.names = [shown(part.source) for part in self.parts]
        # of each source: the files by the names that its rows give them
        self._files = [
            {name: str(path) for name, path in files.items()}
            if (files := source_files(part.source))
            else {str(part.source.name): f"{part.source.name}:{part.source.split}"}
            for part in self.parts
        ]
        self.files = [path for files in self._files for path in files.values()]

    def rows(self) -> Iterator[Row]:
        """Yield the rows, source by source.

        Raises:
            BadInput: a row cannot be read, and data.broken_lines does not let it be rejected.
        """
        first = 0
        for source, (part, files) in enumerate(zip(self.parts, self._files, strict=True)):
            numbers = {name: first + i for i, name in enumerate(files)}
            for row in rows_of(self.data, part):
                file = numbers[row.file]
                if isinstance(row.fields, RowError) and self.data.broken_lines == "stop":
                    raise BadInput(
                        f"{self.files[file]}:{row.number}: {row.fields}; mend or delete the line, "
                        "or set data.broken_lines: reject"
                    )
                yield Row(source, file, row.number, row.fields)
            first += len(files)

    def count_rows(self) -> int | None:
        """Return about how many rows there are; None if that needs parsing them."""
        share = {None: 1.0, False: 1 - self.data.eval_fraction, True: self.data.eval_fraction}
        total = 0.0
        for part in self.parts:
            rows = count_rows(part.source)
            if rows is None:
                return None
            total += rows * share[part.held_out]
        return round(total)
