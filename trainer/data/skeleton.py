"""Placeholders for the texts of a conversation, and the skeleton of template text between them.

The messages and tools of a row enter `Placeholders`; their shape and their texts leave. Rendered,
the shape gives a `Skeleton`, and `match_texts` compares it with the render of the row itself; the
result is a `Render`, in which every character has a known origin. `trainer/data/chat_template.py`
says why this is done.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PLACEHOLDER_FORMAT = "zq%04dqz"
PLACEHOLDER = re.compile(r"zq(\d{4,})qz")


class Place(NamedTuple):
    """A character of template text: `offset` in literal number `literal`."""

    literal: int
    offset: int


@dataclass(frozen=True)
class Turn:
    """An answer, from `start` to the end of its stop token.

    Attributes:
        before: number of the last control token of the render before `start`; -1 if there is none.
        stop: number of the control token that ends the answer.
        newline: only white space stands between the stop token and the next control token, or the
            end of the text.
    """

    start: Place
    before: int
    stop: int
    newline: bool


@dataclass(frozen=True)
class Skeleton:
    """The render of a shape: `literals` (n + 1) of template text with `slots` (n) between them.

    Attributes:
        slots: numbers of the texts that the template writes, in its order.
        owners: by the number of a text, the message and the field that it came from.
        controls: places of the control tokens in the literals, in order.
        control_ids: their token ids.
        marks: spans that the template itself marks as generated.
        cut: characters at the end of the template's own text that `literals` leaves out.
        added: the stop token in their place that the template does not write.
        turns: by the number of a message, the answers that have been found so far.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    owners: list[tuple[int, str]]
    literals: list[str]
    slots: list[int]
    controls: list[Place]
    control_ids: list[int]
    marks: list[tuple[Place, Place]]
    cut: int = 0
    added: str = ""
    turns: dict[int, Turn] = field(default_factory=dict)


@dataclass(frozen=True)
class Render:
    """A rendered row: `starts[i]` is where literal i begins in `text`."""

    text: str
    skeleton: Skeleton
    starts: list[int]

    def position(self, place: Place) -> int:
        """Return the index in `text` of a character of template text."""
        return self.starts[place.literal] + place.offset


class Placeholders:
    """Puts placeholders where texts stand in the messages and tools of a row.

    White space at the ends of a text stays outside its placeholder, so that a template strips the
    same from both. `texts[n]` is what placeholder n stands for, `owners[n]` its message and field;
    tools belong to message -1.

    Args:
        keep: strings that are left standing in the texts, as the template compares with them.
        opening: what an answer may begin with that is left standing, too.
    """

    def __init__(self, keep: re.Pattern[str] | None, opening: str) -> None:
        self._keep, self._opening = keep, opening
        self.texts: list[str] = []
        self.owners: list[tuple[int, str]] = []

    def shape(
        self, messages: list[dict[str, Any]], tools: list[Any] | None
    ) -> tuple[list[dict[str, Any]], list[Any] | None]:
        """Return the messages and tools without their texts: all that a template may branch on."""
        # tools first: the numbers of the placeholders are part of the skeletons' keys
        tools = tools and [self._tool(tool, -1, "tools") for tool in tools]
        return [self._message(number, message) for number, message in enumerate(messages)], tools

    def _message(self, number: int, message: dict[str, Any]) -> dict[str, Any]:
        shape = dict(message)
        for name in ("reasoning_content", "content"):
            if name in shape:
                text, kept = message[name], ""
                if (message["role"], name) == ("assistant", "content"):
                    says_more = (
                        text.startswith(self._opening) and text[len(self._opening) :].strip()
                    )
                    kept = self._opening if says_more else ""
                shape[name] = kept + self._text(text.removeprefix(kept), (number, name))
        if "tool_calls" in shape:
            shape["tool_calls"] = [
                self._tool(call, number, "tool_calls") for call in shape["tool_calls"]
            ]
        return shape

    def _tool(self, tool: Any, number: int, name: str) -> Any:
        """Replace the name of a tool's or a call's function, and the strings in its arguments."""
        if "function" in tool:
            return {**tool, "function": self._tool(tool["function"], number, name)}
        shape = {**tool, "name": self._text(tool["name"], (number, name))}
        if "arguments" in shape:
            shape["arguments"] = self._strings(shape["arguments"], (number, name))
        return shape

    def _strings(self, value: Any, owner: tuple[int, str]) -> Any:
        if isinstance(value, str):
            return self._text(value, owner)
        if isinstance(value, dict):
            return {key: self._strings(item, owner) for key, item in value.items()}
        return [self._strings(item, owner) for item in value] if isinstance(value, list) else value

    def _text(self, text: str, owner: tuple[int, str]) -> str:
        if self._keep is None:
            return self._placeholder(text, owner)
        # split() gives texts at even places and the kept strings at odd ones
        return "".join(
            part if place % 2 else self._placeholder(part, owner)
            for place, part in enumerate(self._keep.split(text))
        )

    def _placeholder(self, text: str, owner: tuple[int, str]) -> str:
        core = text.strip()
        if not core:
            return text
        self.texts.append(core)
        self.owners.append(owner)
        start = len(text) - len(text.lstrip())
        placeholder = PLACEHOLDER_FORMAT % (len(self.texts) - 1)
        return text[:start] + placeholder + text[start + len(core) :]


def match_texts(text: str, skeleton: Skeleton, texts: list[str]) -> list[int] | None:
    """Return where each literal begins in `text`, or None if the skeleton does not fit.

    It fits if `text` is exactly the literals with the texts between them.
    """
    position, starts = 0, []
    literals = skeleton.literals
    for number, slot in enumerate(skeleton.slots):
        starts.append(position)
        if not text.startswith(literals[number], position):
            return None
        position += len(literals[number])
        # The next literal is compared, too: an escaped text may begin like the text as it is.
        for form in _written_forms(texts[slot]):
            if text.startswith(form, position) and text.startswith(
                literals[number + 1], position + len(form)
            ):
                position += len(form)
                break
        else:
            return None
    starts.append(position)
    return starts if text[position:] == literals[-1] else None


def _written_forms(text: str) -> Iterator[str]:
    """Yield a text as it is, and inside JSON, with and without escapes for what is not ASCII."""
    yield text
    yield from (json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))


def split_at_last(text: str) -> tuple[int | None, str]:
    """Return the number of the last placeholder in `text` (or None), and what follows it."""
    *_, number, tail = [None, *PLACEHOLDER.split(text)]
    return (None if number is None else int(number)), tail or ""


def place_of(text: str, position: int) -> Place:
    """Return the place of a position in a skeleton's text that is not inside a placeholder."""
    ends = [match.end() for match in PLACEHOLDER.finditer(text) if match.end() <= position]
    return Place(len(ends), position - (ends[-1] if ends else 0))
