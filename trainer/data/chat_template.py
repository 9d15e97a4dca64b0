"""Render conversations by a chat template, with the origin of every character.

A `Conversation` enters; a `Render` leaves: the rendered text, and where each piece of template text
lies in it. The method follows from how templates work; there is no list of known models.

The conversation is rendered twice: as it is, and with a numbered placeholder for every text that a
row fills in (contents, reasoning, strings in tool-call arguments, function names). Between the
placeholders of the second render stands template text (the `literals`). The first render must be
exactly these literals with the texts between them, each as it is or escaped as JSON: then every
character has a known origin. Otherwise the row is rejected. The second render depends on the row's
shape alone and is cached by it; the comparison is made for every row, so a wrong skeleton cannot
pass. Templates that branch on a text (qwen3 splits at `</think>`) do not fit; then the strings that
the template itself compares with are left standing in the texts, so that both renders branch alike,
and the comparison is made again.

Where the generation prompt ends with a `<think>` that the template writes before no answer, an
answer may bring it as the beginning of its own text: there it is left standing in both renders, and
stands before the answer like the template's own text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from packhorse.trainer.data.skeleton import (
    PLACEHOLDER,
    PLACEHOLDER_FORMAT,
    Place,
    Placeholders,
    Render,
    Skeleton,
    match_texts,
    place_of,
    split_at_last,
)
from packhorse.trainer.data.template_call import (
    call_template,
    mend_role,
    wants_parts,
    with_parts,
)
from packhorse.trainer.data.template_source import (
    DATE_STRING,
    GENERATION,
    check_kwargs,
    compared_strings,
    with_fixed_clock,
)
from packhorse.trainer.datatypes import BadInput, Conversation, RowError

# Tokenizers list white space and words as added tokens, some even as special ones (Gemma's hold
# "\n" and runs of spaces). Every text holds those, so they open and close no turn.
ORDINARY_TEXT = re.compile(r"[\w\s▁]*")  # ▁ is how SentencePiece spells a space
# A token that is not called special is a marker if no text holds it by accident: a name in
# brackets of some kind, as <|User|> or [INST].
MARKER = re.compile(r"[^\w\s▁].*\w.*[^\w\s▁]", re.DOTALL)
MAX_SKELETONS = 4096


class Template:
    """A tokenizer's chat template; keeps the skeletons of the shapes that it has met.

    `control_ids` holds, by their text, the ids of the tokens that only the template may write: in a
    row's text they would end or open turns.

    Args:
        kwargs: variables of the template, as apply_chat_template takes them.
        stop_token: what ends an answer where the template writes no stop token. None: what
            `_missing_stop` finds.

    Raises:
        BadInput: the template reads no variable of that name, or the tokenizer has no such token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        kwargs: Mapping[str, Any] | None = None,
        stop_token: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.kwargs = dict(kwargs or {})
        added = tokenizer.added_tokens_decoder.items()
        ids = {token.content: number for number, token in added}
        self.control_ids = {
            token.content: number
            for number, token in added
            if token.special and not ORDINARY_TEXT.fullmatch(token.content)
        }
        self.control_ids |= dict(
            zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        )
        self.stop_token = stop_token
        if stop_token is not None:
            number = ids.get(stop_token, self.control_ids.get(stop_token))
            if number is None:
                raise BadInput(
                    f"data.stop_token: the tokenizer has no control token {stop_token!r}; it has "
                    f"{', '.join(sorted(self.control_ids)[:20]) or 'none'}"
                )
            self.control_ids[stop_token] = number
        # what ends generation by the model's own configuration (load_tokenizer reads it)
        self.generation_eos = frozenset(getattr(tokenizer, "generation_eos_token_ids", ()))
        # as the tokenizer does: of two tokens that begin at the same character, it takes the longer
        longest_first = sorted({*ids, *self.control_ids}, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._sources: dict[bool, str] = {}  # for rows without tools, and with them
        self._variables: dict[str, Any] = {
            **tokenizer.special_tokens_map,
            "date_string": DATE_STRING,
            **self.kwargs,
        }
        self._skeletons: dict[str, Skeleton] = {}
        self._openings: dict[str, str] = {}
        self._wants_parts: dict[str, bool] = {}
        if self.kwargs:
            templates: Any = tokenizer.chat_template or ""
            named = isinstance(templates, dict)
            check_kwargs(self.kwargs, list(templates.values()) if named else [templates])
        self.control_ids |= {text: ids[text] for text in self._turn_tokens()}

    def follow(self, conversation: Conversation, *, prompt: bool = False) -> Render:
        """Render a conversation with the origin of every character.

        Args:
            prompt: end with the generation prompt.

        Raises:
            RowError: an origin cannot be proved.
        """
        messages = [message.as_dict() for message in conversation.messages]
        tools = list(conversation.tools) or None
        text = self.render(messages, tools, prompt=prompt)
        opening = self.opening(None if tools is None else [])
        # First without kept strings: then a text as a whole has one origin, and few shapes differ.
        for keep in (None, compared_strings(self._source(tools))):
            placeholders = Placeholders(keep, opening)
            shape = placeholders.shape(messages, tools)
            key = repr((*shape, prompt))
            skeleton = self._skeletons.get(key)
            if skeleton is None:
                if len(self._skeletons) >= MAX_SKELETONS:
                    self._skeletons.clear()
                skeleton = self._build_skeleton(*shape, placeholders.owners, prompt)
                self._skeletons[key] = skeleton
            ended = text[: len(text) - skeleton.cut] + skeleton.added
            starts = match_texts(ended, skeleton, placeholders.texts)
            if starts is not None:
                return Render(ended, skeleton, starts)
        raise RowError("the template changes a text in a way that cannot be followed")

    def render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, *, prompt: bool = False
    ) -> str:
        """Return the template's text; with `prompt`, it ends with the generation prompt."""
        return self._render(messages, tools, add_generation_prompt=prompt)[0][0]

    def render_answer(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
        """Return the text of placeholders that end with an answer, with its stop token."""
        text = self.render(messages, tools)
        cut, added = self._missing_stop(text, messages, tools)
        return text[: len(text) - cut] + added

    def find_controls(self, text: str) -> list[re.Match[str]]:
        """Find control tokens in `text` as the tokenizer does: leftmost first, then longest."""
        return [match for match in self._added.finditer(text) if match[0] in self.control_ids]

    def knows(self, marker: str, tools: Any) -> bool:
        """Return whether a marker stands in the template's source or in the vocabulary."""
        vocabulary = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        return marker in self._source(list(tools) or None) or marker in vocabulary

    def opening(self, tools: list[Any] | None = None) -> str:
        """Return what the generation prompt ends with and no answer is rendered with.

        It is `<think>\\n`, or nothing; the answer itself may begin with it. It is found on one
        question and answer; each row proves it for itself.
        """
        source = self._source(tools)
        if source not in self._openings:
            question, answer = PLACEHOLDER_FORMAT % 0, PLACEHOLDER_FORMAT % 1
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            try:
                _, header = split_at_last(self.render(messages[:1], tools, prompt=True))
                _, literal = split_at_last(self.render(messages, tools).partition(answer)[0])
            except RowError:  # nor will it render rows
                header = literal = ""
            self._openings[source] = header[len(literal) :] if header.startswith(literal) else ""
        return self._openings[source]

    def _turn_tokens(self) -> set[str]:
        """Find the added tokens that open and close turns, special or not (some of DeepSeek's are
        not): those before a user's text, and the one that begins an answer's header."""
        messages = [
            {"role": role, "content": PLACEHOLDER_FORMAT % n}
            for n, role in enumerate(("user", "assistant", "user"))
        ]
        try:
            literals = PLACEHOLDER.split(self.render(messages, None))[::2]
        except (BadInput, RowError):  # no template, or not for these: rows that need it say why
            return set()
        if len(literals) != len(messages) + 1:
            return set()
        before_user, header = (
            [token for token in self._added.findall(literal) if MARKER.fullmatch(token)]
            for literal in (literals[0] + literals[2], literals[1])
        )
        header = [token for token in header if token not in before_user]
        return {*before_user, *header[:1]}

    def _source(self, tools: list[Any] | None) -> str:
        """Return the template, of which rows with tools may have another one, with its clock fixed.

        Raises:
            BadInput: the tokenizer has none.
        """
        if found := self._sources.get(tools is None):
            return found
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
        return self._sources.setdefault(tools is None, with_fixed_clock(source))

    def _render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, **options: Any
    ) -> Any:
        source = self._source(tools)
        variables = {**self._variables, **options}
        if source not in self._wants_parts:
            self._wants_parts[source] = wants_parts(source, variables)
        if self._wants_parts[source]:
            messages = [with_parts(message) for message in messages]
        return call_template(source, messages, tools, variables)

    def _build_skeleton(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        owners: list[tuple[int, str]],
        prompt: bool,
    ) -> Skeleton:
        if any(self.find_controls(text) for text in _strings((messages, tools))):
            raise RowError("a text holds a control token of the model")
        # A schema is not replaced, so a word in it that is spelt like a placeholder would be one.
        if len(PLACEHOLDER.findall(repr((messages, tools)))) != len(owners):
            raise RowError(
                "a tool's schema holds a word that the proof of the mask puts in the place of texts"
            )
        marked = GENERATION.search(self._source(tools)) is not None
        texts, marks = self._render(
            messages, tools, return_assistant_tokens_mask=marked, add_generation_prompt=prompt
        )
        cut, added = (0, "") if prompt else self._missing_stop(texts[0], messages, tools)
        parts = PLACEHOLDER.split(texts[0][: len(texts[0]) - cut] + added)
        literals, slots = parts[0::2], [int(number) for number in parts[1::2]]
        # A tool's name may be written often, as beside its result; a content or reasoning may not.
        if any(
            count > 1 and "content" in owners[slot][1] for slot, count in Counter(slots).items()
        ):
            raise RowError("the template writes a text twice")
        _refuse_dropped(messages, owners, set(range(len(owners))) - set(slots))
        controls = [
            (Place(number, match.start()), self.control_ids[match[0]])
            for number, literal in enumerate(literals)
            for match in self.find_controls(literal)
        ]
        return Skeleton(
            messages,
            tools,
            owners,
            literals,
            slots,
            controls=[place for place, _ in controls],
            control_ids=[number for _, number in controls],
            marks=[
                (place_of(texts[0], start), place_of(texts[0], stop))
                for start, stop in _joined(marks[0] if marked else ())
            ],
            cut=cut,
            added=added,
        )

    def _missing_stop(
        self, text: str, messages: list[dict[str, Any]], tools: list[Any] | None
    ) -> tuple[int, str]:
        """Return how much of the end of `text` to cut off, and what to add, so that an answer
        without a stop token ends with one.

        It is the token that the recipe names, or the one that comes next where the conversation
        goes on (a marker that is left out at the very end, or the next role's, as GLM 4's), or the
        tokenizer's EOS.
        """
        *before, closing = PLACEHOLDER.split(text)
        if messages[-1]["role"] != "assistant" or self.find_controls(closing) or not before:
            return 0, ""
        # white space of the answer's own stays, that of the template separates it from what follows
        content = messages[-1]["content"]
        own = "" if messages[-1].get("tool_calls") else content[len(content.rstrip()) :]
        kept = own if closing.startswith(own) else ""
        kept += closing[len(kept) :].rstrip()
        added = self.stop_token or self._next_token(before[-1], kept, messages, tools)
        return len(closing) - len(kept), added or str(self.tokenizer.eos_token or "")

    def _next_token(
        self, number: str, kept: str, messages: list[dict[str, Any]], tools: list[Any] | None
    ) -> str:
        """Return the control token, with the white space before it, that follows an answer where
        the conversation goes on; nothing, if it does not end generation.

        Args:
            number: of the answer's last text; after it stands `kept`.
        """
        role = "tool" if messages[-1].get("tool_calls") else "user"
        try:
            continued = self.render([*messages, {"role": role, "content": "x"}], tools)
        except RowError:  # nothing may follow here
            return ""
        literal = continued.rpartition(PLACEHOLDER_FORMAT % int(number))[2]
        token = next(iter(self.find_controls(literal)), None)
        if token is None or not literal.startswith(kept):
            return ""
        bos: Any = self.tokenizer.bos_token_id
        others = {*self.control_ids.values()} - {bos}
        blank = not literal[len(kept) : token.start()].strip()
        is_end = blank and self.control_ids[token[0]] in (self.generation_eos or others)
        return literal[len(kept) : token.end()] if is_end else ""


def _refuse_dropped(
    messages: list[dict[str, Any]], owners: list[tuple[int, str]], dropped: set[int]
) -> None:
    """Refuse a render that leaves out a message, a call or a tool. Reasoning of earlier turns may
    be left out: the same happens when the model is used."""
    kept = {owner for number, (owner, _) in enumerate(owners) if number not in dropped}
    for message, name in sorted({owners[number] for number in dropped}):
        if name in ("tools", "tool_calls"):
            raise RowError(f"the template drops {'the tools' if name == 'tools' else 'tool calls'}")
        if messages[message]["role"] != "assistant":
            role = messages[message]["role"]
            advice = "" if role == "user" else f"; {mend_role(role)}"
            raise RowError(f"the template drops the {role} message{advice}")
        if message not in kept:
            raise RowError("the template drops an answer")


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join spans that touch; they come in order."""
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        touches = joined and joined[-1][1] == start
        joined.append((joined.pop()[0], stop) if touches else (start, stop))
    return joined


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in a nested value, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
