"""Rows in; tokenized documents out, in the rows' order whatever the number of processes.

How a row is tokenized comes from outside (`Tokenize`); here is what becomes of examples that are
too long, and the parallel running.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import forkserver, resource_tracker
from typing import Any, NamedTuple, TypeVar

import numpy as np
import xxhash

from trainer.datatypes import Example, Filtered, RowError, Tokenized

VERSION = 2  # part of every key: raise it when the same rows give other documents

# a worker's share: small enough for steady progress, large against the cost of handing it over
CHUNK_ROWS = 512
CUT_ANSWER = "longer than max_length: its answer would lose its end"
POOL_FROM_CHUNKS = 24  # below so many, starting processes costs more than it saves


class Row(NamedTuple):
    source: int
    file: int
    number: int  # in the file, from 1
    fields: Any


@dataclass(frozen=True)
class LengthPolicy:
    """`too_long` says what becomes of an example above `max_length`; `packing_cuts` leaves `split`
    to the packing.

    `cut_answers` lets `truncate` keep an answer without its end; `split_context` is how many tokens
    `split` repeats.
    """

    max_length: int
    too_long: str
    packing_cuts: bool
    cut_answers: bool = False
    split_context: int = 0


Result = TypeVar("Result")

Tokenize = Callable[[list[Row]], list[Example | RowError]]
"""Picklable; for each row its example, or the reason why it has none. The outcome must not depend
on the chunk.
"""


def tokenize_rows(
    rows: Iterable[Row], tokenize: Tokenize, limits: LengthPolicy, workers: int
) -> Generator[Tokenized, None, None]:
    """Chunks of the rows' documents, in order."""
    return run(rows, _Work(tokenize, limits), workers)


def run(
    rows: Iterable[Row], work: Callable[[list[Row]], Result], workers: int
) -> Generator[Result, None, None]:
    """What `work`, which must be picklable, makes of each chunk of rows, in order. With one worker,
    or little to do, it is done in this process.

    Close the iterator to end the workers early.
    """
    chunks = _chunks(iter(rows))
    first = list(islice(chunks, POOL_FROM_CHUNKS))
    if workers == 1 or len(first) < POOL_FROM_CHUNKS:
        yield from map(work, chain(first, chunks))
        return
    # A forked child of a process with threads (the heartbeat, the tokenizer's own) may hang. The
    # server has none, and what it has imported, which takes seconds, no worker imports again.
    # Meanwhile this process works.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.data.prepare"])
    _start_server()
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(work,)
    )
    chunks = chain(first, chunks)
    pending = deque()
    try:
        with ThreadPoolExecutor(1) as aside:
            started = aside.submit(
                pool.submit, _is_ready
            )  # returns when the server has imported all
            while not started.done() and (chunk := next(chunks, None)) is not None:
                yield work(chunk)
            started.result()
        for chunk in chunks:
            pending.append(pool.submit(_run_worker, chunk))
            if len(pending) > 2 * workers:  # only so many are in memory at once
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def fit(example: Example, limits: LengthPolicy) -> list[Example]:
    """The example as documents of at most `max_length`, by the policy.

    `truncate` keeps the answers that are whole before the cut, and nothing from a cut one on unless
    `cut_answers` is set. `split` makes further documents that open with `1 + split_context` tokens
    of the one before, untrained the second time: so the token after a cut is still predicted, once;
    parts with nothing to learn go.

    Raises:
        RowError: there is nothing to learn, or the policy does not allow it.
    """
    ids, trained, most = example.input_ids, example.trained, limits.max_length
    if not trained.any():
        raise RowError("no trained token")
    assert not trained[0], "nothing predicts a document's first token"
    if len(ids) <= most or (limits.too_long == "split" and limits.packing_cuts):
        return [example]
    if limits.too_long == "reject":
        raise RowError("longer than max_length")
    if limits.too_long == "truncate":
        return [_truncated(example, limits)]
    parts, repeated = [], 1 + limits.split_context
    for start in range(0, len(ids) - repeated, most - repeated):
        flags = trained[start : start + most].copy()
        flags[: repeated if start else 1] = False
        if flags.any():
            parts.append(Example(ids[start : start + most], flags))
    return parts


