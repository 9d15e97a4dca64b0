"""Handle processes: what a command does that starts workers, and what a worker does.

Nothing heavy is imported here.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any, NoReturn

from packhorse.trainer.datatypes import DONE, LAUNCHER, SAVED_RUN_AGAIN


def is_worker() -> bool:
    """Return whether a launcher, ours or torchrun, started this process."""
    return {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"} <= os.environ.keys()


def exit_on_early_signals() -> None:
    """Let SIGTERM and SIGUSR1 end this process with 75 until the launcher handles them.

    A launcher imports torch for some seconds before it can pass signals on. There is nothing to
    lose yet.
    """

    def stop(number: int, _frame: Any) -> NoReturn:
        name = signal.Signals(number).name
        print(f"packhorse: {name}: stopped before the workers had started", file=sys.stderr)
        sys.exit(SAVED_RUN_AGAIN)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)


def exit_with_launcher() -> None:
    """Let an orphaned worker save and free its GPU."""
    exit_with(int(os.environ.get(LAUNCHER, os.getppid())))  # torchrun does not name itself


def exit_with(parent: int) -> None:
    """Ask the kernel for a SIGTERM when the parent, given by its process id, dies."""
    set_parent_death_signal = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
        if os.getppid() != parent:  # it has died before
            os.kill(os.getpid(), signal.SIGTERM)


def exit_worker() -> NoReturn:
    """End a worker with exit code 0, without Python's own shutdown.

    DeepSpeed leaves threads behind, which now and then abort the process during that shutdown.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(DONE)
