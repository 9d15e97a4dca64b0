"""Lengths of documents and a seed in; every optimizer step's rows, micro-batches and token weights
out.

Integers only: nothing here reads a token, and nothing depends on ranks but the last cut (C1). The
same plan serves training and held-out evaluation. Where a source grows, an epoch is a shard of it.
"""

from __future__ import annotations

import sys
import threading
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from trainer.config.recipe import BatchSection, LossSection, TrainSection
from trainer.datatypes import BadInput, Packed, Piece, StepPlan
from trainer.dist import seed_from

MUCH_FILLER = 0.10  # share of idle micro-batches above which the user is warned
EPOCHS_KEPT = 2  # packings in memory: this epoch's and, around its end, the next one's

Packer = Callable[[np.ndarray, np.random.Generator], Packed]
"""Rows out of the lengths of an epoch's documents: data/pack.py, its row size and packing given."""

Keep = Callable[[int, Callable[[], Packed]], Packed]
"""keep(epoch, make): the epoch's packing, made now where none is kept."""


@dataclass(frozen=True)
class Corpus:
    """What a plan knows of the n documents.

    `lengths`, `trained_counts` (tokens, trained tokens) and `sources` (number of the source) are
    (n,) integers; source s gives round(weights[s] x its documents) an epoch.
    `count_trained(documents, starts, stops)` counts the trained tokens that positions [start, stop)
    of a document predict; it is asked only about documents that packing has cut.
    """

    lengths: np.ndarray
    trained_counts: np.ndarray
    sources: np.ndarray
    weights: tuple[float, ...]
    count_trained: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

    streaming = False

    def corpus(self, epoch: int) -> Corpus:
        """Every epoch is made of these documents."""
        return self

    def num_sequences(self, epoch: int, first_step: int, count: Callable[[], int]) -> int:
        return count()


class Epochs(Protocol):
    """The documents of each epoch: a Corpus, or the shards of a source that grows
    (data/growing.py).
    """

    @property
    def streaming(self) -> bool:
        """Whether the next epoch is known only when the last one has been used."""
        ...

    def corpus(self, epoch: int) -> Corpus: ...

    def num_sequences(self, epoch: int, first_step: int, count: Callable[[], int]) -> int:
        """Packed rows of the epoch that begins with `first_step` (from 0); `count` packs it, if
        nobody has.
        """
        ...


