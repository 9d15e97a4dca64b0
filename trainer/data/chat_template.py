"""What a chat template makes of a conversation, with the origin of every character.

A `Conversation` enters; a `Render` leaves: the rendered text, where each piece of template text
lies in it, and, for each answer, where it begins and ends. The method follows from how templates
work; there is no list of known models.

*Origin.* The conversation is rendered twice: as it is, and with every text that a row fills in
(contents, reasoning, strings in tool-call arguments, function names) replaced by a numbered word.
White space at a text's ends stays outside its word, so that a template strips the same from both.
Between the words of the second render stands template text (the `literals`). The first render must
be exactly these literals with the texts between them, each as it is or escaped as JSON: then every
character has a known origin. Otherwise the row is rejected. The second render depends on the row's
shape alone and is cached by it; the comparison is made for every row, so a wrong skeleton cannot
pass. Templates that look into a text (qwen3 splits at `</think>`) will not fit; then the strings
that the template itself compares with are left standing in the texts, so that both renders branch
alike, and the comparison is made again.

*Where an answer begins.* Where the generation prompt ends: all that follows must be written by the
model. The prompt of turn t is the render of the messages before it with `add_generation_prompt`;
the part after its last text must open the literal that follows the same text in the whole render.
What comes earlier may differ (mistral_nemo moves its tools about), and a template without a
generation prompt (llama2) needs no exception. So an empty `<think>` block after the generation
prompt is part of the answer, as the model will have to write it. Where the generation prompt ends
with a `<think>` that the template writes before no answer, an answer may bring it as the beginning
of its own text: there it is left standing in both renders, and stands before the answer like the
template's own text.

*Where it ends.* With the stop token. Of the control tokens that follow its last text both where the
conversation ends there and where it goes on, it is EOS, else the last of them if they stand
together. (An answer may hold others, as around tool calls; and what closes a whole conversation is
not the answer's.) A template that writes none is refused, and so is an answer that ends otherwise
when more follows: a model that has learned that end would not stop. Where a template marks answers
by {% generation %}, one mark must hold all of an answer's texts, and no other text; the answer then
begins with the mark, but never inside the generation prompt.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from os.path import commonprefix
from typing import Any, NamedTuple

import jinja2
import jinja2.defaults
import jinja2.meta
from jinja2 import nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from trainer.config.data import NO_KWARGS
from trainer.datatypes import BadInput, Conversation, RowError
from trainer.utils.text import one_line

# Templates that write the date get this one, so that tokenized data does not depend on the day it
# was made. The formats are those of strftime_now; llama3_2 takes `date_string`, which its authors
# fixed to the same day.
DATE_STRING = "26 Jul 2024"
DATE_PARTS = {
    "%d": "26",
    "%b": "Jul",
    "%B": "July",
    "%m": "07",
    "%Y": "2024",
    "%y": "24",
    "%A": "Friday",
    "%a": "Fri",
}
FIXED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('{code}', '{value}')" for code, value in DATE_PARTS.items())
    + " }}{% endmacro +%}"
)
FIELD_NAMES = {
    "content": "the content",
    "reasoning_content": "the reasoning",
    "tool_calls": "tool calls",
}
WORD_FORMAT = "zq%04dqz"
WORD = re.compile(r"zq(\d{4,})qz")
GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
MOST_SKELETONS = 4096
TEMPLATE_FUNCTIONS = {"raise_exception", "strftime_now"}
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
)


class Place(NamedTuple):
    """A character of template text: `offset` in literal number `literal`."""

    literal: int
    offset: int


@dataclass(frozen=True)
class Turn:
    """An answer: from `start` to the end of its stop token, the control token number `stop` of the
    render.

    `before` is the number of the last control token before `start`, -1 where there is none.
    `newline` says that nothing but white space stands between the stop token and the next control
    token (or the end).
    """

    start: Place
    before: int
    stop: int
    newline: bool


@dataclass(frozen=True)
class Skeleton:
    """The render of a shape: `literals` (n + 1) with `slots` (n) between them, numbers of texts.

    `owners[slot]` is the message and the field that the text came from; `controls` are the control
    tokens in the literals, in order, `control_ids` their ids. `turns` fills as turns are asked for.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    owners: list[tuple[int, str]]
    literals: list[str]
    slots: list[int]
    controls: list[Place]
    control_ids: list[int]
    marks: list[tuple[Place, Place]]  # what the template itself marks as generated
    turns: dict[int, Turn] = field(default_factory=dict)


