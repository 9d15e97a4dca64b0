"""Turn rows into tokenized documents by several processes, in the rows' order.

Rows and a function that tokenizes a chunk of them (`Tokenize`) enter; chunks of documents leave,
the same whatever the number of processes. This file decides what becomes of examples that are too
long (`fit`), and whether worker processes do it.
"""

from __future__ import annotations

import gc
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple, TypeVar

import numpy as np

from packhorse.trainer.data.digest import tokens_digest
from packhorse.trainer.data.worker_pool import Pool
from packhorse.trainer.datatypes import (
    Example,
    Filtered,
    LeftOut,
    Row,
    RowError,
    Tokenized,
    TooLong,
)

VERSION = 3  # part of every key: raise it when the same rows give other documents

# What a worker is given at once: small enough for steady progress, large against the cost of
# handing it over.
CHUNK_ROWS = 512
POOL_FROM_CHUNKS = 24  # with fewer chunks, starting processes costs more than it saves
SLOW_CHUNK_ROWS, SLOW_FROM_CHUNKS = 64, 2  # the same, where a row takes milliseconds


@dataclass(frozen=True)
class LengthPolicy:
    """What becomes of an example above `max_length` tokens.

    Attributes:
        too_long: as data.too_long says: `reject`, `truncate`, `truncate_anywhere` or `split` it.
        packing_cuts: the packing splits it, so `split` leaves it whole here.
        split_context: tokens that `split` repeats, beside the one that it always does.
    """

    max_length: int
    too_long: str
    packing_cuts: bool
    split_context: int = 0


Result = TypeVar("Result")

RowResult = tuple[Example, ...] | RowError
"""A row's examples (one, or one of each trained answer), or the reason why it has none."""

Tokenize = Callable[[list[Row]], list[RowResult]]
"""Returns the result of each row. It must be picklable, and the outcome must not depend on how rows
are cut into chunks."""


def tokenize_rows(
    rows: Iterable[Row],
    tokenize: Tokenize,
    limits: LengthPolicy,
    workers: int,
    files: Sequence[str] = (),
    *,
    slow: bool = False,
) -> Generator[Tokenized, None, None]:
    """Yield the documents of each chunk of rows, in the rows' order; see `run`."""
    return run(rows, _Work(tokenize, limits), workers, files, slow=slow)


def run(
    rows: Iterable[Row],
    work: Callable[[list[Row]], Result],
    workers: int,
    files: Sequence[str] = (),
    *,
    slow: bool = False,
) -> Generator[Result, None, None]:
    """Yield `work(chunk)` of each chunk of rows, in the rows' order.

    With one worker, or few rows, this process does the work. Close the iterator to end the workers
    early.

    Args:
        work: must be picklable.
        files: name the rows' files in errors, by `Row.file`.
        slow: a row takes milliseconds, so that workers are worth starting for some hundred rows.

    Raises:
        BadInput: a worker was killed by a signal, as the kernel does when memory runs out, or has
            rows and took no processor time for FROZEN_S.
    """
    chunk_rows = SLOW_CHUNK_ROWS if slow else CHUNK_ROWS
    pool_from = SLOW_FROM_CHUNKS if slow else POOL_FROM_CHUNKS
    left = iter(rows)
    chunks = iter(lambda: list(islice(left, chunk_rows)), [])
    with ExitStack() as at_end:
        # What was imported is no garbage. Python's collector, which rows wake up again and again,
        # would look through all of it: a twentieth of the time.
        gc.freeze()
        at_end.callback(gc.unfreeze)
        first = list(islice(chunks, pool_from))
        chunks = chain(first, chunks)
        if workers == 1 or len(first) < pool_from:
            yield from map(work, chunks)
            return
        pending: deque[Future[Result]] = deque()
        pool = at_end.enter_context(closing(Pool(work, workers, files)))
        started = pool.start_worker()  # takes seconds of imports; meanwhile this process works
        while not started.done() and (chunk := next(chunks, None)) is not None:
            yield work(chunk)
        started.result()
        for chunk in chunks:
            pending.append(pool.submit(chunk))
            if len(pending) > 2 * workers:  # only so many are in memory at once
                yield pool.result(pending.popleft())
        while pending:
            yield pool.result(pending.popleft())


def fit(example: Example, limits: LengthPolicy) -> list[Example]:
    """Return the example as documents of at most `max_length` tokens, by the policy.

    `truncate` keeps the answers that end before the cut; one that is cut goes, with all after it.
    `truncate_anywhere` keeps its beginning. `split` makes further documents that open with
    `1 + split_context` tokens of the one before, untrained the second time: so the token after a
    cut is still predicted, once. Parts without a trained token are dropped.

    Raises:
        RowError: no token is trained, or the policy rejects the example.
    """
    ids, trained, max_length = example.input_ids, example.trained, limits.max_length
    if not trained.any():
        raise RowError("no trained token")
    assert not trained[0], "nothing predicts a document's first token"
    if len(ids) <= max_length or (limits.too_long == "split" and limits.packing_cuts):
        return [example]
    if limits.too_long == "reject":
        raise TooLong("longer than max_length", len(ids))
    if limits.too_long != "split":
        return [_truncate(example, max_length, anywhere=limits.too_long == "truncate_anywhere")]
    parts, repeated = [], 1 + limits.split_context
    for start in range(0, len(ids) - repeated, max_length - repeated):
        # The last repeated token is the one that predicts the first new one; it was trained before.
        flags = trained[start : start + max_length].copy()
        flags[: repeated if start else 1] = False
        if flags.any():
            parts.append(Example(ids[start : start + max_length], flags))
    return parts


