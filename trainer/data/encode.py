"""Tokenize rendered texts as inference does, and account for the control tokens among the tokens.

Texts enter, whole or as a `Render` with the places at which to cut it; token ids leave. A row whose
pieces cannot be tokenized apart from each other is a RowError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from packhorse.trainer.data.skeleton import Render, Turn
from packhorse.trainer.datatypes import RowError

SAMPLES = ("", "x", " x ", "\nx\n")
HOLDS_CONTROL = "a text holds a control token of the model"
MAX_WINDOWS = 4096
# The tokenizer's own cache of 10,000 words is full after some thousand rows, and later rows would
# take a sixth longer.
CACHED_WORDS = 2**16


class Encoder:
    """A fast tokenizer, called without what padding, truncation or special tokens would add.

    Args:
        control_ids: ids of the control tokens, by their text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control_ids: Mapping[str, int]) -> None:
        self._tokenizer = tokenizer
        ids = list(control_ids.values())
        self.is_control = np.zeros(max(len(tokenizer), *ids, 0) + 1, dtype=bool)
        self.is_control[ids] = True
        self._spelt = {number: text for text, number in control_ids.items()}
        self._windows: dict[str, list[int]] = {}
        self._stands_apart: dict[int, bool] = {}
        alone, after_newline = self.encode(["x", "\nx"])
        # False where the tokenizer puts something of its own before each piece
        self._cuts_cleanly = after_newline[-len(alone) :] == alone

    def encode(
        self, texts: Sequence[str], add_special_tokens: bool = False, as_text: bool = False
    ) -> list[list[int]]:
        """Return each text's token ids; with `as_text`, what spells a control token is text."""
        # The switch is the tokenizer's own state, which others share: it is set back in any case.
        backend = self.backend()
        backend.encode_special_tokens = as_text
        try:
            encodings = backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in encodings]
        finally:
            backend.encode_special_tokens = False

    def controls(self, tokens: Sequence[int]) -> list[int]:
        """Return the control tokens among `tokens`, in order."""
        ids = np.array(tokens, dtype=np.int32)
        return ids[self.is_control[ids]].tolist()

    def backend(self) -> Any:
        """Return the tokenizer proper, without the padding and truncation that a call elsewhere may
        have left in it."""
        backend: Any = self._tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        if hasattr(backend.model, "_resize_cache"):  # private to the library: it may disappear
            backend.model._resize_cache(CACHED_WORDS)
        return backend

    def encode_before(self, render: Render, turn: Turn, as_text: bool) -> list[int]:
        """Return the tokens from the last control token before an answer to the answer's beginning,
        tokenized alone, as in a prompt."""
        skeleton, begin, controls = render.skeleton, 0, []
        if turn.before >= 0:
            begin = render.position(skeleton.controls[turn.before])
            controls = skeleton.control_ids[turn.before : turn.before + 1]
        text = render.text[begin : render.position(turn.start)]
        if as_text:
            rest = text[sum(len(self._spelt[number]) for number in controls) :]
            return controls + self.encode([rest], as_text=True)[0]
        found = self._windows.get(text)  # mostly a role's header, of which there are few
        if found is None:
            if len(self._windows) >= MAX_WINDOWS:
                self._windows.clear()
            found = self._windows[text] = self.encode([text])[0]
        return found

    def encode_cut(self, render: Render, cuts: Sequence[int], as_text: bool) -> list[int]:
        """Return the tokens of a render that is cut into pieces at the characters `cuts`.

        With `as_text` it is cut at the template's control tokens, too, and only the template writes
        such tokens: what lies between is tokenized with control tokens switched off.

        Raises:
            RowError: this tokenizer does not give a piece the tokens that it has in the whole.
        """
        controls = render.skeleton.control_ids
        if cuts and not self._cuts_cleanly and not as_text:
            raise RowError("a token spans the end of the prompt and the answer")
        if as_text and not (
            all(map(self._is_apart, set(controls))) and (self._cuts_cleanly or not cuts)
        ):
            raise RowError(f"{HOLDS_CONTROL}, and this tokenizer does not take it as text")
        # Where the text is cut, with the control tokens that are written there instead of text.
        joints = [(cut, []) for cut in cuts]
        if as_text:
            places = map(render.position, render.skeleton.controls)
            joints += [(place, [n]) for place, n in zip(places, controls, strict=True)]
        pieces, stop = [], 0
        for start, ids in sorted(joints):
            pieces.append(render.text[stop:start])
            stop = start + sum(len(self._spelt[number]) for number in ids)
        encoded = self.encode([*pieces, render.text[stop:]], False, as_text)
        tokens = encoded[0]
        for (_, ids), piece in zip(sorted(joints), encoded[1:], strict=True):
            tokens += [*ids, *piece]
        return tokens

    def _is_apart(self, control: int) -> bool:
        """Try out whether a piece beside this control token is tokenized as it is alone; one that
        takes white space from its neighbours is not."""
        if control not in self._stands_apart:
            spelt = self._spelt[control]
            alone = self.encode(list(SAMPLES))
            beside = self.encode([f"{spelt}{text}{spelt}" for text in SAMPLES])
            self._stands_apart[control] = beside == [[control, *ids, control] for ids in alone]
        return self._stands_apart[control]
