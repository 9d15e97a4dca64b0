"""Choose the answers to train, find where each begins and ends in its render, and prove it.

A `Skeleton` and the number of an assistant message enter; a `Turn` leaves, or a RowError.

*Where an answer begins.* Where the generation prompt ends: the model must write all that follows.
The prompt of turn t is the render of the messages before it with `add_generation_prompt`; the part
after its last text must open the literal that follows the same text in the whole render. What comes
earlier may differ (mistral_nemo moves its tools), and a template without a generation prompt
(llama2) needs no exception. So an empty `<think>` block after the generation prompt is part of the
answer, as the model will have to write it.

*Where it ends.* With the stop token. Of the control tokens that follow its last text both where the
conversation ends there and where it continues, it is EOS, else the last of them if they stand
together. (An answer may hold others, as around tool calls; and what closes a whole conversation is
not the answer's.) A template that writes none is refused, and so is an answer that ends otherwise
when more follows: a model that has learned that end would not stop. Where a template marks answers
by {% generation %}, one mark must hold all of an answer's texts, and no other text; the answer then
begins with the mark and the white space before it, but never inside the generation prompt.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from os.path import commonprefix
from typing import Any

from packhorse.trainer.data.chat_template import Template
from packhorse.trainer.data.skeleton import (
    PLACEHOLDER,
    PLACEHOLDER_FORMAT,
    Place,
    Render,
    Skeleton,
    Turn,
    split_at_last,
)
from packhorse.trainer.datatypes import Message, RowError

FIELD_NAMES = {
    "content": "the content",
    "reasoning_content": "the reasoning",
    "tool_calls": "tool calls",
}


def choose_turns(messages: Sequence[Message], train_on: str) -> list[int]:
    """Return the numbers of the messages whose turns are trained; under `all`, left out."""
    answers = answers_of(messages)
    if train_on == "all":
        if any(message.weight == 0 and message.role != "assistant" for message in messages):
            raise RowError("weight 0 on a message that is not an answer, under train_on: all")
        if any(_is_empty(messages[number]) for number in answers):
            raise RowError("no answer")
        return [number for number in answers if messages[number].weight == 0]
    if train_on == "completion":
        answers = answers[-1:]
    elif train_on == "last_turn":
        users = [number for number, message in enumerate(messages) if message.role == "user"]
        answers = [number for number in answers if number > max(users, default=-1)]
    chosen = [number for number in answers if messages[number].weight]
    if not chosen:
        raise RowError("nothing to train")
    if any(_is_empty(messages[number]) for number in chosen):
        raise RowError("no answer")
    return chosen


def answers_of(messages: Sequence[Message]) -> list[int]:
    """Return the numbers of the assistant's messages."""
    return [number for number, message in enumerate(messages) if message.role == "assistant"]


def _is_empty(message: Message) -> bool:
    texts = message.content.strip(), (message.reasoning_content or "").strip()
    return not (any(texts) or message.tool_calls)


def find_turn(template: Template, skeleton: Skeleton, message: int) -> Turn:
    """Return the bounds of the answer in message number `message`.

    Raises:
        RowError: they cannot be proved.
    """
    if message not in skeleton.turns:
        skeleton.turns[message] = _prove_turn(template, skeleton, message)
    return skeleton.turns[message]


def require_whole(skeleton: Skeleton, message: int) -> None:
    """Raise RowError if the template leaves out a part of an answer that is to be trained."""
    for dropped in set(range(len(skeleton.owners))) - set(skeleton.slots):
        owner, name = skeleton.owners[dropped]
        if owner == message:
            advice = _advise(skeleton, message, "give a model.chat_template that keeps it")
            raise RowError(f"the template drops {FIELD_NAMES[name]} of an answer; {advice}")


