"""Plan every optimizer step from the lengths of documents and a seed.

Lengths enter. Each step's packed sequences, micro-batches and token weights leave. Nothing here
reads a token, and only the last cut depends on the ranks (C1). Training and held-out evaluation use
the same Plan. If the source is streaming, an epoch is one of its shards (data/streaming.py).
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from packhorse.trainer.config.recipe import BatchSection, LossSection, TrainSection
from packhorse.trainer.config.sections import MAX_EPOCHS
from packhorse.trainer.data.pack import CountTrained, shuffled
from packhorse.trainer.data.ranks import MUCH_FILLER, count_groups, filler_share, good_worlds
from packhorse.trainer.datatypes import BadInput, Packed, StepPlan
from packhorse.trainer.dist import seed_from

EPOCHS_KEPT = 2  # packings in memory: this epoch's and, around its end, the next one's

Packer = Callable[[np.ndarray, np.random.Generator, CountTrained], Packed]
"""packer(lengths, rng, count_trained): packs an epoch's documents, see data/pack.py."""

Keep = Callable[[int, Callable[[], Packed]], Packed]
"""keep(epoch, make): returns the epoch's kept packing, made now if there is none."""


class Epochs(Protocol):
    """The documents of each epoch: a Corpus, or the shards of a streaming source."""

    streaming: bool = False  # whether an epoch is known only once the one before has been used

    def corpus(self, epoch: int) -> Corpus:
        """Return the documents of an epoch."""
        ...

    def num_sequences(self, epoch: int, first_step: int, count: Callable[[], int]) -> int:
        """Return how many sequences the epoch, which begins with `first_step` (from 0), packs into.

        `count` packs the epoch to find out, unless the number is known already.
        """
        return count()


@dataclass(frozen=True)
class Corpus(Epochs):
    """What a plan knows of the n documents. A Corpus is also the Epochs that are all made of it.

    `lengths`, `trained_counts` (tokens, trained tokens) and `sources` (number of the source) are
    (n,) integers. Source s gives round(weights[s] x its documents) to an epoch.
    `count_trained` is called only for documents that packing has cut.
    """

    lengths: np.ndarray
    trained_counts: np.ndarray
    sources: np.ndarray
    weights: tuple[float, ...]
    count_trained: CountTrained

    def corpus(self, epoch: int) -> Corpus:
        return self


class Packings:
    """The packed sequences of each epoch, packed from (seed, epoch) when they are needed."""

    def __init__(self, epochs: Epochs, packer: Packer, seed: int, keep: Keep) -> None:
        self._epochs, self._packer, self._seed, self._keep = epochs, packer, seed, keep
        self._in_memory: dict[int, Packed] = {}
        self._lock = threading.Lock()  # the loader's thread and the loop both ask

    def packed(self, epoch: int) -> Packed:
        # Before the lock is taken: of a streaming source, this may prepare a shard.
        corpus = self._epochs.corpus(epoch)
        with self._lock:
            if epoch not in self._in_memory:
                packed = self._keep(epoch, lambda: self._pack(corpus, epoch))
                while len(self._in_memory) >= EPOCHS_KEPT:
                    del self._in_memory[next(iter(self._in_memory))]
                self._in_memory[epoch] = packed
            return self._in_memory[epoch]

    def targets(self, epoch: int, pieces: np.ndarray) -> np.ndarray:
        """Count the trained tokens (P,) that each piece predicts.

        The last position of a piece that ends inside its document predicts the first token of the
        next piece. So a cut loses no token and counts none twice.
        """
        corpus = self._epochs.corpus(epoch)
        document, start, stop = pieces[:, 0], pieces[:, 1], pieces[:, 2]
        counts = np.asarray(corpus.trained_counts[document], dtype=np.int64)
        cut = np.flatnonzero((start > 0) | (stop < corpus.lengths[document]))
        if len(cut):
            counts[cut] = corpus.count_trained(document[cut], start[cut], stop[cut])
        return counts

    def _pack(self, corpus: Corpus, epoch: int) -> Packed:
        documents = _documents_of_epoch(corpus, self._seed, epoch)
        # With what packing drops, this makes a step without a trained token impossible.
        assert corpus.trained_counts[documents].all(), "a document without a trained token"
        rng = np.random.default_rng(seed_from(self._seed, "pack", epoch))
        packed = self._packer(
            corpus.lengths[documents],
            rng,
            lambda numbers, *ends: corpus.count_trained(documents[numbers], *ends),
        )
        occurrence = packed.pieces[:, 0].copy()
        packed.pieces[:, 0] = documents[occurrence]  # in place, as there may be millions
        if max(corpus.weights) > 1:  # a document may occur more than once
            packed.pieces[:, 3] = _number_pieces(occurrence, packed.pieces)
        return packed


