"""The values that one stage hands to the next. Read this file first.

    rows -> Conversation -> Example -> (cache) -> Piece -> StepPlan -> Batch -> StepResult

All values are frozen: a stage receives one, and returns another.

Shapes, here and everywhere: T tokens of a micro-batch, all its documents laid end to end without
padding; D documents in it; N trained positions in it; H hidden size; V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # slow to import, and `packhorse --help` imports this file
    import numpy as np
    import torch

# --------------------------------------------------------------------------------------- exit codes

DONE = 0
FAILED = 1
BAD_INPUT = 2
SAVED_RUN_AGAIN = 75  # EX_TEMPFAIL: a checkpoint is saved, start the same command again
# In a run folder: the workers' exit code 0 means saved, and the launcher exits with 75.
STOP_FILE = "stop.json"
# In a folder of `packhorse eval`, which is no run: what was scored, and at which step.
EVALUATED = "evaluated.json"
LAUNCHER = "PACKHORSE_LAUNCHER"  # environment variable of workers: their launcher's process id


class BadInput(ValueError):
    """The input cannot be used (exit code 2). The message says what is wrong and what to do."""


class RowError(ValueError):
    """A row cannot be used. The message is a short reason, equal for many rows, to be counted."""


class Filtered(RowError):
    """A row that the recipe's filters leave out. It is counted, but not as a fault."""


class TooLong(RowError):
    """A row has more tokens than an example may have: TooLong(reason, tokens of the row)."""

    @property
    def tokens(self) -> int:
        return self.args[1]

    def __str__(self) -> str:
        return self.args[0]


# --------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Message:
    """One turn. With `weight` 0 it is context only, even if its role is trained."""

    role: str
    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    weight: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Return the message as chat templates expect it: absent fields are left out, not null."""
        fields = {
            "role": self.role,
            "content": self.content,
            "reasoning_content": self.reasoning_content,
            "tool_calls": list(self.tool_calls) or None,
            "tool_call_id": self.tool_call_id,
            "name": self.name,
        }
        return {key: value for key, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Conversation:
    """A row in the one form that every format is read into.

    It has either `messages`, which the chat template renders, or `text`, a plain document that is
    trained as a whole.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    # columns, and keys of messages, that the row holds and its format does not read
    unread: tuple[str, ...] = field(default=(), compare=False)


class Prompt(NamedTuple):
    """A held-out prompt, and the answer that it should get."""

    input_ids: list[int]  # end with the generation prompt
    text: str  # input_ids, decoded
    reference: str  # the answer
    conversation: Conversation  # with the answer's turn, and those after it
    row: Mapping[str, Any]  # as it is in the file

    @property
    def asked(self) -> tuple[Message, ...]:
        """The turns before the answer, which is the assistant's last one."""
        turns = self.conversation.messages
        answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        return turns[: answers[-1]]


@dataclass(frozen=True)
class Example:
    """A tokenized conversation: `input_ids` (L,) int32 and `trained` (L,) bool.

    The first token is never trained, as nothing predicts it.
    """

    input_ids: np.ndarray
    trained: np.ndarray
    unread: tuple[str, ...] = ()  # as of its Conversation


class Row(NamedTuple):
    """A line of the data, before it is read."""

    source: int
    file: int
    number: int  # in the file, from 1
    fields: Any


class LeftOut(NamedTuple):
    """A row that gives no document, and why."""

    source: int
    file: int
    row: int
    reason: str
    tokens: int = 0  # of a row that is too long


@dataclass(frozen=True)
class Tokenized:
    """The outcome of some rows: n documents laid end to end, and the rows that were left out."""

    lengths: np.ndarray  # (n,) int64
    input_ids: np.ndarray  # (sum of lengths,) int32
    trained: np.ndarray  # (sum of lengths,) bool
    trained_counts: np.ndarray  # (n,) int64
    sources: np.ndarray  # (n,) int32, number of the source in the recipe
    files: np.ndarray  # (n,) int32, number of the file
    rows: np.ndarray  # (n,) int64, row number in the file, from 1
    digests: np.ndarray  # (n,) uint64, of the document's tokens and flags
    row_digests: np.ndarray  # (n,) uint64, of all tokens and flags of its row
    rejects: tuple[LeftOut, ...]
    filtered: tuple[LeftOut, ...]  # likewise, by the recipe's filters
    counts: Mapping[tuple[int, str], int]  # (source, name in the report) -> what to add there
    # In how many of a source's rows stands a name that nobody reads: (source, name) -> rows.
    unread: Mapping[tuple[int, str], int]


class Piece(NamedTuple):
    """Tokens [start, stop) of a document. `piece` numbers the document's pieces from 0."""

    document: int
    start: int
    stop: int
    piece: int


