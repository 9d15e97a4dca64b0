"""Turn the fields of a raw row into a Conversation, whatever the row's format.

The fields of a row enter, as plain values; a `Conversation` leaves, or a `RowError` whose reason
can be counted. Formats: messages; ShareGPT's conversations; prompt and completion; instruction,
input and output (Alpaca); question and answer; text. Every format but text may have the columns
`system` and `tools`. What else the columns and keys are called: data/names.py.

A source has one format, that of its first row. A row of another format is rejected: choosing row by
row would hide a column that is misspelt here and there, and train what nobody asked for. Files of
several formats are several sources. Whatever a row holds, only a RowError is raised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain
from string import ascii_uppercase
from typing import Any, TypeGuard

from packhorse.trainer.config.data import Source
from packhorse.trainer.data.names import (
    CALLS,
    COLUMN_SYNONYMS,
    REASONING,
    is_trained,
    unread_names,
    value_of,
    without,
)
from packhorse.trainer.datatypes import BadInput, Conversation, Message, RowError
from packhorse.trainer.utils.strict_json import MAX_DEPTH, parse

# Columns that a format cannot do without; the order is the order of recognition.
REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "question_answer": ("question", "answer"),
    "text": ("text",),
}
OPTIONAL = {
    "instruction": ("input", "history", "system", "tools"),
    "question_answer": ("context", "choices", "system", "tools"),
    "text": (),
}
OF_ALL = ("system", "tools")  # of the other formats
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response"), "tool"),
}
SHAREGPT_CALLS = ("function_call", "tool_call")  # the value is a call, or a list of calls, as JSON
TURNS = ("messages", "conversations", "prompt", "completion")  # columns that may hold messages
NO_INPUT = "<noinput>"  # Alpaca's seeds write it where there is none


def detect_format(columns: Iterable[str], source: Source) -> str:
    """Return the format of rows with these columns: the recipe's, else the first of REQUIRED that
    is complete.

    Raises:
        BadInput: no format fits; it lists the columns and shows how to map them.
    """
    found, place = list(columns), source.path or source.name or "the source"
    listed = "no columns"
    if found:
        more = f" and {len(found) - 20} more" if len(found) > 20 else ""
        listed = f"the columns {', '.join(name[:60] for name in found[:20])}{more}"
    optional = dict.fromkeys([*chain(*OPTIONAL.values()), *OF_ALL])
    known = [*chain(*REQUIRED.values()), *optional]
    # A column that is misspelt in the recipe would leave its part out of every row.
    for ours, theirs in source.columns.items():
        if ours not in known:
            raise BadInput(
                f"{place}: `columns` maps the unknown name `{ours}`; known: {', '.join(known)}"
            )
        if theirs not in found and ours not in optional:
            raise BadInput(f"{place}: `columns` names `{theirs}`, but the rows have {listed}")
    wanted = REQUIRED if source.format == "auto" else {source.format: REQUIRED[source.format]}
    for format_name, names in wanted.items():
        if all(source.columns.get(name, name) in found for name in names):
            return format_name
    choices = "; ".join("+".join(names) for names in wanted.values())
    raise BadInput(
        f"{place}: the rows have {listed}, and none of these sets of columns is there: {choices}; "
        "name them in the recipe, as `columns: {question: Problem, answer: Solution}`"
    )


def to_conversation(
    fields: Mapping[str, Any],
    format: str,
    columns: Mapping[str, str],
    ignored: Collection[str] = (),
) -> Conversation:
    """Return the row as a conversation with at least one answer, or as a text.

    Args:
        fields: the row, with values as JSON has them.
        format: a key of REQUIRED.
        columns: the row's names by ours, where they differ.
        ignored: columns, and keys of messages, to pass over.

    Raises:
        RowError: the row cannot be used.
        BadInput: a name that nobody reads may say what not to train.
    """
    fields = without(fields, ignored)
    row: dict[str, Any] = {}
    read: set[str] = set()
    for name in (*REQUIRED[format], *OPTIONAL.get(format, OF_ALL)):
        theirs = (columns[name],) if name in columns else (name, *COLUMN_SYNONYMS.get(name, ()))
        value = value_of(fields, theirs)
        # an empty text has reasons of its own
        row[name] = fields.get(theirs[0]) if value is None else value
        read.update(theirs)
        if row[name] is None and name in REQUIRED[format]:
            raise RowError(f"no {name}")
    turns = [turn for name in TURNS if isinstance(row.get(name), list) for turn in row[name]]
    unread = unread_names(fields, read, turns)
    if format == "text":
        return Conversation(text=_text(row["text"], "text"), unread=unread)
    messages = _with_system(row["system"], _READERS[format](row))
    _check_order(messages)
    return Conversation(messages=messages, tools=_tools(row["tools"]), unread=unread)


# ------------------------------------------------------------------------------------------ formats


def _from_sharegpt(row: dict[str, Any]) -> tuple[Message, ...]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise RowError("conversations are not a list of turns")
    return tuple(_message(_sharegpt_turn(turn)) for turn in turns)


def _sharegpt_turn(turn: Any) -> Any:
    """Return the turn as a message; many files hold messages under `conversations` already."""
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    role, value = turn["from"], turn.get("value")
    rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
    if role in SHAREGPT_CALLS:
        calls = _parsed(value, "function_call") if isinstance(value, str) else value
        calls = calls if isinstance(calls, list) else [calls]
        calls = [{"function": call} for call in calls]
        return {**rest, "role": "assistant", "content": "", "tool_calls": calls}
    return {**rest, "role": role, "content": value}


def _from_prompt_completion(row: dict[str, Any]) -> tuple[Message, ...]:
    """Read two strings as a question and its answer, and lists as messages."""
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list):
        prompt = [{"role": "user", "content": _text(prompt, "prompt")}]
    after = _messages(completion) if isinstance(completion, list) else (_answer(completion),)
    return _messages(prompt) + after


def _from_instruction(row: dict[str, Any]) -> tuple[Message, ...]:
    task = _text(row["instruction"], "instruction")
    given = row["input"]
    if given is not None and not isinstance(given, str):
        raise RowError("input is not a string")
    if given and given.strip() and given.strip().lower() != NO_INPUT:
        task = f"{task}\n\n{_text(given, 'input')}"
    history = [] if row["history"] is None else row["history"]  # pairs of a question and its answer
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise RowError("history is not a list of pairs")
    turns = [(_text(question, "question"), answer) for question, answer in history]
    turns.append((task, row["output"]))
    return tuple(
        message
        for question, answer in turns
        for message in (Message("user", question), _answer(answer))
    )


def _from_question_answer(row: dict[str, Any]) -> tuple[Message, ...]:
    """Read a question below its context and above its choices, which have letters."""
    parts = [_text(row["question"], "question")]
    answer, choices = row["answer"], row["choices"]
    if row["context"]:
        parts.insert(0, _text(row["context"], "context"))
    if choices:
        if not isinstance(choices, list) or len(choices) > len(ascii_uppercase):
            raise RowError("choices are not a list of up to 26 texts")
        texts = [_text(choice, "choice") for choice in choices]
        parts.append("\n".join(f"{a}. {text}" for a, text in zip(ascii_uppercase, texts)))
        # many files give the right choice by its number, from 0
        if type(answer) is int and 0 <= answer < len(choices):
            answer = ascii_uppercase[answer]
    return Message("user", "\n\n".join(parts)), _answer(answer)


def _answer(value: Any) -> Message:
    return Message("assistant", _text(value, "answer"))


_READERS: dict[str, Callable[[dict[str, Any]], tuple[Message, ...]]] = {
    "messages": lambda row: _messages(row["messages"]),
    "sharegpt": _from_sharegpt,
    "prompt_completion": _from_prompt_completion,
    "instruction": _from_instruction,
    "question_answer": _from_question_answer,
}


def _with_system(system: Any, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Put the row's `system` column first; some files write the same text in both places."""
    if system is None or (isinstance(system, str) and not system.strip()):
        return messages
    text = _text(system, "system")
    written = [message.content for message in messages if message.role in ("system", "developer")]
    if written and written != [text]:
        raise RowError("a system column beside another system message")
    return messages if written else (Message("system", text), *messages)