@dataclass(frozen=True)
class Render:
    """A rendered row: `starts[i]` is where literal i begins in `text`."""

    text: str
    skeleton: Skeleton
    starts: list[int]

    def position(self, place: Place) -> int:
        return self.starts[place.literal] + place.offset

    def between(self, start: Place | None, stop: Place) -> str:
        """The text from `start` (the beginning where None) to `stop`."""
        return self.text[0 if start is None else self.position(start) : self.position(stop)]


class Template:
    """A tokenizer's chat template; keeps the skeletons of the shapes it has met.

    Args:
        kwargs: variables of the template, as apply_chat_template takes them.

    Raises:
        BadInput: the template reads no variable of that name.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.kwargs = dict(kwargs or {})
        added = {
            token.content: (number, token.special)
            for number, token in tokenizer.added_tokens_decoder.items()
        }
        # Tokens that only the template may write: a text that holds one would end or open turns.
        self.control_ids: dict[str, int] = {
            text: number for text, (number, special) in added.items() if special
        }
        self.control_ids |= dict(
            zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        )
        longest_first = sorted({*added, *self.control_ids}, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._skeletons: dict[str, Skeleton] = {}
        self._constants: dict[str, re.Pattern[str] | None] = {}
        self._openings: dict[str, str] = {}
        if self.kwargs:
            self._check_kwargs()
        self.control_ids |= {text: added[text][0] for text in self._turn_tokens()}

    def _turn_tokens(self) -> set[str]:
        """Added tokens that open and close turns, whether or not the tokenizer calls them special
        (some of DeepSeek's do not): those that stand before a user's text, and the one that begins
        an answer's header."""
        talk = [
            {"role": role, "content": WORD_FORMAT % n}
            for n, role in enumerate(("user", "assistant", "user"))
        ]
        try:
            literals = WORD.split(self.render(talk, None))[::2]
        except (
            BadInput,
            RowError,
        ):  # there is no template, or not for such messages; rows that need it are told why
            return set()
        if len(literals) != len(talk) + 1:
            return set()
        before_user = set(self._added.findall(literals[0] + literals[2]))
        header = [token for token in self._added.findall(literals[1]) if token not in before_user]
        return before_user.union(header[:1])

    def follow(self, conversation: Conversation, *, prompt: bool = False) -> Render:
        """Render a conversation with the origin of every character. Raises RowError where it cannot
        be known.
        """
        messages = [message.as_dict() for message in conversation.messages]
        tools = list(conversation.tools) or None
        text = self.render(messages, tools, prompt=prompt)
        opening = self.opening(None if tools is None else [])
        for keep in (None, self._compared_strings(tools)):
            words = _Words(keep, opening)
            shape = words.conversation(messages, tools)
            skeleton = self._skeleton(*shape, words.owners, prompt)
            starts = _fit(text, skeleton, words.texts)
            if starts is not None:
                return Render(text, skeleton, starts)
        raise RowError("the template changes a text in a way that cannot be followed")

    def turn(self, skeleton: Skeleton, message: int) -> Turn:
        """The bounds of the answer in message number `message`. Raises RowError where they cannot
        be proved.
        """
        if message not in skeleton.turns:
            skeleton.turns[message] = self._prove_turn(skeleton, message)
        return skeleton.turns[message]

    def require_whole(self, skeleton: Skeleton, message: int) -> None:
        """Raises RowError where the template leaves out a part of an answer that is to be learned."""
        for dropped in set(range(len(skeleton.owners))) - set(skeleton.slots):
            owner, name = skeleton.owners[dropped]
            if owner == message:
                advice = _mend(skeleton, message, "give a model.chat_template that keeps it")
                raise RowError(f"the template drops {FIELD_NAMES[name]} of an answer; {advice}")

    def render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, *, prompt: bool = False
    ) -> str:
        """The template's text; with `prompt`, ending with the generation prompt."""
        return self._render(messages, tools, add_generation_prompt=prompt)[0][0]

    def source(self, tools: list[Any] | None = None) -> str:
        """The template in use (a tokenizer may have another one for rows with tools), its clock
        stopped.

        Raises:
            BadInput: the tokenizer has none.
        """
        if self.tokenizer.chat_template is None:
            raise BadInput(
                "the tokenizer has no chat template, and the rows are conversations; "
                "set `model.chat_template: chatml`, or give a Jinja file there"
            )
        try:
            source = self.tokenizer.get_chat_template(tools=tools)
        except ValueError:
            raise BadInput(
                "the tokenizer has several chat templates and none named `default`; "
                "give the one to use, a Jinja file, as `model.chat_template`"
            ) from None
        return FIXED_CLOCK + source if "strftime_now" in source else source

    def _render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, **options: Any
    ) -> Any:
        source = self.source(tools)
        variables = {
            **self.tokenizer.special_tokens_map,
            "date_string": DATE_STRING,
            **self.kwargs,
            **options,
        }
        try:
            return render_jinja_template([messages], tools=tools, chat_template=source, **variables)
        except jinja2.TemplateSyntaxError as error:
            raise _not_jinja(error) from None
        except TEMPLATE_ERRORS as error:
            pasted = _with_arguments_as_text(messages)
            if (
                pasted != messages
            ):  # some templates paste a call's arguments instead of writing them as JSON
                return self._render(pasted, tools, **options)
            raise RowError(f"the template refuses the row: {one_line(error, 100)}") from None

    def _skeleton(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        owners: list[Any],
        prompt: bool,
    ) -> Skeleton:
        key = repr((messages, tools, prompt))
        skeleton = self._skeletons.get(key)
        if skeleton is None:
            if len(self._skeletons) >= MOST_SKELETONS:
                self._skeletons.clear()
            skeleton = self._skeletons[key] = self._build(messages, tools, owners, prompt)
        return skeleton

    def _build(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        owners: list[Any],
        prompt: bool,
    ) -> Skeleton:
        if any(self.controls(text) for text in _strings((messages, tools))):
            raise RowError("a text holds a control token of the model")
        if len(WORD.findall(repr((messages, tools)))) != len(owners):
            raise RowError(
                "a tool's schema holds a word that the proof of the mask puts in the place of texts"
            )
        marked = GENERATION.search(self.source(tools)) is not None
        texts, marks = self._render(
            messages, tools, return_assistant_tokens_mask=marked, add_generation_prompt=prompt
        )
        parts = WORD.split(texts[0])
        slots = [int(number) for number in parts[1::2]]
        # A tool's name may be written often, as beside its result; what was said may not.
        if any(
            count > 1 and "content" in owners[slot][1] for slot, count in Counter(slots).items()
        ):
            raise RowError("the template writes a text twice")
        _refuse_dropped(messages, owners, set(range(len(owners))) - set(slots))
        literals = parts[0::2]
        controls = [
            (Place(number, match.start()), self.control_ids[match[0]])
            for number, literal in enumerate(literals)
            for match in self.controls(literal)
        ]
        places = [
            (_place(texts[0], start), _place(texts[0], stop))
            for start, stop in _joined(marks[0] if marked else ())
        ]
        where, ids = [place for place, _ in controls], [number for _, number in controls]
        return Skeleton(messages, tools, owners, literals, slots, where, ids, places)

    def controls(self, text: str) -> list[re.Match[str]]:
        """Where `text` spells control tokens, as the tokenizer finds them: leftmost first, the
        longest of them.
        """
        return [match for match in self._added.finditer(text) if match[0] in self.control_ids]

    def _prove_turn(self, skeleton: Skeleton, message: int) -> Turn:
        slots, owners, literals = skeleton.slots, skeleton.owners, skeleton.literals
        self.require_whole(skeleton, message)
        prompt = self.render(skeleton.messages[:message], skeleton.tools, prompt=True)
        anchor, header = _after_last_word(prompt)
        after = (
            [0]
            if anchor is None
            else [index + 1 for index, slot in enumerate(slots) if slot == anchor]
        )
        after = [index for index in after if literals[index].startswith(header)]
        if not after:
            raise RowError(_beginning_elsewhere(skeleton, message, anchor, header))
        *_, closing = ended = WORD.split(
            self.render(skeleton.messages[: message + 1], skeleton.tools)
        )
        words = [int(number) for number in ended[1::2]]
        while words and owners[words[0]][0] != message:
            words.pop(0)
        if not words:  # as of one that is `</think>` alone
            raise RowError("no answer")
        after = [index for index in after if slots[index : index + len(words)] == words]
        if len(after) != 1 or set(words) != {
            n for n, (owner, _) in enumerate(owners) if owner == message
        }:
            raise RowError("the template writes an answer out of its place")
        first, last = after[0], after[0] + len(words)
        stop = self._stop_token(skeleton, message, words[-1], closing, literals[last])
        start = Place(first, len(header))
        if skeleton.marks:
            start = _marked_start(skeleton.marks, start, Place(last, 0), Place(last, stop.end()))
        number = skeleton.controls.index(Place(last, stop.start()))
        before = sum(place < start for place in skeleton.controls) - 1
        return Turn(start, before, number, _blank_after(skeleton, number, stop.end()))

    def _stop_token(
        self, skeleton: Skeleton, message: int, word: int, closing: str, literal: str
    ) -> re.Match[str]:
        """The control token in `closing` that ends an answer: one that follows its last `word` also
        where the conversation goes on, with `literal`."""
        controls = self.controls(closing)
        if not controls:
            raise RowError("the template writes no stop token after an answer")
        is_last = message + 1 == len(skeleton.messages)
        if is_last:
            try:
                more = self.render(
                    [*skeleton.messages, {"role": "user", "content": "x"}], skeleton.tools
                )
            except RowError:  # no question may follow here, as after a tool call
                more = ""
            literal = more.rpartition(WORD_FORMAT % word)[2]
        shared = [match for match in controls if literal.startswith(closing[: match.end()])]
        if not (shared or is_last):
            raise RowError("the template ends an answer otherwise when more follows")
        shared = shared or controls  # an answer that ends otherwise when none follows
        for match in shared:
            if self.control_ids[match[0]] == self.tokenizer.eos_token_id:
                return match  # what follows would belong to the next turn
        if any(one.end() < other.start() for one, other in pairwise(shared)):
            raise RowError(
                "several control tokens close an answer, and none is the tokenizer's EOS"
            )
        return shared[-1]

    def _compared_strings(self, tools: list[Any] | None) -> re.Pattern[str] | None:
        """The strings that the template compares texts with: operands of tests, arguments of calls
        and filters.
        """
        source = self.source(tools)
        if source not in self._constants:
            found = {text for text in _compared(_parsed(source)) if text.strip()}
            pattern = "|".join(
                re.escape(text) for text in sorted(found, key=lambda text: (-len(text), text))
            )
            self._constants[source] = re.compile(f"({pattern})") if found else None
        return self._constants[source]

    def opening(self, tools: list[Any] | None = None) -> str:
        """What the generation prompt ends with and no answer is rendered with, as `<think>\\n`: the
        answer itself may begin with it. Found on a question and an answer; that a row is so is
        proved for each row."""
        source = self.source(tools)
        if source not in self._openings:
            question, answer = WORD_FORMAT % 0, WORD_FORMAT % 1
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            try:
                _, header = _after_last_word(self.render(messages[:1], tools, prompt=True))
                _, literal = _after_last_word(self.render(messages, tools).partition(answer)[0])
            except RowError:  # nor will it render rows
                header = literal = ""
            self._openings[source] = header[len(literal) :] if header.startswith(literal) else ""
        return self._openings[source]

    def _check_kwargs(self) -> None:
        templates: Any = self.tokenizer.chat_template or ""
        sources = templates.values() if isinstance(templates, dict) else [templates]
        read = set().union(
            *(jinja2.meta.find_undeclared_variables(_parsed(source)) for source in sources)
        )
        for name in self.kwargs:
            if name not in read:
                own = sorted(
                    read - NO_KWARGS - set(jinja2.defaults.DEFAULT_NAMESPACE) - TEMPLATE_FUNCTIONS
                )
                raise BadInput(
                    f"data.chat_template_kwargs: the chat template reads no `{name}`; it reads "
                    f"{', '.join(own) or 'no variable but what it is given in any case'}"
                )


