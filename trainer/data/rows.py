"""Rows of a source as Conversations: joins its format, its columns, the user's own function and its
filters.

What a `RowReader` makes of a row depends on the row and the recipe alone, in whichever process it
runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from typing import Any

from trainer.config.data import Source
from trainer.data.filters import apply_filters, check_filters
from trainer.data.format import detect_format, to_conversation
from trainer.data.source import read_rows
from trainer.datatypes import BadInput, Conversation, RowError
from trainer.utils.text import error_line
from trainer.utils.user_functions import function_digest, load_function

MOST_BROKEN = 100  # rows at the beginning that may be broken before the source is given up


@dataclass(frozen=True)
class RowReader:
    """`conversation` is the way from a raw row; picklable, as the processes that tokenize need it."""

    source: Source
    format: str

    @classmethod
    def of(cls, source: Source) -> RowReader:
        """The reader that the source's recipe and its first row (that is not broken) ask for.

        Raises:
            BadInput: no row can be read, no format fits, or a function or library is not there.
        """
        check_filters(source.filters)
        if source.function:
            load_function(source.function)
        fault = ""
        for row in islice(read_rows(source), MOST_BROKEN):
            if isinstance(row.fields, dict):
                return cls(
                    source, "messages" if source.function else detect_format(row.fields, source)
                )
            fault = fault or f"row {row.number}: {row.fields}"
        raise BadInput(
            f"{source.path or source.name}: none of its first rows can be read ({fault}); "
            'every row must be an object such as {"text": "..."}'
        )

    def conversation(self, fields: dict[str, Any] | RowError) -> Conversation:
        """The row as a conversation that is wanted.

        Raises:
            Filtered: the recipe's filters leave it out.
            RowError: it cannot be used.
        """
        if isinstance(fields, RowError):
            raise fields
        written = _call(self.source.function, fields) if self.source.function else fields
        conversation = to_conversation(written, self.format, self.source.columns)
        apply_filters(self.source.filters, fields, conversation)
        return conversation

    def key(self) -> list[Any]:
        """All but the rows themselves that shapes the conversations, as JSON values."""
        source, filters = self.source, self.source.filters
        functions = [
            [name, function_digest(name)] for name in (source.function, filters.function) if name
        ]
        library = version("math-verify") if filters.math_answer else None
        return [
            self.format,
            sorted(source.columns.items()),
            functions,
            filters.model_dump(mode="json"),
            library,
        ]


def _call(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The row as the user's function writes it, in the format messages."""
    try:
        written = load_function(name)(dict(fields))
    except Exception as error:  # whatever the user's own code does
        raise RowError(f"{name}: {error_line(error)}") from None
    if isinstance(written, list):
        return {"messages": written}
    if isinstance(written, dict) and "messages" in written:
        return written
    raise RowError(
        f"{name}: it must give a list of messages, or {{messages, tools}}, not "
        f"{type(written).__name__}"
    )
