"""Turn the rows of a source into Conversations, by its format, columns, user function and filters.

A `Source` enters; a `RowReader` leaves, which turns raw rows into Conversations. Its result depends
on the row and the recipe alone, whichever process it runs in.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from typing import Any

from packhorse.trainer.config.data import Source
from packhorse.trainer.data.filters import apply_filters, check_filters
from packhorse.trainer.data.format import detect_format, to_conversation
from packhorse.trainer.data.source import read_rows, shown
from packhorse.trainer.datatypes import BadInput, Conversation, RowError
from packhorse.trainer.utils.time_limit import Killed
from packhorse.trainer.utils.user_functions import (
    FunctionFailed,
    call_function,
    function_digest,
    load_function,
)

MAX_BROKEN = 100  # broken rows at the beginning after which the source is refused


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one source; picklable, as the processes that tokenize need it."""

    source: Source
    format: str
    ignored: tuple[str, ...] = ()  # columns, and keys of messages, to pass over

    @classmethod
    def of(cls, source: Source, ignored: tuple[str, ...] = ()) -> RowReader:
        """Return the reader for the source's settings and for the format of its first good row.

        Raises:
            BadInput: no row can be read, no format fits, or a function or library is missing.
        """
        check_filters(source.filters)
        if source.function:
            load_function(source.function)
        fault = ""
        for row in islice(read_rows(source), MAX_BROKEN):
            if isinstance(row.fields, dict):
                written = "messages" if source.function else detect_format(row.fields, source)
                return cls(source, written, ignored)
            fault = fault or f"row {row.number}: {row.fields}"
        raise BadInput(
            f"{shown(source)}: none of its first rows can be read ({fault}); "
            'every row must be an object such as {"text": "..."}'
        )

    def conversation(self, fields: dict[str, Any] | RowError, place: str = "") -> Conversation:
        """Return the row as a conversation.

        Args:
            place: names the row in an error, as `file:row`; without it the source is named.

        Raises:
            Filtered: the recipe's filters leave the row out.
            RowError: the row cannot be used.
            BadInput: the process that computes a filter's value was killed.
        """
        if isinstance(fields, RowError):
            raise fields
        written = _call(self.source.function, fields) if self.source.function else fields
        conversation = to_conversation(written, self.format, self.source.columns, self.ignored)
        try:
            apply_filters(self.source.filters, fields, conversation)
        except Killed as error:
            raise BadInput(
                f"{place or shown(self.source)}: math_answer: {error}; set data.workers lower, or "
                "leave the row out"
            ) from None
        return conversation

    def key(self) -> list[Any]:
        """Return all that shapes the conversations beside the rows, as JSON values."""
        source, filters = self.source, self.source.filters
        functions = [
            [name, function_digest(name)] for name in (source.function, filters.function) if name
        ]
        library = version("math-verify") if filters.math_answer else None
        return [
            self.format,
            sorted(source.columns.items()),
            sorted(self.ignored),
            functions,
            filters.model_dump(mode="json"),
            library,
        ]


def _call(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the row as the user's function writes it, in the format `messages`."""
    try:
        written = call_function(name, dict(fields))
    except FunctionFailed as error:
        raise RowError(str(error)) from None
    if isinstance(written, list):
        return {"messages": written}
    if isinstance(written, dict) and "messages" in written:
        return written
    raise RowError(
        f"{name}: it must give a list of messages, or {{messages, tools}}, not "
        f"{type(written).__name__}"
    )