class _Words:
    """Puts words in the place of texts. `texts[n]` is what word n stands for, `owners[n]` where it
    was.
    """

    def __init__(self, keep: re.Pattern[str] | None, opening: str) -> None:
        self.keep, self.opening = keep, opening
        self.texts: list[str] = []
        self.owners: list[tuple[int, str]] = []

    def conversation(
        self, messages: list[dict[str, Any]], tools: list[Any] | None
    ) -> tuple[list[Any], Any]:
        """The shape of the row: all that a template may branch on, and no text. Tools belong to
        message -1.
        """
        shaped_tools = None if tools is None else [self._tool(tool, -1, "tools") for tool in tools]
        return [
            self._message(number, message) for number, message in enumerate(messages)
        ], shaped_tools

    def _message(self, number: int, message: dict[str, Any]) -> dict[str, Any]:
        shape = dict(message)
        for name in ("reasoning_content", "content"):
            if name in shape:
                kept = (
                    self._kept_opening(message[name])
                    if (message["role"], name) == ("assistant", "content")
                    else ""
                )
                shape[name] = kept + self._text(message[name].removeprefix(kept), (number, name))
        if "tool_calls" in shape:
            shape["tool_calls"] = [
                self._tool(call, number, "tool_calls") for call in shape["tool_calls"]
            ]
        return shape

    def _kept_opening(self, answer: str) -> str:
        """The opening, where the answer begins with it and says something after it."""
        follows = answer.startswith(self.opening) and answer[len(self.opening) :].strip()
        return self.opening if follows else ""

    def _tool(self, tool: Any, number: int, name: str) -> Any:
        """A tool or a call: its function's name, and the strings in a call's arguments."""
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
        if self.keep is None:
            return self._word(text, owner)
        parts = self.keep.split(text)  # texts at even places, kept strings at odd ones
        return "".join(
            part if place % 2 else self._word(part, owner) for place, part in enumerate(parts)
        )

    def _word(self, text: str, owner: tuple[int, str]) -> str:
        """A word in the place of the text, between the white space at its ends; an empty text stays
        empty.
        """
        core = text.strip()
        if not core:
            return text
        self.texts.append(core)
        self.owners.append(owner)
        word = WORD_FORMAT % (len(self.texts) - 1)
        if len(core) == len(text):
            return word
        start = len(text) - len(text.lstrip())
        return text[:start] + word + text[start + len(core) :]


