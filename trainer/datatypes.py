"""The values that one stage hands to the next. Read this file first.

    rows -> Conversation -> Example -> (cache) -> Piece -> StepPlan -> Batch -> StepResult

Everything is frozen: a stage gets a value, and hands on another one.

Shapes, here and everywhere: T tokens of a micro-batch, all its documents laid end to end without
padding; D documents in it; N trained positions in it; H hidden size; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # heavy, and this file is read by `packhorse --help`
    import numpy as np
    import torch

# --------------------------------------------------------------------------------------- exit codes

DONE = 0
FAILED = 1
BAD_INPUT = 2
SAVED_RUN_AGAIN = 75  # EX_TEMPFAIL: a checkpoint is saved, start the same command again
STOP_FILE = (
    "stop.json"  # of a run folder: the workers' exit 0 means saved, and the launcher ends with 75
)


class BadInput(ValueError):
    """The user's input cannot be used. The message is one sentence that says what to do; exit code
    2.
    """


class RowError(ValueError):
    """One row cannot be used. The message is a short reason that repeats from row to row, so that
    it can be counted.
    """


class Filtered(RowError):
    """A row that the recipe's filters leave out. It is counted, but no fault of the row."""


# --------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Message:
    """One turn. `weight` 0 keeps the turn as context although its role would be trained."""

    role: str
    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    weight: int = 1

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates expect it: absent fields are left out, not null."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning_content is not None:
            fields["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            fields["tool_calls"] = list(self.tool_calls)
        if self.tool_call_id is not None:
            fields["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            fields["name"] = self.name
        return fields


@dataclass(frozen=True)
class Conversation:
    """A row in the one form that every format is read into.

    Either `messages` (rendered by the chat template) or `text` (a plain document, no template, all
    of it trained) is given.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None


class Prompt(NamedTuple):
    """A held-out question, and the answer it should get."""

    input_ids: list[int]  # end with the generation prompt
    text: str  # the same
    reference: str
    conversation: Conversation  # with the reference's turn
    row: Mapping[str, Any]  # as it stands in the file


@dataclass(frozen=True)
class Example:
    """A tokenized conversation: `input_ids` (L,) int32 and `trained` (L,) bool, True where a token
    is learned.

    The first token is never trained: nothing predicts it.
    """

    input_ids: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True)
class Tokenized:
    """What became of some rows: n documents laid end to end, and the rows that are left out."""

    lengths: np.ndarray  # (n,) int64
    input_ids: np.ndarray  # (sum of lengths,) int32
    trained: np.ndarray  # (sum of lengths,) bool
    trained_counts: np.ndarray  # (n,) int64
    sources: np.ndarray  # (n,) int32, number of the source in the recipe
    files: np.ndarray  # (n,) int32, number of the file
    rows: np.ndarray  # (n,) int64, row number in the file, from 1
    digests: np.ndarray  # (n,) uint64, of all tokens and flags of the row that the document is from
    rejects: tuple[tuple[int, int, int, str], ...]  # source, file, row, reason
    filtered: tuple[tuple[int, int, int, str], ...]  # likewise: left out by the recipe's filters
    source_rows: Mapping[int, int]  # rows read of each source, those left out too
    cuts: tuple[
        tuple[int, int], ...
    ] = ()  # source of a row that was truncated or split, trained tokens it lost


class Piece(NamedTuple):
    """Tokens [start, stop) of a document; `piece` counts the document's pieces from 0."""

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
    """One optimizer step, before anything is read: which packed sequences it runs.

    `micro_batches[i]` holds the numbers (within the epoch) of the sequences of micro-batch i. Rank
    r of W runs micro-batches r, r + W, ... and a filler where none is left for it.
    """

    step: int
    epoch: int
    micro_batches: tuple[tuple[int, ...], ...]
    trained_tokens: int
    examples: int


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one rank. Documents lie end to end in one row of T tokens, without
    padding.
    """

    input_ids: torch.Tensor  # (T,) int64
    position_ids: torch.Tensor  # (T,) int64, restarting at every document's (piece's) first token
    cu_seqlens: torch.Tensor  # (D + 1,) int32, where documents begin, and T
    lengths: tuple[int, ...]  # of the D documents, on the host: a GPU need not be waited for
    trained_positions: torch.Tensor  # (N,) int64 into T: positions whose next token is learned
    targets: torch.Tensor  # (N,) int64, the next tokens
    weights: (
        torch.Tensor
    )  # (N,) float32; the step's loss is the sum of loss x weight over all ranks (C2)
    uniform_weight: (
        float | None
    )  # the weight, where all N are alike (lets the fused kernel take one pass)
    document_keys: tuple[
        tuple[int, int, int], ...
    ]  # (epoch, document, piece) for each of D: seeds noise (C3)
    sequence_ids: tuple[int, ...]  # numbers within the epoch; empty for a filler
    is_filler: bool = False

    @property
    def tokens(self) -> int:
        """Real tokens: a filler has none."""
        return 0 if self.is_filler else self.input_ids.shape[0]

    @property
    def trained_tokens(self) -> int:
        return 0 if self.is_filler else self.trained_positions.shape[0]

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; the copy does not wait where the host memory is pinned."""
        return replace(
            self,
            **{name: getattr(self, name).to(device, non_blocking=True) for name in _BATCH_TENSORS},
        )

    def pin(self) -> Batch:
        """The same batch in pinned host memory."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _BATCH_TENSORS})


_BATCH_TENSORS = (
    "input_ids",
    "position_ids",
    "cu_seqlens",
    "trained_positions",
    "targets",
    "weights",
)

# ----------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. `skipped` says why the update was not applied (C12); None where
    it was.
    """

    loss: (
        torch.Tensor
    )  # () float32 on the device: this rank's share of the step's loss (sums over ranks)
    grad_norm: float  # global, before clipping
    skipped: str | None = None