# ----------------------------------------------------------------------------------------- messages


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RowError("messages are not a list of messages")
    return tuple(_message(item) for item in value)


def _message(item: Any) -> Message:
    if not isinstance(item, Mapping):
        raise RowError("a message is not an object")
    role = item.get("role")
    if not isinstance(role, str):
        raise RowError("a message has no role")
    if role not in ROLES:
        raise RowError(f"unknown role {role[:40]!r}")
    role = ROLES[role]
    calls = _tool_calls(value_of(item, CALLS))
    reasoning = _optional_string(value_of(item, REASONING), "reasoning_content")
    if calls and role != "assistant":
        raise RowError("tool calls outside an assistant message")
    return Message(
        role=role,
        content=_content(item.get("content"), may_be_empty=bool(calls or reasoning)),
        reasoning_content=reasoning,
        tool_calls=calls,
        tool_call_id=_optional_string(item.get("tool_call_id"), "tool_call_id"),
        name=_optional_string(item.get("name"), "name"),
        weight=int(is_trained(item)),
    )


def _content(value: Any, *, may_be_empty: bool) -> str:
    """Read a string, a list of text parts, or null beside calls or reasoning.

    Parts are lines of their own, as vLLM serves them to templates that take a string.
    """
    if value is None and may_be_empty:
        return ""
    if isinstance(value, str):
        return _unicode(value)
    if not isinstance(value, list):
        raise RowError("content is not text")
    texts = []
    for part in value:
        if isinstance(part, Mapping) and part.get("type", "text") == "text":
            part = part.get("text")
        if not isinstance(part, str):
            raise RowError("content has parts that are not text")
        texts.append(_unicode(part))
    return "\n".join(texts)


