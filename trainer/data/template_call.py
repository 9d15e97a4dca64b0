"""Call a chat template with messages in the form that it takes.

The source and messages enter; transformers' render leaves, or a RowError that says what the
template refuses.
"""

from __future__ import annotations

import json
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from packhorse.trainer.data.template_source import not_jinja
from packhorse.trainer.datatypes import RowError
from packhorse.trainer.utils.text import one_line
from packhorse.trainer.utils.time_limit import OutOfTime, interrupted_after

Messages = list[dict[str, Any]]

PLAIN_TYPES = {str, int, float, bool, type(None)}
PLAIN_MESSAGE = {"role", "content"}
RETURN_MASK = "return_assistant_tokens_mask"

RENDER_S = 3.0  # of processor time for one conversation


def call_template(
    source: str, messages: Messages, tools: list[Any] | None, variables: dict[str, Any]
) -> Any:
    """Return what transformers' render_jinja_template returns.

    Raises:
        RowError: the template raises an error of whatever kind.
        BadInput: the template is not valid Jinja.
    """
    # gpt-oss's template reads reasoning as thinking, which transformers 5.17 does not fill in
    messages = [
        {"thinking": message["reasoning_content"], **message}
        if "reasoning_content" in message
        else message
        for message in messages
    ]
    try:
        return _render(source, messages, tools, variables)
    except OutOfTime:
        raise RowError(f"the template is not finished within {RENDER_S:g} s of computing") from None
    except jinja2.TemplateSyntaxError as error:
        raise not_jinja(error) from None
    except Exception as error:  # whatever the template's own code does, as recursing for ever
        # some templates paste a call's arguments instead of writing them as JSON
        pasted = _with_arguments_as_text(messages)
        if pasted != messages:
            return call_template(source, pasted, tools, variables)
        said = one_line(error, 100) or type(error).__name__
    for role in sorted({message["role"] for message in messages} - {"user", "assistant"}):
        rest = [message for message in messages if message["role"] != role]
        if _try(source, rest, tools, variables):
            raise RowError(f"the template refuses the {role} message ({said}); {mend_role(role)}")
    raise RowError(f"the template refuses the row: {said}")


def _render(
    source: str, messages: Messages, tools: list[Any] | None, variables: dict[str, Any]
) -> Any:
    is_plain = (
        tools is None
        and RETURN_MASK not in variables
        and PLAIN_TYPES.issuperset(map(type, variables.values()))
        and all(message.keys() == PLAIN_MESSAGE for message in messages)
    )
    with interrupted_after(RENDER_S):
        if is_plain:  # nothing that transformers would copy or rename: a twentieth of all time
            template = _compile_jinja_template(source)
            return [template.render(messages=messages, tools=None, documents=None, **variables)], []
        return render_jinja_template([messages], tools=tools, chat_template=source, **variables)


def mend_role(role: str) -> str:
    """Say what a user can do about messages of a role that the template does not write."""
    column = ", leave the column out (data.ignore_columns)" if role == "system" else ""
    return (
        f"give a model.chat_template that writes it{column}, or join it to another message by a "
        "function of yours (data.train.function)"
    )


def wants_parts(source: str, variables: dict[str, Any]) -> bool:
    """Return whether the template reads texts from lists of parts alone, as Idefics 3's does."""
    word = "zq0000qz"
    question = {"role": "user", "content": word}
    from_parts = _try(source, [with_parts(question)], None, variables)
    # a template that prints what it is given would print the list itself
    reads_parts = word in from_parts and "'text'" not in from_parts.lower()
    return reads_parts and word not in _try(source, [question], None, variables)


def with_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with its text as a list of one part."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _try(
    source: str, messages: Messages, tools: list[Any] | None, variables: dict[str, Any]
) -> str:
    """Return the template's text of the messages; nothing, if it refuses them."""
    try:
        texts, _ = _render(source, messages, tools, variables)
    except Exception:  # only tried out: the render of a row says what is wrong
        return ""
    return texts[0]


def _with_arguments_as_text(messages: Messages) -> Messages:
    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function", {})
        if not isinstance(function.get("arguments"), dict):
            return call
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}

    return [
        {**message, "tool_calls": [as_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]
