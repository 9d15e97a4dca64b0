"""The names under which data holds the same thing, and those that nobody reads.

A row's columns and a message's keys enter; the values that a format asks for leave, with the names
of all others, so that nothing of the user's is passed over in silence.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from packhorse.trainer.datatypes import BadInput, RowError
from packhorse.trainer.utils.text import printable

# ours -> what else the field calls it
COLUMN_SYNONYMS = {
    "system": ("system_prompt", "system_message"),
    "tools": ("functions", "tool_defs", "tool_definitions"),
    "choices": ("options",),
    "input": ("context",),  # Dolly's, beside an instruction
}
REASONING = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "tool_call", "function_calls", "function_call")
# Whether a turn is trained: the flag's name -> what a true one means.
FLAGS = {
    "weight": True,
    "train": True,
    "training": True,
    "trainable": True,
    "loss": True,
    "loss_mask": True,  # a mask of what the loss counts
    "masked": False,  # from the loss
}
MESSAGE_KEYS = {"role", "content", "name", "tool_call_id", *REASONING, *CALLS, *FLAGS}
SHAREGPT_KEYS = {*MESSAGE_KEYS, "from", "value"}

# What may say which turns or rows to leave untrained, in words that are not read. A column may have
# such a word in its name for other reasons, as `training_source`.
_FLAG_OF_A_MESSAGE = re.compile(r"train|loss|mask|learn|supervis|weight", re.IGNORECASE)
_FLAG_OF_A_ROW = re.compile(
    r"((is|do|no|not|skip|use)_)*(train(ed|able|ing)?|learn|loss|masked|weights?"
    r"|((train|loss|labels?)_)?mask|(loss|sample|example)_weights?)",
    re.IGNORECASE,
)


def value_of(item: Mapping[Any, Any], names: Collection[str]) -> Any:
    """Return the value that stands under one of `names`; None if there is none.

    Raises:
        RowError: two of them hold different values.
    """
    if not any(map(item.__contains__, names)):  # as for most names, and quick
        return None
    found = [(name, item[name]) for name in names if name in item and not _is_empty(item[name])]
    for name, value in found[1:]:
        if value != found[0][1]:
            raise RowError(f"{found[0][0]} and {name} differ")
    return found[0][1] if found else None


def is_trained(message: Mapping[Any, Any]) -> bool:
    """Return whether a message's flags let it be trained.

    Raises:
        RowError: a flag is not true or false, or two of them disagree.
    """
    if FLAGS.keys().isdisjoint(message):  # as in most rows, and quick
        return True
    flags = {name: message[name] for name in FLAGS if message.get(name) is not None}
    for name, value in flags.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowError(f"a message's {name} is not 0 or 1")
    meant = {bool(value) == FLAGS[name] for name, value in flags.items()}
    if len(meant) > 1:
        raise RowError(f"a message's {' and '.join(sorted(flags))} disagree")
    return meant != {False}


def without(row: Mapping[str, Any], ignored: Collection[str]) -> Mapping[str, Any]:
    """Return the row without the columns, and the keys of messages, that the recipe ignores."""

    def kept(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if name not in ignored}

    if not ignored:
        return row
    return {
        name: [kept(item) if isinstance(item, Mapping) else item for item in value]
        if isinstance(value, list)
        else value
        for name, value in kept(row).items()
    }


def unread_names(
    row: Mapping[str, Any], columns: Collection[str], turns: Iterable[Any]
) -> tuple[str, ...]:
    """Name what a row holds and no format reads: columns, and keys of messages as `messages.KEY`.

    Args:
        columns: those that are read.
        turns: the row's messages as they are written.

    Raises:
        BadInput: a name may say what not to train.
    """
    found = [name for name, value in row.items() if name not in columns and not _is_empty(value)]
    for name in found:
        if _FLAG_OF_A_ROW.fullmatch(name):
            raise _unknown_flag("a row has the column", name)
    names = [*found, *(f"messages.{key}" for key in dict.fromkeys(_unread_keys(turns)))]
    # each once, as two long names may look the same
    return tuple(dict.fromkeys(printable(name, 60) for name in names))


def _unread_keys(turns: Iterable[Any]) -> Iterator[str]:
    for turn in turns:
        if not isinstance(turn, Mapping):
            continue
        known = SHAREGPT_KEYS if "from" in turn else MESSAGE_KEYS
        for key, value in turn.items():
            if key not in known and not _is_empty(value):
                if _FLAG_OF_A_MESSAGE.search(str(key)):
                    raise _unknown_flag("a message has the key", key)
                yield str(key)


def _unknown_flag(where: str, name: Any) -> BadInput:
    shown = printable(name, 60)
    return BadInput(
        f"data: {where} `{shown}`, which may say what not to train, and nothing reads it; write "
        f"`weight: 0` or 1 in the messages, or set data.ignore_columns=[{shown}]"
    )


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | Mapping) and not value)