class Plan:
    """The list of optimizer steps, as a function of (epochs, packer, batch, train, loss).

    All epochs are packed once at the start to count their sequences, so `steps` is exact before the
    first step. Those of a streaming source are packed when a step needs them.
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
        self._packings = Packings(epochs, packer, train.seed, keep)
        # A lock of its own: the loop can read packings while a shard is being prepared.
        self._counting = threading.Lock()
        self._num_sequences: list[int] = []  # of each epoch
        self._first_steps = [0]  # of each epoch, and the number of steps of all epochs
        while not epochs.streaming and (
            self._first_steps[-1] < train.steps
            if train.steps
            else len(self._num_sequences) < train.epochs
        ):
            self._count_epoch()
            self._require_few_epochs()
        self.steps = train.steps or self._first_steps[-1]

    # ---------------------------------------------------------------------------------------- steps

    def step(self, step: int) -> StepPlan:
        """Return step `step`, counted from 0. An epoch's sequences spread evenly over its steps.

        Raises:
            IndexError: the plan has no such step.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a plan of {self.steps} steps")
        epoch = self._epoch_of(step)
        place = step - self._first_steps[epoch]
        first, end = self._edges(epoch, np.arange(place, place + 2)).tolist()
        size = self.batch.micro
        cuts = range(first, end, size)
        micro_batches = tuple(tuple(range(cut, min(cut + size, end))) for cut in cuts)
        counts = self._packings.targets(epoch, self.pieces(epoch, range(first, end)))
        return StepPlan(step, epoch, micro_batches, int(counts.sum()), len(counts))

    def pieces(self, epoch: int, sequences: Iterable[int]) -> np.ndarray:
        """Return the pieces (P, 4) of sequences, one after the other; Piece has the columns."""
        packed = self._packed(epoch)
        offsets = packed.sequence_offsets
        return np.concatenate([packed.pieces[offsets[s] : offsets[s + 1]] for s in sequences])

    def piece_weights(self, step: StepPlan, pieces: np.ndarray) -> np.ndarray:
        """Return the weight (P,) float64 of each trained token of `pieces`, which `step` runs (C2).

        An example is a piece; packing leaves none without a trained token.
        """
        if self.loss.weighting == "example":
            counts = self._packings.targets(step.epoch, pieces)
            return 1 / (counts * step.examples)
        constant = self.loss.weighting
        share = constant * step.examples if isinstance(constant, int) else step.trained_tokens
        return np.full(len(pieces), 1 / share)

    # ---------------------------------------------------------------------------------------- sizes

    def sequence_sizes(self, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens (S,) and the pieces (S,) of each sequence of an epoch."""
        packed = self._packed(epoch)
        lengths = packed.pieces[:, 2] - packed.pieces[:, 1]
        tokens = np.add.reduceat(lengths, packed.sequence_offsets[:-1])
        return tokens, np.diff(packed.sequence_offsets)

    def fill(self, epoch: int = 0) -> float:
        """Return the share of the epoch's sequence lengths that holds tokens."""
        tokens, _ = self.sequence_sizes(epoch)
        return int(tokens.sum()) / (len(tokens) * self.batch.seq_len)

    def epoch_steps(self, epoch: int = 0) -> int:
        """Return the number of steps that the run takes from an epoch."""
        return min(self._first_steps[epoch + 1], self.steps) - self._first_steps[epoch]

    def size(self, step: StepPlan, sequences: tuple[int, ...]) -> tuple[int, int]:
        """Return the tokens and the trained tokens of a micro-batch."""
        pieces = self.pieces(step.epoch, sequences)
        targets = self._packings.targets(step.epoch, pieces)
        return int((pieces[:, 2] - pieces[:, 1]).sum()), int(targets.sum())

    def fullest(self, first_step: int = 0) -> list[tuple[StepPlan, tuple[int, ...]]]:
        """Find the micro-batch with the most tokens and the one with the most trained tokens.

        They are searched for from the epoch of `first_step` on; of a streaming source, in the shard
        of that step alone. Returns the step and the sequences of each; one entry if they are the
        same.
        """
        first = self._epoch_of(first_step)
        end = first + 1 if self.epochs.streaming else len(self._num_sequences)
        sizes = map(self._micro_batch_sizes, range(first, end))
        tokens, trained, steps, numbers = map(np.concatenate, zip(*sizes, strict=True))
        # The earliest of the largest, as the sort is stable; the other size decides between equals.
        orders = ((-trained, -tokens), (-tokens, -trained))
        places = dict.fromkeys(int(np.lexsort(order)[0]) for order in orders)
        plans = [(self.step(int(steps[place])), numbers[place]) for place in places]
        return [(step, step.micro_batches[number]) for step, number in plans]

    def micro_batch_counts(self) -> np.ndarray:
        """Return the number of micro-batches (steps,) of every step.

        Of a streaming source, the steps known so far are counted.
        """
        self._epoch_of(0)
        edges = map(self._epoch_edges, range(len(self._first_steps) - 1))
        sizes = np.concatenate([np.diff(of_epoch) for of_epoch in edges])
        return -(-sizes // self.batch.micro)

    def check_world(self, world: int, allow_idle_ranks: bool, sequence: int = 1) -> str | None:
        """Return a warning if many micro-batches of `world` ranks are fillers, or else None.

        Args:
            sequence: ranks that share each micro-batch.

        Raises:
            BadInput: a step has fewer micro-batches than there are ranks, or groups of ranks, and
                idle ranks are not allowed.
        """
        ranks = f"{world} ranks"
        if sequence > 1:
            world = count_groups(world, sequence)
            ranks = f"{world} groups of {sequence} ranks"
        counts = self.micro_batch_counts()
        fewest = int(counts.min())
        better = ", ".join(str(good * sequence) for good in good_worlds(counts, world))
        if self.epochs.streaming:
            better += " (by the first shard; the others are not known)"
        if world > fewest and not allow_idle_ranks:
            raise BadInput(
                f"{ranks}, but a step has only {fewest} micro-batches: start {better} ranks, "
                "raise batch.global_batch_size, lower batch.micro_batch_size, or set "
                "parallel.allow_idle_ranks: true"
            )
        share = filler_share(counts, world)
        if share <= MUCH_FILLER:
            return None
        return (
            f"{share:.0%} of the micro-batches of {ranks} are fillers; "
            f"good numbers of ranks: {better}"
        )

    # --------------------------------------------------------------------------------------- epochs

    def _epoch_of(self, step: int) -> int:
        """Return the epoch of a step, counting the sequences of all epochs up to it."""
        if self._first_steps[-1] <= step:
            with self._counting:
                while self._first_steps[-1] <= step:
                    self._count_epoch()
        return bisect_right(self._first_steps, step) - 1

    def _count_epoch(self) -> None:
        epoch, first_step = len(self._num_sequences), self._first_steps[-1]
        count = self.epochs.num_sequences(
            epoch, first_step, lambda: self._packed(epoch).num_sequences
        )
        # In this order: to another thread an epoch is counted once its last step is known.
        self._num_sequences.append(count)
        self._first_steps.append(first_step + -(-count // self.batch.global_batch_size))

    def _require_few_epochs(self) -> None:
        """Refuse so many steps that counting the sequences of their epochs would not end."""
        steps, per_epoch = self.train.steps or 0, self._first_steps[1]
        if steps > MAX_EPOCHS * per_epoch > 0:
            raise BadInput(
                f"train.steps: {steps:,} steps are {steps // per_epoch:,} epochs of this data; "
                f"give at most {MAX_EPOCHS * per_epoch:,}"
            )

    def _packed(self, epoch: int) -> Packed:
        packed = self._packings.packed(epoch)
        counted = self._num_sequences[epoch : epoch + 1]
        if counted and counted != [packed.num_sequences]:
            raise BadInput(
                f"shard {epoch} packs into {packed.num_sequences} sequences, but {counted[0]} are "
                "logged: another version of packhorse packed it; resume with that version, or "
                "give another run.dir"
            )
        return packed

    def _edges(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Return the first sequence of each of the epoch's steps `places`."""
        steps = self._first_steps[epoch + 1] - self._first_steps[epoch]
        return places * self._num_sequences[epoch] // steps

    def _epoch_edges(self, epoch: int) -> np.ndarray:
        """Return the first sequence of each step that the run takes of an epoch, and the end."""
        return self._edges(epoch, np.arange(self.epoch_steps(epoch) + 1))

    def _micro_batch_sizes(self, epoch: int) -> tuple[np.ndarray, ...]:
        """Return tokens, trained tokens, step and number in the step of each micro-batch (M,)."""
        packed, edges = self._packed(epoch), self._epoch_edges(epoch)
        counts = -(-np.diff(edges) // self.batch.micro)
        step = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(step)) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = packed.sequence_offsets[edges[step] + number * self.batch.micro]
        pieces = packed.pieces[: packed.sequence_offsets[edges[-1]]]
        tokens = np.add.reduceat(pieces[:, 2] - pieces[:, 1], starts)
        trained = np.add.reduceat(self._packings.targets(epoch, pieces), starts)
        return tokens, trained, self._first_steps[epoch] + step, number


# ----------------------------------------------------------------------------- an epoch's documents


def _documents_of_epoch(corpus: Corpus, seed: int, epoch: int) -> np.ndarray:
    """Return the numbers of an epoch's documents: round(weight x n) of each source's n.

    They are whole passes over the source, and for the rest a sample without replacement.
    """
    chosen = []
    for source, weight in enumerate(corpus.weights):
        documents = np.flatnonzero(corpus.sources == source)
        wanted = round(weight * len(documents))
        passes, rest = divmod(wanted, len(documents)) if len(documents) else (0, 0)
        rng = np.random.default_rng(seed_from(seed, "sample", epoch, source))
        sample = shuffled(len(documents), rng)[:rest]
        chosen += [documents] * passes + [documents[np.sort(sample)]]
    together = np.concatenate(chosen)
    if not len(together):
        raise BadInput("data: the sources' weights leave no row in an epoch; raise `weight`")
    return together


def _number_pieces(occurrence: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """Number the pieces (P,) of each document on from one pass over it to the next.

    So no two pieces of an epoch share (document, piece), which seeds their noise (C3).
    """
    order = np.lexsort((pieces[:, 1], occurrence, pieces[:, 0]))
    document = pieces[order, 0]
    firsts = np.flatnonzero(np.diff(document, prepend=-1))
    numbers = np.empty(len(pieces), dtype=np.int64)
    numbers[order] = np.arange(len(pieces)) - np.repeat(firsts, np.diff(firsts, append=len(pieces)))
    return numbers
