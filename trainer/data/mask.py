"""Which tokens of a row are trained, proved for each row (C6).

Conversations enter; Examples leave, or RowErrors with the reason. `trainer/data/chat_template.py`
gives the origin of every character; this file carries it over to tokens:

- A text is tokenized once and whole, without added special tokens, as at inference: the template
  writes BOS or there is none. The control tokens that come out must be exactly those that the
  template wrote, in order. So no text can bring one in, and the pieces between them, which the
  tokenizer treats apart, are known.
- An answer begins where the generation prompt ends. There the tokens since the last control token
  must be what the prompt gives when it is tokenized alone, as it is at inference. Where they are
  not (a token has merged across the end), the row is tokenized in two pieces cut there, which is
  exactly what inference does, and looked at again.
- It ends with its stop token, one of the control tokens already accounted for.

A text that spells a control token of the model is an injection, or data made for another tokenizer,
and its row is rejected. The recipe may say otherwise, and then:

- `text`: it stays text. The row is cut at the template's own control tokens, whose places are
  known, and what lies between is tokenized with control tokens switched off. That this is what the
  tokenizer makes of a whole text is tried out on each control token; one that takes white space
  from its neighbours is refused.
- `keep`: it is the control token that it spells, as on a server that parses them. All that the
  rendered text spells must come out of the tokenizer, in order, and those that lie in the
  template's places are the template's.

What is trained: the answer from the end of the generation prompt, the template's own words in it
included, to the stop token. White space that a template writes after the stop token (ChatML's
newline) is context: generation has ended there, so nothing is gained by learning it.
`train_trailing_newline` trains it, as many other trainers do. The first token is never trained. A
plain text is all trained, between the tokenizer's own BOS (if it adds one) and EOS.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.data.chat_template import DATE_STRING, Render, Skeleton, Template, Turn
from trainer.datatypes import BadInput, Conversation, Example, Message, RowError

VERSION = 2  # raise it when the same row comes out another way: it is part of the cache's key
MODES = ("all", "completion", "assistant", "last_turn")
SAMPLES = ("", "x", " x ", "\nx\n")
HOLDS_CONTROL = "a text holds a control token of the model"
MOST_WINDOWS = 4096
CACHED_WORDS = (
    2**16
)  # by the tokenizer: its own 10,000 are full after some thousand rows, and the rest takes a sixth longer


@dataclass(frozen=True)
class _Row:
    """A rendered conversation with the turns to train."""

    render: Render
    turns: list[Turn]


class Masker:
    """Conversation -> Example under one tokenizer, template and policy.

    Args:
        tokenizer: a fast one; its chat template is used as it stands.
        train_on: `all` tokens; `completion`, the last answer; `assistant`, every answer;
            `last_turn`, every answer after the last user message (tool calls before the last answer
            among them).
        train_on_eot: the stop token is trained with its answer.
        train_trailing_newline: so is white space that the template writes after it.
        control_tokens: what becomes of a text that spells one: `reject` the row, `text`, or `keep`
            it as a token.
        chat_template_kwargs: variables of the chat template.

    Raises:
        BadInput: the tokenizer cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train_on: str = "assistant",
        train_on_eot: bool = True,
        *,
        train_trailing_newline: bool = False,
        control_tokens: str = "reject",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if train_on not in MODES:
            raise BadInput(f"`data.train_on` is {train_on!r}; allowed: {', '.join(MODES)}")
        if not tokenizer.is_fast:
            raise BadInput(
                f"the tokenizer ({type(tokenizer).__name__}) is a slow one, whose tokens cannot be "
                f"traced to the text; "
                "use a model folder with a tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.template = Template(tokenizer, chat_template_kwargs)
        self.train_on = train_on
        self.train_on_eot = train_on_eot
        self.train_trailing_newline = train_trailing_newline and train_on_eot
        self.control_tokens = control_tokens
        control_ids = list(self.template.control_ids.values())
        self._is_control = np.zeros(
            max([len(tokenizer), *(number + 1 for number in control_ids)]), dtype=bool
        )
        self._is_control[control_ids] = True
        self._windows: dict[str, list[int]] = {}
        self._spelt = {number: text for text, number in self.template.control_ids.items()}
        self._apart: dict[int, bool] = {}
        self._text_controls = self._controls(self._encode([""], True)[0])
        self._cuts_cleanly = (
            self._encode(["\nx"])[0][-len(self._encode(["x"])[0]) :] == self._encode(["x"])[0]
        )

    # ------------------------------------------------------------------------------------- examples

    def example(self, conversation: Conversation) -> Example:
        """One row. Raises RowError with the reason where the mask cannot be proved."""
        result = self.examples([conversation])[0]
        if isinstance(result, RowError):
            raise result
        return result

    def examples(self, conversations: Sequence[Conversation]) -> list[Example | RowError]:
        """Many rows at once, which is faster: for each its example, or why it is rejected."""
        results: list[Any] = [self._row(conversation) for conversation in conversations]
        for has_template in (True, False):
            chosen = [
                n for n, row in enumerate(results) if isinstance(row, _Row if has_template else str)
            ]
            texts = [
                row.render.text if has_template else row for row in (results[n] for n in chosen)
            ]
            as_text = not has_template and self.control_tokens == "text"
            for n, ids in zip(chosen, self._encode(texts, not has_template, as_text), strict=True):
                try:
                    results[n] = (
                        self._template_example(results[n], ids)
                        if has_template
                        else self._text_example(ids)
                    )
                except RowError as error:
                    results[n] = error
        return results

    def prompt(self, conversation: Conversation) -> tuple[list[int], str]:
        """What inference is given before the last answer, and that answer's text.

        Raises:
            RowError: the row is no conversation, or its mask cannot be proved.
        """
        self.example(conversation)
        answers = _answers(conversation.messages)
        if not answers:
            raise RowError("no answer")
        asked = replace(conversation, messages=conversation.messages[: answers[-1]])
        answer = conversation.messages[answers[-1]].content
        messages = [message.as_dict() for message in asked.messages]
        ids = self._encode(
            [self.template.render(messages, list(asked.tools) or None, prompt=True)]
        )[0]
        if self.control_tokens == "text":
            render = self.template.follow(asked, prompt=True)
            if self._controls(ids) != render.skeleton.control_ids:
                ids = self._encode_as_text(render)
        return ids, answer

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the template's own after a plain one, and the tokenizer's
        EOS.
        """
        stops = []
        if self.tokenizer.chat_template is not None:
            try:
                plain = (
                    Message("user", "Hello"),
                    Message("assistant", f"{self.template.opening()}Hello"),
                )
                skeleton = self.template.follow(Conversation(plain)).skeleton
                stops.append(skeleton.control_ids[self.template.turn(skeleton, 1).stop])
            except RowError:  # then every conversation will be rejected with this reason
                pass
        if self.tokenizer.eos_token_id is not None:
            stops.append(self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys(stops))

    def fingerprint(self) -> str:
        """A hash of all that shapes an example: tokenizer, template, policy and this file's
        VERSION.
        """
        parts = {
            "version": VERSION,
            "tokenizer": self._backend().to_str(),
            "template": self.tokenizer.chat_template,
            "special": {
                name: str(token) for name, token in self.tokenizer.special_tokens_map.items()
            },
            "control": self.template.control_ids,
            "kwargs": {"date_string": DATE_STRING, **self.template.kwargs},
            "policy": [
                self.train_on,
                self.train_on_eot,
                self.train_trailing_newline,
                self.control_tokens,
            ],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    # ----------------------------------------------------------------------------------------- rows

    def _row(self, conversation: Conversation) -> _Row | str | RowError:
        """What is to be tokenized: a render with its turns, a plain text, or nothing and why."""
        if conversation.text is not None:
            return conversation.text
        try:
            render = self.template.follow(conversation)
            if self.train_on == "all":
                for number in _answers(conversation.messages):
                    if conversation.messages[number].weight:
                        self.template.require_whole(render.skeleton, number)
            return _Row(
                render,
                [
                    self.template.turn(render.skeleton, n)
                    for n in self._wanted(conversation.messages)
                ],
            )
        except RowError as error:
            return error

    def _wanted(self, messages: Sequence[Message]) -> list[int]:
        """The numbers of the messages whose turns are looked up: to train; under `all`, those to
        leave out.
        """
        answers = _answers(messages)
        if self.train_on == "all":
            if any(message.weight == 0 and message.role != "assistant" for message in messages):
                raise RowError("weight 0 on a message that is not an answer, under train_on: all")
            if any(_is_empty(messages[number]) for number in answers):
                raise RowError("no answer")
            return [number for number in answers if messages[number].weight == 0]
        if self.train_on == "completion":
            answers = answers[-1:]
        elif self.train_on == "last_turn":
            asked = max(
                (number for number, message in enumerate(messages) if message.role == "user"),
                default=-1,
            )
            answers = [number for number in answers if number > asked]
        wanted = [number for number in answers if messages[number].weight]
        if not wanted:
            raise RowError("nothing to train")
        if any(_is_empty(messages[number]) for number in wanted):
            raise RowError("no answer")
        return wanted

    def _template_example(self, row: _Row, tokens: list[int]) -> Example:
        render, skeleton = row.render, row.render.skeleton
        as_text = self.control_tokens == "text" and self._controls(tokens) != skeleton.control_ids
        if as_text:
            tokens = self._encode_as_text(render)
        ids, controls, spans, cuts = self._located(row, tokens, as_text)
        if cuts:
            tokens = (
                self._encode_as_text(render, cuts)
                if as_text
                else self._encode_cut(render.text, cuts)
            )
            ids, controls, spans, cuts = self._located(row, tokens, as_text)
            if cuts:
                raise RowError("a token spans the end of the prompt and the answer")
        trained = np.full(len(ids), self.train_on == "all")
        for start, stop in spans:
            trained[start:stop] = self.train_on != "all"
        if self.train_on == "all" and not self.train_on_eot:
            trained[
                controls[[self.template.turn(skeleton, n).stop for n in _answers_of(skeleton)]]
            ] = False
        return _finished(ids, trained)

    def _located(
        self, row: _Row, tokens: list[int], as_text: bool
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]], list[int]]:
        """The row's tokens, where the template's control tokens lie among them, the span of each
        turn, and the characters at which the text must be cut first.

        This is the proof: it raises RowError where the tokens are not what the template and the
        texts account for.
        """
        render, skeleton = row.render, row.render.skeleton
        ids = np.array(tokens, dtype=np.int32)
        controls = np.flatnonzero(self._is_control[ids])
        found = ids[controls].tolist()
        if found != skeleton.control_ids:
            if self.control_tokens != "keep":
                raise RowError(HOLDS_CONTROL)
            controls = controls[self._own_controls(render, found)]
        spans, cuts = [], []
        for turn in row.turns:
            window = self._window(render, turn, as_text)
            first = int(controls[turn.before]) if turn.before >= 0 else 0
            start = first + len(window)
            if tokens[first:start] != window:
                cuts.append(render.position(turn.start))
            spans.append((start, self._end(turn, controls, len(tokens))))
        return ids, controls, spans, cuts

    def _own_controls(self, render: Render, found: list[int]) -> list[int]:
        """Which of the control tokens `found` are the template's, where texts may hold some too."""
        matches = self.template.controls(render.text)
        own = {render.position(place) for place in render.skeleton.controls}
        chosen = [number for number, match in enumerate(matches) if match.start() in own]
        if [self.template.control_ids[match[0]] for match in matches] != found:
            raise RowError("control tokens in a text do not come out as they are spelt")
        if [found[number] for number in chosen] != render.skeleton.control_ids:
            raise RowError("a text runs into a control token of the template")
        for match in matches:
            literal = bisect_right(render.starts, match.start()) - 1
            text_start = render.starts[literal] + len(render.skeleton.literals[literal])
            text_stop = [*render.starts, len(render.text)][literal + 1]
            if (
                match.start() not in own
                and not text_start <= match.start() < match.end() <= text_stop
            ):
                raise RowError("a text runs into a control token of the template")
        return chosen

    def _end(self, turn: Turn, controls: np.ndarray, num_tokens: int) -> int:
        stop = int(controls[turn.stop])
        if self.train_trailing_newline and turn.newline:
            return int(controls[turn.stop + 1]) if turn.stop + 1 < len(controls) else num_tokens
        return stop + 1 if self.train_on_eot else stop

    def _text_example(self, tokens: list[int]) -> Example:
        if self.control_tokens != "keep" and self._controls(tokens) != self._text_controls:
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
        trained[-1] = self.train_on_eot
        return _finished(ids, trained)

    # --------------------------------------------------------------------------------------- tokens

    def _encode(
        self, texts: list[str], add_special_tokens: bool = False, as_text: bool = False
    ) -> list[list[int]]:
        """The tokens of each text; with `as_text`, what spells a control token is text."""
        backend = self._backend()
        backend.encode_special_tokens = as_text
        try:
            return [
                e.ids
                for e in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            ]
        finally:
            backend.encode_special_tokens = False

    def _controls(self, tokens: list[int]) -> list[int]:
        ids = np.array(tokens, dtype=np.int32)
        return ids[self._is_control[ids]].tolist()

    def _backend(self) -> Any:
        """The tokenizer proper, without the padding and truncation that a call elsewhere may have
        left in it.
        """
        backend: Any = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        if hasattr(backend.model, "_resize_cache"):  # of the library's own making: it may go
            backend.model._resize_cache(CACHED_WORDS)
        return backend

    def _window(self, render: Render, turn: Turn, as_text: bool) -> list[int]:
        """The tokens from the last control token before an answer to where it begins, tokenized
        alone.
        """
        skeleton = render.skeleton
        text = render.between(
            skeleton.controls[turn.before] if turn.before >= 0 else None, turn.start
        )
        if as_text:
            opening = (
                skeleton.control_ids[turn.before : turn.before + 1] if turn.before >= 0 else []
            )
            rest = text[sum(len(self._spelt[number]) for number in opening) :]
            return opening + self._encode([rest], as_text=True)[0]
        found = self._windows.get(text)  # mostly a role header, so the few there are are kept
        if found is None:
            if len(self._windows) >= MOST_WINDOWS:
                self._windows.clear()
            found = self._windows[text] = self._encode([text])[0]
        return found

    def _encode_as_text(self, render: Render, cuts: Sequence[int] = ()) -> list[int]:
        """A row's tokens where only the template writes control tokens: what lies between those,
        and between `cuts`, is tokenized piece by piece."""
        skeleton = render.skeleton
        if not all(map(self._stands_apart, set(skeleton.control_ids))) or (
            cuts and not self._cuts_cleanly
        ):
            raise RowError(f"{HOLDS_CONTROL}, and this tokenizer does not take it as text")
        joints = [
            (render.position(place), [n])
            for place, n in zip(skeleton.controls, skeleton.control_ids, strict=True)
        ]
        pieces, stop = [], 0
        joints = sorted([*joints, *((cut, []) for cut in cuts)])
        for start, ids in joints:
            pieces.append(render.text[stop:start])
            stop = start + sum(len(self._spelt[number]) for number in ids)
        tokens = self._encode([*pieces, render.text[stop:]], as_text=True)
        return [
            n
            for ids, (_, joint) in zip(tokens, [*joints, (0, [])], strict=True)
            for n in (*ids, *joint)
        ]

    def _stands_apart(self, control: int) -> bool:
        """Whether a piece beside this control token is tokenized as it is alone."""
        if control not in self._apart:
            spelt = self._spelt[control]
            alone = self._encode(list(SAMPLES))
            beside = self._encode([f"{spelt}{text}{spelt}" for text in SAMPLES])
            self._apart[control] = beside == [[control, *ids, control] for ids in alone]
        return self._apart[control]

    def _encode_cut(self, text: str, cuts: list[int]) -> list[int]:
        """The text tokenized in pieces. Only for tokenizers that put nothing of their own before a
        piece.
        """
        if not self._cuts_cleanly:
            raise RowError("a token spans the end of the prompt and the answer")
        pieces = [
            text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)
        ]
        return [number for ids in self._encode(pieces) for number in ids]


def _answers(messages: Sequence[Message]) -> list[int]:
    return [number for number, message in enumerate(messages) if message.role == "assistant"]


def _answers_of(skeleton: Skeleton) -> list[int]:
    return [
        number for number, message in enumerate(skeleton.messages) if message["role"] == "assistant"
    ]


def _is_empty(message: Message) -> bool:
    return not (
        message.content.strip() or message.tool_calls or (message.reasoning_content or "").strip()
    )


def _finished(ids: np.ndarray, trained: np.ndarray) -> Example:
    trained[:1] = False
    if not trained.any():
        raise RowError("nothing to train")
    return Example(ids, trained)
