"""Builds a rank's micro-batches from the plan, a little before the loop asks for them.

Plan + Prepared -> Loader -> Batch
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from trainer.data.batch_plan import Plan, micro_batches_of
from trainer.data.cache import Documents
from trainer.data.prepare import TrainData
from trainer.datatypes import Batch, StepPlan

STEPS_AHEAD = 2  # steps that the background thread builds before they are asked for
BATCHES_AHEAD = 4  # and micro-batches, where a step is streamed


def build_batch(
    documents: Documents,
    pieces: np.ndarray,
    weights: np.ndarray,
    *,
    epoch: int,
    sequences: tuple[int, ...],
    uniform_weight: float | None,
) -> Batch:
    """The rows of a micro-batch, laid end to end.

    Position p of a document predicts token p + 1 wherever both lie in the document, also where the
    packing cut between them; so no document predicts its neighbour's first token, and no trained
    token is lost at a cut.

    Args:
        pieces: (P, 4), columns as in flow.Piece.
        weights: (P,), the weight of each trained token of a piece.
        uniform_weight: the weight, where all pieces have the same.
    """
    import torch  # here, as the processes that tokenize import this file too, and need none

    document, start, stop, number = pieces.T
    lengths = stop - start
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    positions = np.arange(total) - np.repeat(ends - lengths, lengths)
    places = positions + np.repeat(
        documents.offsets[document] + start, lengths
    )  # in the flat columns

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
        uniform_weight=None if uniform_weight is None else float(np.float32(uniform_weight)),
        document_keys=tuple(
            (epoch, d, n) for d, n in zip(document.tolist(), number.tolist(), strict=True)
        ),
        sequence_ids=sequences,
    )


def filler_batch(epoch: int = 0) -> Batch:
    """One document of two tokens with one trained position of weight zero: every parameter gets a
    gradient, of zero, and no collective hangs (C1)."""
    import torch

    return Batch(
        input_ids=torch.zeros(2, dtype=torch.int64),
        position_ids=torch.arange(2),
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
        lengths=(2,),
        trained_positions=torch.zeros(1, dtype=torch.int64),
        targets=torch.zeros(1, dtype=torch.int64),
        weights=torch.zeros(1),
        uniform_weight=0.0,
        document_keys=((epoch, -1, 0),),
        sequence_ids=(),
        is_filler=True,
    )


class Loader:
    """The batches of one rank, built by a background thread a little before they are asked for.

    A fault in the thread is raised where its batches are asked for. Close it, or use it in `with`.
    """

    def __init__(self, data: TrainData, plan: Plan, rank: int, world: int, pin: bool) -> None:
        self.data, self.plan = data, plan
        self._rank, self._world, self._pin = rank, world, pin
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: dict[int, Future[list[Batch]]] = {}
        data.open()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.data.close()
        self._thread.shutdown(cancel_futures=True)

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, fillers included: as many on every rank."""
        wanted = range(step, min(step + 1 + STEPS_AHEAD, self.plan.steps))
        self._ahead = {
            s: self._ahead.get(s) or self._thread.submit(self._build_step, s) for s in wanted
        }
        return self._ahead.pop(step).result()

    def fullest(self, first_step: int) -> list[Batch]:
        """The micro-batches of the plan, from a step on, that need the most memory: the same on
        every rank.
        """
        return [
            self._thread.submit(self._build, *place).result()
            for place in self.plan.fullest(first_step)
        ]

    def stream(self, step: int) -> Iterator[Batch]:
        """The same, one after the other, where a step is too large to be held: held-out evaluation."""
        plan = self.plan.step(step)
        waiting: list[Future[Batch]] = []
        for rows in micro_batches_of(plan, self._rank, self._world):
            waiting.append(self._thread.submit(self._build, plan, rows))
            if len(waiting) > BATCHES_AHEAD:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()

    def _build_step(self, step: int) -> list[Batch]:
        plan = self.plan.step(step)
        return [self._build(plan, rows) for rows in micro_batches_of(plan, self._rank, self._world)]

    def _build(self, step: StepPlan, rows: tuple[int, ...] | None) -> Batch:
        if rows is None:
            batch = filler_batch(step.epoch)
        else:
            pieces = self.plan.pieces(step.epoch, rows)
            batch = build_batch(
                self.data.of(step.epoch).documents,
                pieces,
                self.plan.piece_weights(step, pieces),
                epoch=step.epoch,
                sequences=rows,
                uniform_weight=self.plan.uniform_weight(step),
            )
        return batch.pin() if self._pin else batch