def _truncated(example: Example, limits: LengthPolicy) -> Example:
    """The example up to its last answer that ends within `max_length`, or is cut there where that
    is allowed.
    """
    trained, stop = example.trained, limits.max_length
    if trained[stop - 1] and trained[stop] and not limits.cut_answers:
        stop = int(np.flatnonzero(~trained[:stop])[-1]) + 1
    learned = np.flatnonzero(trained[:stop])
    if not len(learned):
        raise RowError(
            "longer than max_length: no answer fits" if limits.cut_answers else CUT_ANSWER
        )
    stop = int(learned[-1]) + 1  # what follows would be read for nothing
    return Example(example.input_ids[:stop], trained[:stop])


class _Work(NamedTuple):
    """The work on one chunk of rows; pickled to the workers."""

    tokenize: Tokenize
    limits: LengthPolicy

    def __call__(self, rows: list[Row]) -> Tokenized:
        documents: list[tuple[Row, Example]] = []
        digests: list[int] = []
        rejects: list[tuple[int, int, int, str]] = []
        filtered: list[tuple[int, int, int, str]] = []
        cuts: list[tuple[int, int]] = []
        for row, example in zip(rows, self.tokenize(rows), strict=True):
            try:
                if isinstance(example, RowError):
                    raise example
                parts = fit(example, self.limits)
                documents += [(row, part) for part in parts]
                if [len(part.input_ids) for part in parts] != [len(example.input_ids)]:
                    kept = sum(np.count_nonzero(part.trained) for part in parts)
                    cuts.append((row.source, int(np.count_nonzero(example.trained) - kept)))
                digests += [_digest(example)] * len(parts)
            except RowError as error:
                left_out = filtered if isinstance(error, Filtered) else rejects
                left_out.append((row.source, row.file, row.number, str(error)))
        parts = [part for _, part in documents]
        return Tokenized(
            lengths=np.array([len(part.input_ids) for part in parts], np.int64),
            input_ids=np.concatenate(
                [np.empty(0, np.int32), *(part.input_ids for part in parts)], dtype=np.int32
            ),
            trained=np.concatenate(
                [np.empty(0, np.bool_), *(part.trained for part in parts)], dtype=np.bool_
            ),
            trained_counts=np.array([np.count_nonzero(part.trained) for part in parts], np.int64),
            sources=np.array([row.source for row, _ in documents], np.int32),
            files=np.array([row.file for row, _ in documents], np.int32),
            rows=np.array([row.number for row, _ in documents], np.int64),
            digests=np.array(digests, np.uint64),
            rejects=tuple(rejects),
            filtered=tuple(filtered),
            cuts=tuple(cuts),
            source_rows=Counter(row.source for row in rows),
        )


def _digest(example: Example) -> int:
    digest = xxhash.xxh3_64(example.input_ids.tobytes())
    digest.update(example.trained.tobytes())
    return digest.intdigest()


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield chunk


def _start_server() -> None:
    """The server and its workers hold SIGUSR1 and SIGTERM back: Slurm sends them to every process
    of a job's step, and they would end those that only help. These end with this process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1,))
    try:
        # the server's start would do it, and it lets SIGTERM through again
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker_work: Callable[[list[Row]], Any] | None = None


def _start_worker(work: Callable[[list[Row]], Any]) -> None:
    """Keep the work, which is large, once a process; leave Ctrl-C to the parent, and die with it if
    it is killed.
    """
    global _worker_work
    _worker_work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _is_ready() -> None:
    """A first task, which makes the first worker start."""


def _run_worker(rows: list[Row]) -> Any:
    assert _worker_work is not None
    return _worker_work(rows)
