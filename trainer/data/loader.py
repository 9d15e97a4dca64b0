"""Build a rank's micro-batches from the plan, a little before the loop asks for them.

Plan + TrainData -> Loader -> Batch
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from packhorse.trainer.data.batch_plan import Plan
from packhorse.trainer.data.documents import Documents
from packhorse.trainer.data.prepare import TrainData
from packhorse.trainer.data.ranks import count_groups, micro_batches_of
from packhorse.trainer.datatypes import FILLER, Batch, StepPlan

STEPS_AHEAD = 2  # steps that the background thread builds before they are asked for
BATCHES_AHEAD = 4  # micro-batches that it builds ahead when a step is streamed


def build_batch(
    documents: Documents,
    pieces: np.ndarray,
    weights: np.ndarray,
    *,
    epoch: int,
    sequences: tuple[int, ...],
) -> Batch:
    """Lay the pieces of a micro-batch end to end.

    Position p of a document predicts token p + 1 of that document, also if the packing cut between
    them. So no document predicts its neighbour's first token, and no cut loses a trained token.

    Args:
        pieces: (P, 4); Piece has the columns.
        weights: (P,), the weight of each trained token of a piece.
        epoch, sequences: where the pieces are from.
    """
    import torch  # here, as the processes that tokenize import this file and do not need it

    document, start, stop, number = pieces.T
    lengths = stop - start
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    positions = np.arange(total) - np.repeat(ends - lengths, lengths)
    # The place of each token in the flat columns, and of the token that follows it (-1 for none).
    places = positions + np.repeat(documents.offsets[document] + start, lengths)
    following = places + 1
    following[ends - 1] = np.where(stop < documents.lengths[document], following[ends - 1], -1)
    trained = np.flatnonzero(documents.trained[following] & (following >= 0))
    weight = np.repeat(weights.astype(np.float32), lengths)[trained]
    return Batch(
        input_ids=torch.from_numpy(documents.input_ids[places].astype(np.int64)),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        lengths=tuple(lengths.tolist()),
        trained_positions=torch.from_numpy(trained),
        targets=torch.from_numpy(documents.input_ids[following[trained]].astype(np.int64)),
        weights=torch.from_numpy(weight),
        document_keys=tuple(
            (epoch, d, n) for d, n in zip(document.tolist(), number.tolist(), strict=True)
        ),
        sequence_ids=sequences,
    )


def filler_batch(epoch: int = 0, tokens: int = 2) -> Batch:
    """Build a batch that changes nothing: a document of a few tokens, one trained with weight zero.

    A rank that has no micro-batch left runs it, so that every parameter gets a gradient (of zero)
    and no collective hangs (C1).
    """
    import torch

    return Batch(
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        position_ids=torch.arange(tokens),
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32),
        lengths=(tokens,),
        trained_positions=torch.zeros(1, dtype=torch.int64),
        targets=torch.zeros(1, dtype=torch.int64),
        weights=torch.zeros(1),
        document_keys=((epoch, FILLER, 0),),
        sequence_ids=(),
        is_filler=True,
    )


def _lengthened(batch: Batch, filler: Batch) -> Batch:
    """Return the batch with the filler's document, untrained, at its end."""
    import torch

    total = batch.input_ids.shape[0]
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, filler.input_ids]),
        position_ids=torch.cat([batch.position_ids, filler.position_ids]),
        cu_seqlens=torch.cat([batch.cu_seqlens, total + filler.cu_seqlens[1:]]),
        lengths=batch.lengths + filler.lengths,
        document_keys=batch.document_keys + filler.document_keys,
    )


class Loader:
    """The batches of one rank, built by a background thread a little before they are asked for.

    An error in the thread is raised where its batches are asked for. Close the loader, or use it
    in `with`.

    Args:
        sequence: consecutive ranks that share each micro-batch, a slice each (C13).
        zigzag: how it is cut; see datatypes.slice_pieces.
    """

    def __init__(
        self,
        data: TrainData,
        plan: Plan,
        rank: int,
        world: int,
        pin: bool,
        sequence: int = 1,
        zigzag: bool = False,
    ) -> None:
        self.data, self.plan, self._pin = data, plan, pin
        # To the plan, ranks that share a sequence are one.
        self._group, self.groups = rank // sequence, count_groups(world, sequence)
        self._slice = (rank % sequence, sequence, zigzag)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: dict[int, Future[list[Batch]]] = {}
        data.open()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        # The data first: the thread may be waiting for a shard.
        self.data.close()
        self._thread.shutdown(cancel_futures=True)

    def step(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of a step, with fillers: as many on every rank."""
        wanted = range(step, min(step + 1 + STEPS_AHEAD, self.plan.steps))
        self._ahead = {
            s: self._ahead.get(s) or self._thread.submit(self._build_step, s) for s in wanted
        }
        return self._ahead.pop(step).result()

    def fullest(self, first_step: int) -> list[Batch]:
        """Return the micro-batches from a step on that need the most memory; ranks get the same."""
        return [self._build(*place) for place in self.plan.fullest(first_step)]

    def stream(self, step: int) -> Iterator[Batch]:
        """Yield what `step` returns, if that is too much for memory: held-out evaluation."""
        plan = self.plan.step(step)
        waiting: list[Future[Batch]] = []
        for sequences in micro_batches_of(plan, self._group, self.groups):
            waiting.append(self._thread.submit(self._build, plan, sequences))
            if len(waiting) > BATCHES_AHEAD:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()

    def _build_step(self, step: int) -> list[Batch]:
        plan = self.plan.step(step)
        mine = micro_batches_of(plan, self._group, self.groups)
        return [self._build(plan, sequences) for sequences in mine]

    def _build(self, step: StepPlan, sequences: tuple[int, ...] | None) -> Batch:
        filler = filler_batch(step.epoch, max(2, self._slice[1]))
        if sequences is None:
            batch = filler
        else:
            pieces = self.plan.pieces(step.epoch, sequences)
            documents = self.data.for_epoch(step.epoch).documents
            documents.require_unchanged(pieces[:, 0])
            batch = build_batch(
                documents,
                pieces,
                self.plan.piece_weights(step, pieces),
                epoch=step.epoch,
                sequences=sequences,
            )
            if batch.tokens < self._slice[1]:  # each of the ranks needs a token
                batch = _lengthened(batch, filler)
        batch = batch.cut(*self._slice)
        return batch.pin() if self._pin else batch