def _prove_turn(template: Template, skeleton: Skeleton, message: int) -> Turn:
    slots, literals = skeleton.slots, skeleton.literals
    require_whole(skeleton, message)
    prompt = template.render(skeleton.messages[:message], skeleton.tools, prompt=True)
    last_text, header = split_at_last(prompt)
    # the literals before which the answer's own texts may begin
    begins = [
        index
        for index, slot in enumerate([None, *slots])
        if slot == last_text and literals[index].startswith(header)
    ]
    if not begins:
        raise RowError(explain_beginning(skeleton, message, last_text, header))
    until_here = template.render_answer(skeleton.messages[: message + 1], skeleton.tools)
    *_, closing = parts = PLACEHOLDER.split(until_here)
    # The answer's own texts are those at the end, from the first that belongs to it.
    texts = [int(number) for number in parts[1::2]]
    while texts and skeleton.owners[texts[0]][0] != message:
        texts.pop(0)
    if not texts:  # as of an answer that is `</think>` alone
        raise RowError("no answer")
    begins = [index for index in begins if slots[index : index + len(texts)] == texts]
    own = {number for number, (owner, _) in enumerate(skeleton.owners) if owner == message}
    # Two places would be a guess, and a text elsewhere would be trained without being an answer.
    if len(begins) != 1 or set(texts) != own:
        raise RowError("the template writes an answer out of its place")
    first, last = begins[0], begins[0] + len(texts)
    stop = _find_stop_token(template, skeleton, message, texts[-1], closing, literals[last])
    # The template wrote the header; the model writes what follows it in the same literal.
    start = Place(first, len(header))
    if skeleton.marks:
        start = _marked_start(skeleton, start, Place(last, 0), Place(last, stop.end()))
    number = skeleton.controls.index(Place(last, stop.start()))
    before = sum(place < start for place in skeleton.controls) - 1
    return Turn(start, before, number, _is_blank_after(skeleton, number, stop.end()))


def find_last_stop(template: Template, skeleton: Skeleton) -> re.Match[str]:
    """Find the control token that ends the answer at the end of a render, in its last literal.

    Raises:
        RowError: there is none, or it is not clear which one it is.
    """
    closing = skeleton.literals[-1]
    last = len(skeleton.messages) - 1
    return _find_stop_token(template, skeleton, last, skeleton.slots[-1], closing, closing)


def _find_stop_token(
    template: Template, skeleton: Skeleton, message: int, text: int, closing: str, literal: str
) -> re.Match[str]:
    """Find the control token that ends an answer.

    Args:
        text: number of the answer's last text.
        closing: what follows that text where the conversation ends with the answer.
        literal: what follows it in the skeleton.
    """
    controls = template.find_controls(closing)
    if not controls:
        raise RowError(
            "the template writes no stop token after an answer, and the tokenizer has no EOS; name "
            "the token that ends an answer as data.stop_token"
        )
    is_last = message + 1 == len(skeleton.messages)
    # The skeleton ends with the last answer, so the conversation is continued by a question.
    if is_last:
        more = [*skeleton.messages, {"role": "user", "content": "x"}]
        try:
            continued = template.render(more, skeleton.tools)
        except RowError:  # no question may follow here, as after a tool call
            continued = ""
        literal = continued.rpartition(PLACEHOLDER_FORMAT % text)[2]
    shared = [match for match in controls if literal.startswith(closing[: match.end()])]
    if not (shared or is_last):
        raise RowError("the template ends an answer otherwise when more follows")
    shared = shared or controls  # an answer that ends otherwise when none follows
    named = template.control_ids.get(template.stop_token or "")
    eos: Any = template.tokenizer.eos_token_id
    configured = template.generation_eos
    for ends in ({named}, {eos}, configured) if named is None else ({named},):
        for match in shared:
            if template.control_ids[match[0]] in ends:
                return match  # what follows would belong to the next turn
    if named is not None:
        raise RowError(f"the template ends an answer with {shared[-1][0]}, not data.stop_token")
    if any(one.end() < other.start() for one, other in pairwise(shared)):
        raise RowError(
            "several control tokens close an answer, and none is the tokenizer's EOS; name "
            "the one that ends it as data.stop_token"
        )
    return shared[-1]