def _tool_calls(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Read calls in OpenAI's form, or a function's name and arguments alone.

    Arguments that are JSON strings become objects: templates write objects as JSON, and would quote
    a string twice.
    """
    if value is None:
        return ()
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise RowError("tool calls are not a list")
    calls = []
    for call in map(_plain, value):
        if _is_named(call) and "function" not in call:
            call = {"function": call}
        function = call.get("function") if isinstance(call, dict) else None
        if not _is_named(function):
            raise RowError("a tool call names no function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _parsed(arguments, "tool-call arguments") if arguments.strip() else {}
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise RowError("tool-call arguments are not an object")
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return tuple(calls)


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Read the functions that the row offers: a list of objects, or that list as a JSON string."""
    if isinstance(value, str):
        value = _parsed(value, "tools") if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RowError("tools are not a list")
    tools = tuple(map(_plain, value))
    if not all(isinstance(tool, dict) and _is_named(tool.get("function", tool)) for tool in tools):
        raise RowError("a tool names no function")
    # Templates look for the function inside, as servers send it, and would pass over a bare one.
    return tuple(
        {"type": "function", **(tool if "function" in tool else {"function": tool})}
        for tool in tools
    )


def _is_named(function: Any) -> TypeGuard[dict[str, Any]]:
    name = function.get("name") if isinstance(function, dict) else None
    return isinstance(name, str) and bool(name)


def _check_order(messages: tuple[Message, ...]) -> None:
    """Refuse what no template is made for: an answer before any question, an empty answer, a tool
    result without a call."""
    if all(message.role != "assistant" for message in messages):
        raise RowError("no answer")
    called = False
    for number, message in enumerate(messages):
        if message.role == "assistant":
            if all(earlier.role in ("system", "developer") for earlier in messages[:number]):
                raise RowError("an answer comes before any question")
            reasoning = message.reasoning_content or ""
            if not (message.content.strip() or message.tool_calls or reasoning.strip()):
                raise RowError("no answer")
            called = called or bool(message.tool_calls)
        elif message.role == "tool" and not called:
            raise RowError("a tool result without a tool call")


# ------------------------------------------------------------------------------------------- values


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name} is not a string")
    if not value.strip():
        raise RowError(f"no {name}")
    return _unicode(value)


def _optional_string(value: Any, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise RowError(f"{name} is not a string")
    return None if value is None else _unicode(value)


def _parsed(text: str, name: str) -> Any:
    try:
        return _plain(parse(text))
    except RowError as error:
        raise RowError(f"{name}: {error}") from None


def _plain(value: Any, depth: int = 0) -> Any:
    """Copy plain JSON values; anything else, or nesting beyond MAX_DEPTH, rejects the row."""
    if depth > MAX_DEPTH:
        raise RowError("nested too deeply")
    if isinstance(value, str):
        return _unicode(value)
    if isinstance(value, int | None) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {_unicode(key): _plain(item, depth + 1) for key, item in value.items()}
    raise RowError("a value that JSON does not have")


def _unicode(text: str) -> str:
    # JSON can write half a surrogate pair, which no tokenizer can read.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("half a surrogate pair in the text") from None
    return text
