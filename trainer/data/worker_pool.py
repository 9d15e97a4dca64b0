"""Run worker processes that work on chunks of rows.

Chunks enter; their results leave as futures. The end of a worker names the rows that it had, and so
does a worker that is frozen.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from packhorse.trainer.datatypes import BadInput, Row
from packhorse.trainer.utils import numa
from packhorse.trainer.utils.child_process import Child, start_child
from packhorse.trainer.utils.time_limit import limit_memory

FROZEN_S = 600.0  # without any processor time; a user's function may wait for a server meanwhile

Result = TypeVar("Result")


class Pool:
    """Worker processes, each with a thread of this process that feeds it and waits for it.

    concurrent.futures' own pool cannot be used: when a worker dies, it ends the others by SIGTERM,
    to which they are deaf, and waits for them for ever. Nor does it know which chunk was at fault.
    """

    def __init__(
        self, work: Callable[[list[Row]], Any], workers: int, files: Sequence[str]
    ) -> None:
        self._work, self._files = work, files
        self._threads = ThreadPoolExecutor(workers)
        self._of_thread = threading.local()
        self._lock = threading.Lock()  # over the two below: no worker starts once they are killed
        self._workers: list[Child] = []
        self._closed = False
        self._rows: dict[int, list[Row]] = {}  # what a worker has, by its process id
        self._quiet: dict[int, tuple[tuple[Any, ...], int]] = {}  # its state, and looks since then

    def start_worker(self) -> Future[Child]:
        return self._threads.submit(self._worker)

    def submit(self, rows: list[Row]) -> Future[Any]:
        return self._threads.submit(self._run, rows)

    def result(self, future: Future[Result]) -> Result:
        """Return a chunk's result, and look at the workers meanwhile.

        Raises:
            BadInput: one of them is frozen.
        """
        looks = 20
        while not wait([future], FROZEN_S / looks).done:
            # Looks are counted, not seconds: if all processes were stopped and went on, as Slurm
            # does with a job that it suspends, that is one look.
            for pid, rows in list(self._rows.items()):
                state, quiet = (_processor_s(pid), rows[0].file, rows[0].number), 0
                if pid in self._quiet and self._quiet[pid][0] == state:
                    quiet = self._quiet[pid][1] + 1
                self._quiet[pid] = state, quiet
                if quiet >= looks:
                    raise BadInput(
                        f"a worker process has done nothing for {FROZEN_S:g} s {self._at(rows)}: "
                        f"it was stopped by a signal, or waits in a function of yours or for files"
                    )
        return future.result()

    def close(self) -> None:
        """Kill the workers, whatever they do: what they make is not wanted any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.end()
        self._threads.shutdown()  # each thread sees its worker's end

    def _worker(self) -> Child:
        if not hasattr(self._of_thread, "worker"):
            with self._lock:
                if self._closed:
                    raise RuntimeError("the pool is closed")
                self._of_thread.worker = start_child(
                    _start_server(), _serve, self._work, numa.GIVEN
                )
                self._workers.append(self._of_thread.worker)
        return self._of_thread.worker

    def _run(self, rows: list[Row]) -> Any:
        worker = self._worker()
        self._rows[worker.pid] = rows
        try:
            worker.pipe.send(rows)
            result, error, trace = worker.pipe.recv()
        except (EOFError, OSError):
            raise self._death(worker.end() or 0, rows) from None
        finally:
            del self._rows[worker.pid]
        if error:
            raise error from RuntimeError(f"in a worker process:\n{trace}")
        return result

    def _at(self, rows: list[Row]) -> str:
        ends = [
            f"{self._files[row.file] if self._files else f'file {row.file}'}:{row.number}"
            for row in (rows[0], rows[-1])
        ]
        return f"at the rows from {ends[0]} to {ends[1]}"

    def _death(self, exit_code: int, rows: list[Row]) -> Exception:
        at = self._at(rows)
        if exit_code >= 0:
            return RuntimeError(
                f"a worker process ended with exit code {exit_code} {at}; "
                f"its own message stands above"
            )
        return BadInput(
            f"a worker process was killed by signal {-exit_code} {at}; signal 9 mostly means that "
            f"memory ran out: set data.workers lower, or shorten the largest of these rows"
        )


def _processor_s(pid: int) -> float:
    """Return the processor time that a process has taken; 0 if it is gone."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        return sum(psutil.Process(pid).cpu_times()[:2])
    return 0.0


def _start_server() -> Any:
    """Start the server that workers are forked from, unless it runs; return its context.

    A forked child of this process, which has threads (the heartbeat, the tokenizer's), may hang.
    The server has none, and what it has imported no worker imports again.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["packhorse.trainer.data.prepare"])
    # Slurm sends SIGUSR1 and SIGTERM to every process of a job's step. The server, which ends with
    # this process, inherits that they are blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1,))
    try:
        # The server's start would do it, too, but then unblocks SIGTERM.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _serve(pipe: Connection, work: Callable[[list[Row]], Any], cores: frozenset[int]) -> None:
    """Work on chunks in a worker process, until the parent is gone.

    Args:
        cores: to run on, as the parent may be bound to a few.
    """
    with suppress(OSError):  # a container may forbid it
        os.sched_setaffinity(0, cores)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    gc.freeze()  # as `tokenize.run` does
    limit_memory()  # a template may ask for more than there is; then its row is rejected
    while True:
        try:
            rows = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            reply = work(rows), None, ""
        except Exception as error:
            reply = None, error, traceback.format_exc()
        pipe.send(reply)