def choose_own_controls(template: Template, render: Render, found: list[int]) -> list[int]:
    """Return which of the control tokens `found` in a row are the template's; texts may hold
    others.

    Raises:
        RowError: a text has changed one of the template's.
    """
    matches = template.find_controls(render.text)
    own = {render.position(place) for place in render.skeleton.controls}
    chosen = [number for number, match in enumerate(matches) if match.start() in own]
    if [template.control_ids[match[0]] for match in matches] != found:
        raise RowError("control tokens in a text do not come out as they are spelt")
    if [found[number] for number in chosen] != render.skeleton.control_ids:
        raise RowError("a text runs into a control token of the template")
    for match in matches:
        literal = bisect_right(render.starts, match.start()) - 1
        text_start = render.starts[literal] + len(render.skeleton.literals[literal])
        text_stop = [*render.starts, len(render.text)][literal + 1]
        # One that is not the template's must lie within a text, or it has eaten template text.
        in_text = text_start <= match.start() < match.end() <= text_stop
        if match.start() not in own and not in_text:
            raise RowError("a text runs into a control token of the template")
    return chosen


def _marked_start(skeleton: Skeleton, start: Place, text_end: Place, stop: Place) -> Place:
    """Return where an answer begins that the template itself marks: not before the generation
    prompt ends, at `start`."""
    about = [(begin, end) for begin, end in skeleton.marks if end > start and begin < stop]
    if not about:
        raise RowError("the template's {% generation %} block leaves out an answer")
    (begin, _), (_, end) = about[0], about[-1]
    if len(about) > 1 or begin.literal > start.literal or end < text_end:
        raise RowError("the template's {% generation %} block leaves out a part of an answer")
    if begin.literal < start.literal or end.literal > text_end.literal:
        raise RowError("the template's {% generation %} block holds more than an answer")
    # white space before the mark that the generation prompt does not end with is the answer's, too
    between = skeleton.literals[start.literal][start.offset : begin.offset]
    return max(begin, start) if between.strip() else start


def _is_blank_after(skeleton: Skeleton, control: int, offset: int) -> bool:
    """Return whether only white space stands between a control token, which ends at `offset` in its
    literal, and the next one or the end."""
    literal = skeleton.controls[control].literal
    following = skeleton.controls[control + 1 : control + 2]
    if following and following[0].literal == literal:
        return skeleton.literals[literal][offset : following[0].offset].isspace()
    is_last = literal == len(skeleton.literals) - 1
    return is_last and skeleton.literals[literal][offset:].isspace()


def explain_beginning(skeleton: Skeleton, message: int, last_text: int | None, header: str) -> str:
    """Say why the answer does not begin where the generation prompt ends, and what to do."""
    why = "an answer does not begin where the generation prompt ends"
    agree = (
        "begin the answer with it, or set data.chat_template_kwargs or model.chat_template so that "
        "they agree"
    )
    for literal, slot in zip(skeleton.literals, [None, *skeleton.slots], strict=True):
        shared = commonprefix([header, literal])  # noqa: RUF071 - of characters, as is meant
        # white space that the literal has instead may be the answer's own
        if slot == last_text and shared and not literal[len(shared) :].strip():
            return f"{why}, with {header[len(shared) :]!r}; {_advise(skeleton, message, agree)}"
    return why


def _advise(skeleton: Skeleton, message: int, last: str) -> str:
    """Say what to do about an answer that is not rendered as it would be generated: `last`, if it
    is one of the last turn."""
    earlier = any(later["role"] == "user" for later in skeleton.messages[message + 1 :])
    return "data.train_on: last_turn leaves earlier answers out" if earlier else last