class Plan:
    """The list of optimizer steps, as a function of (epochs, packer, batch, train, loss).

    Every epoch is packed afresh from (seed, epoch). All are packed once at the start, to count
    their rows, so `steps` is exact before the first step; but those of a source that grows when a
    step needs them.
    """

    def __init__(
        self,
        epochs: Epochs,
        packer: Packer,
        batch: BatchSection,
        train: TrainSection,
        loss: LossSection,
        keep: Keep = lambda epoch, make: make(),
    ) -> None:
        self.epochs, self.batch, self.train, self.loss = epochs, batch, train, loss
        self._packer, self._keep = packer, keep
        self._packings: dict[int, Packed] = {}
        self._lock = threading.Lock()  # the loader's thread and the loop both ask
        self._counting = threading.Lock()  # apart: the loop need not wait while a shard is prepared
        self._num_sequences: list[int] = []  # rows of each epoch
        self._first_steps = [
            0
        ]  # number of each epoch's first step, and of the step after the last epoch
        while not epochs.streaming and not self._all_counted():
            self._count_epoch()
        self.steps = train.steps or self._first_steps[-1]

    @classmethod
    def for_eval(cls, corpus: Corpus, packer: Packer, batch: BatchSection) -> Plan:
        """All rows as one step, weighted by `token`, whatever the run's seed and weighting: the
        loss of that step is the held-out loss."""
        whole = batch.model_copy(update={"global_batch_size": sys.maxsize})
        return cls(
            corpus, packer, whole, TrainSection.model_validate({}), LossSection.model_validate({})
        )

    # ---------------------------------------------------------------------------------------- steps

    def step(self, step: int) -> StepPlan:
        """Step `step`, counted from 0. An epoch's rows are spread evenly over its steps."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a plan of {self.steps} steps")
        self._count_to(step)
        epoch = bisect_right(self._first_steps, step) - 1
        steps = self._first_steps[epoch + 1] - self._first_steps[epoch]
        place = step - self._first_steps[epoch]
        first, end = (k * self._num_sequences[epoch] // steps for k in (place, place + 1))
        size = self.batch.micro_batch_size
        cuts = range(first, end, size)
        micro_batches = tuple(tuple(range(cut, min(cut + size, end))) for cut in cuts)
        counts = self._targets(epoch, self.pieces(epoch, range(first, end)))
        return StepPlan(
            step, epoch, micro_batches, int(counts.sum()), int(np.count_nonzero(counts))
        )

    def sequence(self, epoch: int, number: int) -> list[Piece]:
        """The pieces of one packed sequence, in their order."""
        return [Piece(*numbers) for numbers in self.pieces(epoch, [number]).tolist()]

    def pieces(self, epoch: int, rows: range | list[int] | tuple[int, ...]) -> np.ndarray:
        """The pieces (P, 4) of rows, one after the other; columns as in flow.Piece."""
        packed = self._packed(epoch)
        return np.concatenate(
            [packed.pieces[packed.sequence_offsets[r] : packed.sequence_offsets[r + 1]] for r in rows]
        )

    def piece_weights(self, step: StepPlan, pieces: np.ndarray) -> np.ndarray:
        """The weight (P,) float64 of each trained token of `pieces`, which belong to `step` (C2).

        An example is a piece with trained tokens. A step without any has weights of zero.
        """
        if self.loss.weighting == "example":
            counts = self._targets(step.epoch, pieces)
            return np.where(counts > 0, 1 / (np.maximum(counts, 1) * max(step.examples, 1)), 0.0)
        return np.full(len(pieces), self.uniform_weight(step))

    def uniform_weight(self, step: StepPlan) -> float | None:
        """The one weight of all trained tokens of the step; None where the weighting tells them
        apart.
        """
        if self.loss.weighting == "example":
            return None
        if self.loss.weighting == "constant":
            assert self.loss.constant_tokens is not None  # the recipe requires it
            return 1 / (self.loss.constant_tokens * step.examples) if step.examples else 0.0
        return 1 / step.trained_tokens if step.trained_tokens else 0.0

    def fill(self, epoch: int = 0) -> float:
        """Share of the epoch's row space that holds tokens."""
        packed = self._packed(epoch)
        tokens = int((packed.pieces[:, 2] - packed.pieces[:, 1]).sum())
        return tokens / (packed.num_sequences * self.batch.seq_len)

    def epoch_steps(self, epoch: int = 0) -> int:
        """Steps that the run takes of an epoch."""
        return min(self._first_steps[epoch + 1], self.steps) - self._first_steps[epoch]

    def sequence_sizes(self, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (R,) and pieces (R,) of each row of an epoch."""
        packed = self._packed(epoch)
        tokens = np.add.reduceat(packed.pieces[:, 2] - packed.pieces[:, 1], packed.sequence_offsets[:-1])
        return tokens, np.diff(packed.sequence_offsets)

    def fullest(self, first_step: int = 0) -> list[tuple[StepPlan, tuple[int, ...]]]:
        """The micro-batch with the most tokens and the one with the most trained tokens, each as
        its step and rows; one where they are the same.

        Of the epochs from that of `first_step` on; of a source that grows, of that step's shard
        alone.
        """
        self._count_to(first_step)
        first = bisect_right(self._first_steps, first_step) - 1
        found: dict[
            str, tuple[tuple[int, int], int, int]
        ] = {}  # sizes, step, number of the micro-batch
        for epoch in range(first, first + 1 if self.epochs.streaming else len(self._num_sequences)):
            packed = self._packed(epoch)
            steps = self._first_steps[epoch + 1] - self._first_steps[epoch]
            edges = [k * self._num_sequences[epoch] // steps for k in range(self.epoch_steps(epoch) + 1)]
            of_steps = [range(*edge, self.batch.micro_batch_size) for edge in pairwise(edges)]
            starts = np.concatenate(of_steps)
            pieces = packed.pieces[: packed.sequence_offsets[edges[-1]]]
            tokens, trained = (
                np.add.reduceat(counts, packed.sequence_offsets[starts]).tolist()
                for counts in (pieces[:, 2] - pieces[:, 1], self._targets(epoch, pieces))
            )
            firsts = np.cumsum([0, *map(len, of_steps)])
            for what, sizes in (
                ("tokens", zip(tokens, trained)),
                ("trained", zip(trained, tokens)),
            ):
                size, place = max((size, -place) for place, size in enumerate(sizes))
                step = int(np.searchsorted(firsts, -place, side="right")) - 1
                largest = (size, self._first_steps[epoch] + step, -place - int(firsts[step]))
                found[what] = max(found.get(what, largest), largest, key=lambda one: one[0])
        places = dict.fromkeys((step, micro_batch) for _, step, micro_batch in found.values())
        return [
            (self.step(step), self.step(step).micro_batches[micro_batch])
            for step, micro_batch in places
        ]

    def size(self, step: StepPlan, rows: tuple[int, ...]) -> tuple[int, int]:
        """Tokens and trained tokens of a micro-batch."""
        pieces = self.pieces(step.epoch, rows)
        return int((pieces[:, 2] - pieces[:, 1]).sum()), int(
            self._targets(step.epoch, pieces).sum()
        )

    # ---------------------------------------------------------------------------------------- ranks

    def micro_batch_counts(self) -> np.ndarray:
        """Micro-batches of every step, (steps,); of a source that grows, of the steps known so far."""
        self._count_to(0)
        counts = []
        for rows, first, end in zip(
            self._num_sequences, self._first_steps, self._first_steps[1:], strict=False
        ):
            edges = np.arange(end - first + 1) * rows // (end - first)
            counts.append(-(-np.diff(edges) // self.batch.micro_batch_size))
        return np.concatenate(counts)[: self.steps]

    def filler_share(self, world: int) -> float:
        """Share of all ranks' micro-batches that are fillers, over the steps of
        `micro_batch_counts`.
        """
        return filler_share(self.micro_batch_counts(), world)

    def good_worlds(self, world: int) -> list[int]:
        """The numbers of ranks nearest to `world`, at most three, that keep (nearly) all busy."""
        return good_worlds(self.micro_batch_counts(), world)

    def check_world(self, world: int, allow_idle_ranks: bool) -> str | None:
        """A sentence of warning where many micro-batches of `world` ranks are fillers; None where
        few are.

        Raises:
            BadInput: a step has fewer micro-batches than there are ranks, and idle ranks are not
                allowed.
        """
        fewest = int(self.micro_batch_counts().min())
        better = ", ".join(map(str, self.good_worlds(world)))
        if self.epochs.streaming:
            better += " (by the first shard; the others are not known)"
        if world > fewest and not allow_idle_ranks:
            raise BadInput(
                f"{world} ranks, but a step has only {fewest} micro-batches: start {better} ranks, "
                f"raise "
                "batch.global_batch_size, lower batch.micro_batch_size, or set "
                "parallel.allow_idle_ranks: true"
            )
        share = self.filler_share(world)
        if share <= MUCH_FILLER:
            return None
        return f"{share:.0%} of the micro-batches of {world} ranks are fillers; good numbers of ranks: {better}"

    # --------------------------------------------------------------------------------------- epochs

    def _all_counted(self) -> bool:
        if self.train.steps is not None:
            return self._first_steps[-1] >= self.train.steps
        return len(self._num_sequences) == self.train.epochs

    def _count_to(self, step: int) -> None:
        """Know the rows of all epochs up to the one of `step`."""
        if self._first_steps[-1] <= step:
            with self._counting:
                while self._first_steps[-1] <= step:
                    self._count_epoch()

    def _count_epoch(self) -> None:
        epoch, first_step = len(self._num_sequences), self._first_steps[-1]
        rows = self.epochs.num_sequences(epoch, first_step, lambda: self._packed(epoch).num_sequences)
        self._num_sequences.append(rows)
        self._first_steps.append(first_step + -(-rows // self.batch.global_batch_size))

    def _packed(self, epoch: int) -> Packed:
        corpus = self.epochs.corpus(epoch)
        with self._lock:
            if epoch not in self._packings:
                packed = self._keep(epoch, lambda: self._pack(corpus, epoch))
                if packed.num_sequences != (
                    self._num_sequences[epoch] if epoch < len(self._num_sequences) else packed.num_sequences
                ):
                    raise BadInput(
                        f"shard {epoch} packs into {packed.num_sequences} rows, and was logged with "
                        f"{self._num_sequences[epoch]}: "
                        "another version packed it; go on with that one, or give another run.dir"
                    )
                while len(self._packings) >= EPOCHS_KEPT:
                    del self._packings[next(iter(self._packings))]
                self._packings[epoch] = packed
            return self._packings[epoch]

    def _pack(self, corpus: Corpus, epoch: int) -> Packed:
        documents = _documents_of(corpus, self.train.seed, epoch)
        rng = np.random.default_rng(seed_from(self.train.seed, "pack", epoch))
        packed = self._packer(corpus.lengths[documents], rng)
        occurrence = packed.pieces[:, 0].copy()
        packed.pieces[:, 0] = documents[occurrence]  # in place, as there may be millions
        if max(corpus.weights) > 1:  # a document may come more than once
            packed.pieces[:, 3] = _numbered(occurrence, packed.pieces)
        return packed

    def _targets(self, epoch: int, pieces: np.ndarray) -> np.ndarray:
        """Trained tokens (P,) that each piece predicts. The last position of a piece that ends
        inside its document predicts the next piece's first token, so a cut loses nothing and counts
        nothing twice."""
        corpus = self.epochs.corpus(epoch)
        document, start, stop = pieces[:, 0], pieces[:, 1], pieces[:, 2]
        counts = np.asarray(corpus.trained_counts[document], dtype=np.int64)
        cut = np.flatnonzero((start > 0) | (stop < corpus.lengths[document]))
        if len(cut):
            counts[cut] = corpus.count_trained(document[cut], start[cut], stop[cut])
        return counts


def filler_share(counts: np.ndarray, world: int) -> float:
    """Share of the micro-batches of all ranks that are fillers, where steps have so many real ones,
    (steps,).
    """
    return float(1 - counts.sum() / (-(-counts // world) * world).sum())


def good_worlds(counts: np.ndarray, world: int) -> list[int]:
    """The numbers of ranks nearest to `world`, at most three, that keep (nearly) all busy."""
    most = min(int(counts.min()), 2 * world)
    shares = {candidate: filler_share(counts, candidate) for candidate in range(1, most + 1)}
    good = [candidate for candidate, share in shares.items() if share <= MUCH_FILLER / 4]
    return sorted(sorted(good, key=lambda candidate: (abs(candidate - world), candidate))[:3])


def micro_batches_of(step: StepPlan, rank: int, world: int) -> list[tuple[int, ...] | None]:
    """What `rank` of `world` runs in this step: rows of each micro-batch, None for a filler.

    All ranks get the same number, at least one.
    """
    turns = max(1, -(-len(step.micro_batches) // world))
    taken = range(rank, turns * world, world)
    return [step.micro_batches[i] if i < len(step.micro_batches) else None for i in taken]


def _documents_of(corpus: Corpus, seed: int, epoch: int) -> np.ndarray:
    """The documents of an epoch, in passes: round(w n) of a source's n, a rest without replacement."""
    chosen = []
    for source, weight in enumerate(corpus.weights):
        documents = np.flatnonzero(corpus.sources == source)
        passes, rest = (
            divmod(round(weight * len(documents)), len(documents)) if len(documents) else (0, 0)
        )
        rng = np.random.default_rng(seed_from(seed, "sample", epoch, source))
        sample = np.argsort(rng.bit_generator.random_raw(len(documents)), kind="stable")[:rest]
        chosen += [documents] * passes + [documents[np.sort(sample)]]
    together = np.concatenate(chosen)
    if not len(together):
        raise BadInput("data: the sources' weights leave no row in an epoch; raise `weight`")
    return together


def _numbered(occurrence: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """Piece numbers (P,) that go on from one pass over a document to the next: no two pieces of an
    epoch share (document, piece), and so none share their noise (C3)."""
    order = np.lexsort((pieces[:, 1], occurrence, pieces[:, 0]))
    document = pieces[order, 0]
    firsts = np.flatnonzero(np.diff(document, prepend=-1))
    numbers = np.empty(len(pieces), dtype=np.int64)
    numbers[order] = np.arange(len(pieces)) - np.repeat(firsts, np.diff(firsts, append=len(pieces)))
    return numbers