@dataclass(frozen=True)
class Packed:
    """The packed sequences of an epoch.

    `pieces` (P, 4) int64 has Piece's columns. Sequence s holds
    pieces[sequence_offsets[s] : sequence_offsets[s + 1]]; `sequence_offsets` is (S + 1,) int64.
    """

    pieces: np.ndarray
    sequence_offsets: np.ndarray

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_offsets) - 1


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step, before any token is read: which packed sequences it runs.

    `micro_batches[i]` holds the numbers (within the epoch) of the sequences of micro-batch i. Rank
    r of W runs micro-batches r, r + W, ... and a filler where none is left for it.
    """

    step: int
    epoch: int
    micro_batches: tuple[tuple[int, ...], ...]
    trained_tokens: int
    examples: int


FILLER = -1  # the document's number in the key of a filler's document


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one rank: its D documents end to end, T tokens without padding.

    If several ranks share it (C13), T is of this rank's slice. What describes documents is whole.
    """

    input_ids: torch.Tensor  # (T,) int64
    position_ids: torch.Tensor  # (T,) int64, from 0 at the first token of every piece of a document
    cu_seqlens: torch.Tensor  # (D + 1,) int32, where documents begin, and the end of the last
    # Of the D documents. On the host, so that nothing has to wait for the GPU to know them.
    lengths: tuple[int, ...]
    trained_positions: torch.Tensor  # (N,) int64 into T: positions whose next token is trained
    targets: torch.Tensor  # (N,) int64, these next tokens
    # (N,) float32. The step's loss is the sum of loss x weight over all ranks (C2).
    weights: torch.Tensor
    # (epoch, document, piece) of each of the D documents, which seed the noise (C3).
    document_keys: tuple[tuple[int, int, int], ...]
    sequence_ids: tuple[int, ...]  # numbers within the epoch; empty for a filler
    is_filler: bool = False
    slice: tuple[int, int] = (0, 1)  # number of this rank's slice, and of how many
    zigzag: bool = False  # how it is cut; see slice_pieces

    def cut(self, index: int, number: int, zigzag: bool = False) -> Batch:
        """Return slice `index` of `number` slices of a whole batch, which has as many tokens."""
        import torch

        if number == 1:
            return self
        part = replace(self, slice=(index, number), zigzag=zigzag)
        places = torch.arange(len(self.input_ids), device=self.input_ids.device)
        own = part.own_tokens(places)
        assert len(own), "a slice without a token"
        local = torch.full_like(places, -1)
        local[own] = places[: len(own)]
        trained = local[self.trained_positions]  # -1: on another rank
        inside = trained >= 0
        return replace(
            part,
            input_ids=self.input_ids[own],
            position_ids=self.position_ids[own],
            trained_positions=trained[inside],
            targets=self.targets[inside],
            weights=self.weights[inside],
        )

    @property
    def pieces(self) -> Ranges:
        """The ranges of the packed sequence's tokens that this rank has."""
        index, number = self.slice
        return slice_pieces(self.lengths, number, self.zigzag)[index]

    def own_tokens(self, of_all: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a tensor that has a row for each token of the sequence."""
        import torch

        return torch.cat([of_all[start:stop] for start, stop in self.pieces])

    @property
    def is_counted(self) -> bool:
        """Whether this rank counts the micro-batch's sequences: of its slices, the first does."""
        return self.slice[0] == 0

    @property
    def tokens(self) -> int:
        """The number of real tokens; 0 for a filler."""
        return 0 if self.is_filler else self.input_ids.shape[0]

    @property
    def trained_tokens(self) -> int:
        return 0 if self.is_filler else self.trained_positions.shape[0]

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    def to(self, device: torch.device) -> Batch:
        """Return a copy on `device`. From pinned memory, the copy is asynchronous."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """Return a copy in pinned host memory."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())

    def _map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        import torch

        fields = vars(self).items()
        changed = {name: change(value) for name, value in fields if isinstance(value, torch.Tensor)}
        return replace(self, **changed)


Ranges = tuple[tuple[int, int], ...]
"""Tokens [start, stop) of a packed sequence, in order."""

ZIGZAG_TOKENS = 128  # of a piece at least: below, kernels lose more than balance gains


def slice_pieces(lengths: Sequence[int], number: int, zigzag: bool = False) -> tuple[Ranges, ...]:
    """Return the tokens that each of `number` ranks has of a packed sequence of documents.

    Else a range each, cut at T i / number. With `zigzag` each long document is cut into
    2 x number pieces, of which a rank gets an early and a late one, so that all see as many keys;
    what the short documents leave is cut as the whole is else.
    """
    import numpy as np

    total = sum(lengths)
    if not zigzag:
        borders = [total * i // number for i in range(number + 1)]
        return tuple((border,) for border in pairwise(borders))
    owner, is_short, begin = np.zeros(total, np.int64), np.ones(total, bool), 0
    for length in lengths:
        if number > 1 and length >= 2 * number * ZIGZAG_TOKENS:
            piece = np.arange(length) * 2 * number // length
            owner[begin : begin + length] = np.minimum(piece, 2 * number - 1 - piece)
            is_short[begin : begin + length] = False
        begin += length
    short = int(is_short.sum())
    owner[is_short] = np.arange(short) * number // max(short, 1)
    cuts = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), total]
    return tuple(
        tuple((start, stop) for start, stop in pairwise(cuts) if owner[start] == index)
        for index in range(number)
    )


def first_key(lengths: Sequence[int], start: int, window: int | None) -> int:
    """Return the first token that token `start` of a packed sequence attends to.

    Args:
        window: a token sees itself and window - 1 before it; None: its whole document up to it.
    """
    begin = 0
    for length in lengths:
        if begin + length > start:
            break
        begin += length
    return max(begin, start - window + 1) if window else begin


# ----------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class StepResult:
    """The outcome of one optimizer step."""

    # () float32 on the device: this rank's share of the step's loss, which is the sum over ranks.
    loss: torch.Tensor
    grad_norm: float  # of all ranks together, before clipping
    skipped: str | None = None  # why the update was not applied (C12); None if it was