def _fit(text: str, skeleton: Skeleton, texts: list[str]) -> list[int] | None:
    """Where each literal begins in `text`, if it is exactly the literals with the texts between
    them; else None.
    """
    position, starts = 0, []
    literals = skeleton.literals
    for number, slot in enumerate(skeleton.slots):
        starts.append(position)
        if not text.startswith(literals[number], position):
            return None
        position += len(literals[number])
        for form in _forms(texts[slot]):
            if text.startswith(form, position) and text.startswith(
                literals[number + 1], position + len(form)
            ):
                position += len(form)
                break
        else:
            return None
    starts.append(position)
    return starts if text[position:] == literals[-1] else None


def _forms(text: str) -> Iterator[str]:
    """How templates write a text: as it is, or inside JSON, with or without escapes for what is not
    ASCII.
    """
    yield text
    yield from (json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))


def _with_arguments_as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def call_of(call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function", {})
        if not isinstance(function.get("arguments"), dict):
            return call
        return {
            **call,
            "function": {
                **function,
                "arguments": json.dumps(function["arguments"], ensure_ascii=False),
            },
        }

    return [
        {**message, "tool_calls": [call_of(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _refuse_dropped(
    messages: list[dict[str, Any]], owners: list[tuple[int, str]], dropped: set[int]
) -> None:
    """Refuse a render that leaves out what was said. Old reasoning may go: the same happens when
    the model is used.
    """
    kept = {owner for number, (owner, _) in enumerate(owners) if number not in dropped}
    for message, name in sorted({owners[number] for number in dropped}):
        if name in ("tools", "tool_calls"):
            raise RowError(f"the template drops {'the tools' if name == 'tools' else 'tool calls'}")
        if messages[message]["role"] != "assistant":
            raise RowError(f"the template drops the {messages[message]['role']} message")
        if message not in kept:
            raise RowError("the template drops an answer")


def _beginning_elsewhere(skeleton: Skeleton, message: int, anchor: int | None, header: str) -> str:
    """Why the answer does not begin where the generation prompt ends, and what to do."""
    why = "an answer does not begin where the generation prompt ends"
    agree = "begin the answer with it, or set data.chat_template_kwargs or model.chat_template so that they agree"
    for index, slot in enumerate([None, *skeleton.slots]):
        literal = skeleton.literals[index]
        shared = commonprefix([header, literal])  # noqa: RUF071 - of characters, as is meant
        if (
            slot == anchor and shared and not literal[len(shared) :].strip()
        ):  # white space may be the answer's own
            return f"{why}, with {header[len(shared) :]!r}; {_mend(skeleton, message, agree)}"
    return why


def _mend(skeleton: Skeleton, message: int, last: str) -> str:
    """What to do where an answer is not rendered as it would be generated: `last`, if it is one of
    the last turn.
    """
    earlier = any(later["role"] == "user" for later in skeleton.messages[message + 1 :])
    return "data.train_on: last_turn leaves earlier answers out" if earlier else last


def _not_jinja(error: jinja2.TemplateSyntaxError) -> BadInput:
    return BadInput(f"the chat template is not valid Jinja (line {error.lineno}: {error.message})")


def _parsed(source: str) -> nodes.Template:
    """The template's tree. Raises BadInput where it is not valid."""
    jinja = jinja2.Environment(autoescape=False, extensions=["jinja2.ext.loopcontrols"])  # noqa: S701
    try:
        return jinja.parse(GENERATION.sub("", source))
    except jinja2.TemplateSyntaxError as error:
        raise _not_jinja(error) from None


def _after_last_word(text: str) -> tuple[int | None, str]:
    """The number of the last word in `text`, and what follows it."""
    *_, number, tail = [None, *WORD.split(text)]
    return (None if number is None else int(number)), tail or ""


def _place(text: str, position: int) -> Place:
    """A position in a skeleton's text, not inside a word, as a place."""
    ends = [match.end() for match in WORD.finditer(text) if match.end() <= position]
    return Place(len(ends), position - (ends[-1] if ends else 0))


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in order; those that touch are one."""
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        joined.append(
            (joined.pop()[0], stop) if joined and joined[-1][1] == start else (start, stop)
        )
    return joined


def _marked_start(
    marks: list[tuple[Place, Place]], start: Place, text_end: Place, stop: Place
) -> Place:
    """Where an answer begins that the template itself marks: not before the generation prompt ends,
    at `start`.
    """
    about = [(begin, end) for begin, end in marks if end > start and begin < stop]
    if not about:
        raise RowError("the template's {% generation %} block leaves out an answer")
    (begin, _), (_, end) = about[0], about[-1]
    if len(about) > 1 or begin.literal > start.literal or end < text_end:
        raise RowError("the template's {% generation %} block leaves out a part of an answer")
    if begin.literal < start.literal or end.literal > text_end.literal:
        raise RowError("the template's {% generation %} block holds more than an answer")
    return max(begin, start)


def _blank_after(skeleton: Skeleton, control: int, offset: int) -> bool:
    """Whether white space alone stands from `offset` after control token number `control` to the
    next one.
    """
    number = skeleton.controls[control].literal
    following = skeleton.controls[control + 1] if control + 1 < len(skeleton.controls) else None
    if following is not None and following.literal == number:
        return skeleton.literals[number][offset : following.offset].isspace()
    return number == len(skeleton.literals) - 1 and skeleton.literals[number][offset:].isspace()


def _strings(value: Any) -> Iterator[str]:
    """Every string in a nested value, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _compared(tree: nodes.Template) -> Iterator[str]:
    for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter, nodes.Test)):
        compared = (
            [node.expr, *(operand.expr for operand in node.ops)]
            if isinstance(node, nodes.Compare)
            else node.args
        )
        for operand in compared:
            if isinstance(operand, nodes.Const) and isinstance(operand.value, str):
                yield operand.value
