"""Decide which tokens of a row are trained, and prove it for each row (C6).

Conversations enter; Examples leave, or RowErrors with the reason. `trainer/data/chat_template.py`
gives the origin of every character, `trainer/data/turns.py` the bounds of the answers, and
`trainer/data/served.py` puts an answer behind a server's prompt; this file carries them to tokens:

- A text is tokenized once and whole, without added special tokens, as at inference: the template
  writes BOS or there is none. The control tokens that come out must be exactly those that the
  template wrote, in order. So no text can bring one in, and the pieces between them, which the
  tokenizer treats apart, are known.
- An answer begins where the generation prompt ends. There the tokens since the last control token
  must be what the prompt gives when it is tokenized alone, as it is at inference. Where they are
  not (a token has merged across the end), the row is tokenized in two pieces cut there, which is
  exactly what inference does, and checked again.
- It ends with its stop token, one of the control tokens already accounted for.

A text that spells a control token of the model is an injection, or data made for another tokenizer,
and its row is rejected. The recipe may choose otherwise:

- `text`: it stays text. The row is cut at the template's own control tokens, whose places are
  known, and what lies between is tokenized with control tokens switched off. That this is what the
  tokenizer makes of a whole text is tried out on each control token; one that takes white space
  from its neighbours is refused.
- `keep`: it is the control token that it spells, as on a server that parses them. All that the
  rendered text spells must come out of the tokenizer, in order, and those that lie in the
  template's places are the template's.

What is trained: the answer from the end of the generation prompt, the template's own words in it
included, to the stop token. White space that a template writes after the stop token (ChatML's
newline) is context: generation has ended there, so nothing is gained by training on it.
`train_on_eot: with_newline` trains it, as many other trainers do. The first token is never trained.
A plain text is all trained, between the tokenizer's own BOS (if it adds one) and EOS.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from packhorse.trainer.data.chat_template import Template
from packhorse.trainer.data.encode import HOLDS_CONTROL, Encoder
from packhorse.trainer.data.served import serve_last
from packhorse.trainer.data.skeleton import Render, Turn
from packhorse.trainer.data.template_source import DATE_STRING
from packhorse.trainer.data.turns import (
    answers_of,
    choose_own_controls,
    choose_turns,
    find_last_stop,
    find_turn,
    require_whole,
)
from packhorse.trainer.datatypes import BadInput, Conversation, Example, Message, RowError
from packhorse.trainer.utils.time_limit import many_interruptions

VERSION = 3  # raise it when the same row comes out another way: it is part of the cache's key


@dataclass(frozen=True)
class _Row:
    """A rendered conversation with the turns to train; under train_on `all`, those to leave out."""

    render: Render
    turns: list[Turn]


class _Located(NamedTuple):
    """A row's tokens (L,), the indices of the template's control tokens among them, the span of
    each turn, and the characters at which the text must be cut before it is tokenized."""

    ids: np.ndarray
    controls: np.ndarray
    spans: list[tuple[int, int]]
    cuts: list[int]


class Masker:
    """Makes Examples of Conversations under one tokenizer, template and policy.

    Args:
        tokenizer: a fast one; its chat template is used as it stands.
        train_on, train_on_eot, control_tokens, chat_template_kwargs, turns, missing_reasoning,
            stop_token: keys of the recipe's `data`, see config/data.py.

    Raises:
        BadInput: the tokenizer cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train_on: str = "assistant",
        train_on_eot: bool | Literal["with_newline"] = True,
        *,
        control_tokens: str = "reject",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        turns: str = "together",
        missing_reasoning: str = "reject",
        stop_token: str | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise BadInput(
                f"the tokenizer ({type(tokenizer).__name__}) is a slow one, whose tokens cannot be "
                f"traced to the text; use a model folder with a tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.template = Template(tokenizer, chat_template_kwargs, stop_token)
        self.train_on = train_on
        self.train_on_eot = train_on_eot
        self.missing_reasoning = missing_reasoning
        self.control_tokens = control_tokens
        # `all` trains the history, too, which a document for each answer would repeat
        self.turns = "together" if train_on == "all" else turns
        self._encoder = Encoder(tokenizer, self.template.control_ids)
        self._text_controls = self._encoder.controls(self._encoder.encode([""], True)[0])

    # ------------------------------------------------------------------------------------- examples

    def example(self, conversation: Conversation) -> Example:
        """Return the example of one row.

        Raises:
            RowError: the mask cannot be proved; it gives the reason.
        """
        result = self.examples([conversation])[0]
        if isinstance(result, RowError):
            raise result
        return result

    def documents(
        self, conversations: Sequence[Conversation]
    ) -> list[tuple[Example, ...] | RowError]:
        """Return for each row its documents, or why it is rejected; many at once are faster."""
        made: list[Any] = [None] * len(conversations)
        if self.turns != "apart":
            made = [
                (result,) if isinstance(result, Example) else result
                for result in self.examples(conversations)
            ]
        if self.turns == "together":
            return made
        parts = {
            n: self.prefixes(conversations[n])
            for n, result in enumerate(made)
            if not isinstance(result, tuple)
        }
        # one call for the parts of all rows, too
        examples = iter(self.examples([part for row in parts.values() for part in row], apart=True))
        for n, row in parts.items():
            results = [next(examples) for _ in row]
            faults = [result for result in results if isinstance(result, RowError)]
            made[n] = faults[0] if faults else tuple(results)
        return made

    def rendered(self, conversation: Conversation) -> list[tuple[Conversation, Example]]:
        """Return a row's documents, each with the conversation that it renders.

        Raises:
            RowError: the row is rejected.
        """
        (made,) = self.documents([conversation])
        if isinstance(made, RowError):
            raise made
        parts = [conversation] if len(made) == 1 else self.prefixes(conversation)
        return list(zip(parts, made, strict=True))

    def prefixes(self, conversation: Conversation) -> list[Conversation]:
        """Return the row up to each of its trained answers, which alone is trained there."""
        messages = conversation.messages
        try:
            chosen = choose_turns(messages, self.train_on)
        except RowError:  # which `examples` will give as the reason
            return [conversation]
        history = [replace(m, weight=0) if m.role == "assistant" else m for m in messages]
        return [replace(conversation, messages=(*history[:n], messages[n])) for n in chosen]

    def examples(
        self, conversations: Sequence[Conversation], *, apart: bool = False
    ) -> list[Example | RowError]:
        """Return for each row its example as one document, or why there is none.

        Args:
            apart: the last answer alone is trained, and may be put behind the prompt of a server.
        """
        results: list[Any] = []
        with many_interruptions():
            for conversation in conversations:
                try:
                    results.append(self._prepare_row(conversation, apart))
                except RowError as error:
                    results.append(error)
        rows = {n: row for n, row in enumerate(results) if isinstance(row, _Row)}
        texts = {n: text for n, text in enumerate(results) if isinstance(text, str)}
        # One call of the tokenizer for each kind, as its threads share the texts of a call.
        of_rows = self._encoder.encode([row.render.text for row in rows.values()])
        of_texts = self._encoder.encode(list(texts.values()), True, self.control_tokens == "text")
        for n, ids in zip([*rows, *texts], of_rows + of_texts, strict=True):
            try:
                example = (
                    self._text_example(ids) if n in texts else self._template_example(rows[n], ids)
                )
                results[n] = replace(example, unread=conversations[n].unread)
            except RowError as error:
                results[n] = error
        return results

    def prompt(self, conversation: Conversation) -> tuple[list[int], str]:
        """Return the token ids that inference is given before the last answer, and that answer.

        Raises:
            RowError: the row is no conversation, or its mask cannot be proved.
        """
        # A question whose row has no proved mask is not asked: its answer may not be comparable.
        self.rendered(conversation)
        answers = answers_of(conversation.messages)
        if not answers:
            raise RowError("no answer")
        asked = replace(conversation, messages=conversation.messages[: answers[-1]])
        messages = [message.as_dict() for message in asked.messages]
        text = self.template.render(messages, list(asked.tools) or None, prompt=True)
        ids = self._encoder.encode([text])[0]
        if self.control_tokens == "text":
            render = self.template.follow(asked, prompt=True)
            if self._encoder.controls(ids) != render.skeleton.control_ids:
                ids = self._encoder.encode_cut(render, [], as_text=True)
        return ids, conversation.messages[answers[-1]].content

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Return the tokens that end an answer: those after a plain one and after a tool call, and
        the tokenizer's EOS."""
        stops: list[Any] = []
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}
        plain = Message("assistant", "Hello")
        has_template = self.tokenizer.chat_template is not None
        for answer in (plain, replace(plain, tool_calls=(call,))) if has_template else ():
            with suppress(RowError):  # rows of this kind will be rejected with this reason
                row = Conversation((Message("user", "Hello"), answer))
                token = find_last_stop(self.template, self.template.follow(row).skeleton)
                stops.append(self.template.control_ids[token[0]])
        if self.tokenizer.eos_token_id is not None:
            stops.append(self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys(stops))

    def fingerprint(self) -> str:
        """Return a hash of all that shapes an example: tokenizer, template, policy and VERSION."""
        parts = {
            "version": VERSION,
            "tokenizer": self._encoder.backend().to_str(),
            "template": self.tokenizer.chat_template,
            "special": {
                name: str(token) for name, token in self.tokenizer.special_tokens_map.items()
            },
            "control": self.template.control_ids,
            "kwargs": {"date_string": DATE_STRING, **self.template.kwargs},
            "policy": [
                self.train_on,
                self.train_on_eot,
                self.control_tokens,
                self.turns,
                self.missing_reasoning,
            ],
            "stop": [self.template.stop_token, sorted(self.template.generation_eos)],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    # ----------------------------------------------------------------------------------------- rows

    def _prepare_row(self, conversation: Conversation, apart: bool) -> _Row | str:
        """Return what is to be tokenized: a render with its turns, or a plain text."""
        if conversation.text is not None:
            return conversation.text
        chosen = choose_turns(conversation.messages, self.train_on)
        try:
            render = self.template.follow(conversation)
            if self.train_on == "all":
                for number in answers_of(conversation.messages):
                    if conversation.messages[number].weight:
                        require_whole(render.skeleton, number)
            return _Row(render, [find_turn(self.template, render.skeleton, n) for n in chosen])
        except RowError:
            if not apart or chosen != [len(conversation.messages) - 1]:
                raise
        render, turn = serve_last(self.template, conversation, self.missing_reasoning)
        return _Row(render, [turn])

    def _template_example(self, row: _Row, tokens: list[int]) -> Example:
        skeleton = row.render.skeleton
        as_text = (
            self.control_tokens == "text" and self._encoder.controls(tokens) != skeleton.control_ids
        )
        if as_text:
            tokens = self._encoder.encode_cut(row.render, [], as_text)
        located = self._locate(row, tokens, as_text)
        if located.cuts:
            tokens = self._encoder.encode_cut(row.render, located.cuts, as_text)
            located = self._locate(row, tokens, as_text)
            if located.cuts:
                raise RowError("a token spans the end of the prompt and the answer")
        trained = np.full(len(located.ids), self.train_on == "all")
        for start, stop in located.spans:
            trained[start:stop] = self.train_on != "all"
        if self.train_on == "all" and not self.train_on_eot:
            for number, message in enumerate(skeleton.messages):
                if message["role"] == "assistant":
                    trained[located.controls[find_turn(self.template, skeleton, number).stop]] = (
                        False
                    )
        return _finish(located.ids, trained)

    def _locate(self, row: _Row, tokens: list[int], as_text: bool) -> _Located:
        """Find control tokens and turns among the tokens. This is the proof.

        Raises:
            RowError: the tokens are not what the template and the texts account for.
        """
        render, skeleton = row.render, row.render.skeleton
        ids = np.array(tokens, dtype=np.int32)
        controls = np.flatnonzero(self._encoder.is_control[ids])
        found = ids[controls].tolist()
        # Any other list means that a text brought a control token in, or swallowed one.
        if found != skeleton.control_ids:
            if self.control_tokens != "keep":
                raise RowError(HOLDS_CONTROL)
            controls = controls[choose_own_controls(self.template, render, found)]
        spans, cuts = [], []
        for turn in row.turns:
            before = self._encoder.encode_before(render, turn, as_text)
            first = int(controls[turn.before]) if turn.before >= 0 else 0
            start, stop = first + len(before), int(controls[turn.stop])
            # The tokens before the answer must be the prompt's, or the model would be trained on a
            # prompt that no server makes: a token has merged across the prompt's end.
            if tokens[first:start] != before:
                cuts.append(render.position(turn.start))
            if self.train_on_eot == "with_newline" and turn.newline:
                stop = int([*controls, len(tokens)][turn.stop + 1])
            elif self.train_on_eot:
                stop += 1
            spans.append((start, stop))
        return _Located(ids, controls, spans, cuts)

    def _text_example(self, tokens: list[int]) -> Example:
        if self.control_tokens != "keep" and self._encoder.controls(tokens) != self._text_controls:
            raise RowError(HOLDS_CONTROL)
        if tokens[:2] == [self.tokenizer.bos_token_id] * 2:  # the text brought its own
            tokens = tokens[1:]
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise BadInput(
                "the tokenizer has no EOS token, and the rows are plain texts; set one in the "
                "tokenizer"
            )
        ids = np.array(tokens if tokens[-1:] == [eos] else [*tokens, eos], dtype=np.int32)
        trained = np.ones(len(ids), dtype=bool)
        trained[-1] = bool(self.train_on_eot)
        return _finish(ids, trained)


def _finish(ids: np.ndarray, trained: np.ndarray) -> Example:
    # No token before it predicts the first one.
    trained[:1] = False
    if not trained.any():
        raise RowError("nothing to train")
    return Example(ids, trained)
