"""Stop all ranks at the same step when a signal reaches any of them (C9).

In: SIGTERM, SIGUSR1, or a deadline. Out: one answer, alike on all ranks, without a GPU waiting.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from typing import Any

from packhorse.trainer import dist
from packhorse.trainer.datatypes import FAILED, SAVED_RUN_AGAIN

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """One flag for all ranks, raised by a signal to any of them or by a deadline.

    Before there is a process group, ranks agree through the launcher's store: during preparation
    each asks `raised_early`, and `wait_for_ranks` lets all of them into the group or none. From
    then on `start` launches a max-reduction of one number on a gloo group of its own, and `agreed`
    reads it later, so that no GPU waits for it.
    """

    def __init__(self) -> None:
        self.raised = False
        self._group: Any = None
        self._pending: Any = None
        self._raised_at = 0.0
        self._have_met = False
        for signum in _STOP_SIGNALS:
            signal.signal(signum, self._raise)
        # The launcher starts workers with these blocked, so that no signal is lost before there is
        # a handler. One that has come arrives here.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        self._store = _launchers_store()
        self._ended = threading.Event()
        if self._store is not None:
            # a store serves one thread at a time: the beats get a connection of their own
            given = (_launchers_store(), dist.rank(), self._ended)
            threading.Thread(target=_beat, args=given, name="meeting", daemon=True).start()

    def _raise(self, number: int | None = None, _frame: Any = None) -> None:
        again_s = time.monotonic() - self._raised_at
        if self.raised and number == signal.SIGTERM and not self._have_met and again_s > _AGAIN_S:
            # What prepares the data did not end at the first one. Nothing is trained yet.
            os._exit(SAVED_RUN_AGAIN)
        if not self.raised:
            self._raised_at = time.monotonic()
        self.raised = True

    def raise_at(self, time_s: float) -> None:
        """Raise the flag at `time_s`, in seconds since 1970, as a signal would."""
        wait_s = min(max(0.0, time_s - time.time()), threading.TIMEOUT_MAX)
        timer = threading.Timer(wait_s, self._raise)
        timer.daemon = True
        timer.start()

    def raised_early(self) -> bool:
        """Return whether any rank has raised the flag so far, before there is a process group."""
        if self._store is None:
            return self.raised
        if self.raised:
            self._store.compare_set(_START, "", _NEVER)
        return self._store.check([_START]) and self._store.get(_START) == _NEVER

    def wait_for_ranks(self) -> bool:
        """Return True when every rank is ready for the process group, or False, on all ranks alike,
        if one of them raised the flag first.

        Waiting inside init_process_group could not be interrupted by a signal.
        """
        try:
            if self._store is None:
                return not self.raised
            # `_START` is written once, with compare_set, so that all ranks read one decision
            if self._store.add("packhorse/ready", 1) == dist.world_size():
                self._store.compare_set(_START, "", _NOW)
            while not self._store.check([_START]):
                if self.raised:
                    self._store.compare_set(_START, "", _NEVER)
                time.sleep(_WAIT_POLL_S)
            return self._store.get(_START) == _NOW
        finally:
            self._have_met = True
            self._ended.set()

    def attach_group(self) -> None:
        """Make the group on which ranks agree. Every rank calls it, inside the process group."""
        self._group = dist.new_group()

    def start(self) -> None:
        """Start the ranks' vote on stopping; `agreed` returns it. Every rank calls it."""
        import torch
        import torch.distributed as td

        flag = torch.tensor([int(self.raised)], dtype=torch.int32)
        work: Any = None
        if self._group:
            work = td.all_reduce(flag, op=td.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (flag, work)

    def agreed(self) -> bool:
        """Return whether any rank had the flag up at `start`: the same answer on all ranks."""
        flag, work = self._pending
        if work is not None:
            work.wait()
        return bool(flag.item())

    def poll(self) -> bool:
        """Vote and return the answer, where waiting does no harm. Every rank calls it."""
        self.start()
        return self.agreed()


def _beat(store: Any, rank: int, ended: threading.Event) -> None:
    """Beat, and end this rank if the rank before it stands still before there is a process group.

    Preparation takes as long as it takes, and no step's beats are due yet. So a thread of each rank
    beats: it is silent if the process is stopped, or its machine is gone.
    """
    before = (rank - 1) % dist.world_size()
    own, watched = (f"packhorse/prepares/{number}" for number in (rank, before))
    count, seen, seen_at = 0, None, time.monotonic()
    while not ended.wait(BEAT_S):
        count += 1
        try:
            store.set(own, str(count))
            beat = store.get(watched) if store.check([watched]) else None
        except RuntimeError:  # the launcher is gone, and ends this rank
            return
        if beat != seen:
            seen, seen_at = beat, time.monotonic()
        elif time.monotonic() - seen_at > SILENT_S:
            dist.log.error(
                "rank %d has given no sign of life for %.0f s before the first step: it is "
                "stopped, or its machine is gone",
                *(before, SILENT_S),
            )
            os._exit(FAILED)


BEAT_S, SILENT_S = 2.0, 300.0
_AGAIN_S = 2.0  # Slurm and the launcher may send one signal twice; a later one is a second one
_STORE_S = 60  # to connect to the store, which is there before this process starts
_START, _NOW, _NEVER = "packhorse/start", b"now", b"never"
_WAIT_POLL_S = 0.1


def _launchers_store() -> Any:
    """Connect to the store that torchrun's agent hosts for its workers.

    None for a single rank, or if another launcher started this one.
    """
    if dist.world_size() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore

    limit = timedelta(seconds=_STORE_S)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, timeout=limit)