def _truncate(example: Example, stop: int, *, anywhere: bool) -> Example:
    """Return the example up to its last answer that ends before token `stop`; if it may be cut
    `anywhere`, the last answer need not end there."""
    trained = example.trained
    # The cut falls into an answer: go back to before it, as its end would never be learned.
    if trained[stop - 1] and trained[stop] and not anywhere:
        stop = int(np.flatnonzero(~trained[:stop])[-1]) + 1
    learned = np.flatnonzero(trained[:stop])
    if not len(learned):
        why = "no answer fits" if anywhere else "its answer would lose its end"
        raise TooLong(f"longer than max_length: {why}", len(example.input_ids))
    stop = int(learned[-1]) + 1  # tokens after the last trained one would be computed for nothing
    return Example(example.input_ids[:stop], trained[:stop])


def _fit_row(examples: Sequence[Example], limits: LengthPolicy) -> list[Example]:
    """Return the documents of a row; of several examples, without those that cannot be cut to fit.

    Raises:
        RowError: the policy rejects one of them, or leaves none.
    """
    parts: list[Example] = []
    fault = RowError("no trained token")
    for example in examples:
        try:
            parts += fit(example, limits)
        except RowError as error:
            if limits.too_long == "reject":
                raise
            fault = error
    if not parts:
        raise fault
    return parts


class _Work(NamedTuple):
    """Tokenizes a chunk of rows and cuts its examples to length; pickled to the workers."""

    tokenize: Tokenize
    limits: LengthPolicy

    def __call__(self, rows: list[Row]) -> Tokenized:
        documents: list[tuple[Row, Example]] = []
        digests: list[int] = []
        row_digests: list[int] = []
        rejects: list[LeftOut] = []
        filtered: list[LeftOut] = []
        counts: Counter[tuple[int, str]] = Counter((row.source, "rows") for row in rows)
        unread: Counter[tuple[int, str]] = Counter()
        for row, examples in zip(rows, self.tokenize(rows), strict=True):
            try:
                if isinstance(examples, RowError):
                    raise examples
                parts = _fit_row(examples, self.limits)
            except RowError as error:
                left_out = filtered if isinstance(error, Filtered) else rejects
                tokens = error.tokens if isinstance(error, TooLong) else 0
                left_out.append(LeftOut(row.source, row.file, row.number, str(error), tokens))
                continue
            documents += [(row, part) for part in parts]
            of_row = tokens_digest(examples)
            row_digests += [of_row] * len(parts)
            is_whole = len(examples) == 1 and parts[0] is examples[0]
            digests += [of_row] if is_whole else [tokens_digest([part]) for part in parts]
            unread.update((row.source, name) for name in examples[0].unread)
            for name, count in _count_costs(examples, parts).items():
                counts[row.source, name] += count
        parts = [part for _, part in documents]
        # the empty arrays, as a chunk may leave no document, and concatenate needs one
        ids = [np.empty(0, np.int32), *(part.input_ids for part in parts)]
        trained = [np.empty(0, np.bool_), *(part.trained for part in parts)]
        return Tokenized(
            lengths=np.array([len(part.input_ids) for part in parts], np.int64),
            input_ids=np.concatenate(ids, dtype=np.int32),
            trained=np.concatenate(trained, dtype=np.bool_),
            trained_counts=np.array([np.count_nonzero(part.trained) for part in parts], np.int64),
            sources=np.array([row.source for row, _ in documents], np.int32),
            files=np.array([row.file for row, _ in documents], np.int32),
            rows=np.array([row.number for row, _ in documents], np.int64),
            digests=np.array(digests, np.uint64),
            row_digests=np.array(row_digests, np.uint64),
            rejects=tuple(rejects),
            filtered=tuple(filtered),
            counts=counts,
            unread=unread,
        )


def _count_costs(examples: Sequence[Example], parts: Sequence[Example]) -> dict[str, int]:
    """Count, by names in the report, what a row lost by its cuts and repeats by its documents."""
    counts: dict[str, int] = {}
    lengths = [len(part.input_ids) for part in parts]
    if lengths != [len(example.input_ids) for example in examples]:
        before, after = (
            sum(np.count_nonzero(one.trained) for one in some) for some in (examples, parts)
        )
        counts |= {"cut": 1, "lost_trained_tokens": int(before - after)}
    if len(examples) > 1:
        counts |= {"apart": 1, "repeated_tokens": sum(lengths) - max(lengths)}
    return counts
