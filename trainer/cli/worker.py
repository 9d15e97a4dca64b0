"""What a command does that starts workers, and what it does as one of them. Nothing heavy is
imported here.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

from trainer.datatypes import DONE, SAVED_RUN_AGAIN


def is_worker() -> bool:
    """Whether a launcher, ours or torchrun, started this process."""
    return {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"} <= os.environ.keys()


def stop_while_starting() -> None:
    """A launcher imports torch for seconds before it can pass signals on: until then they end it,
    with nothing lost.
    """
    import signal

    def stop(number: int, _frame: Any) -> NoReturn:
        print(
            f"packhorse: {signal.Signals(number).name}: stopped before the workers had started",
            file=sys.stderr,
        )
        sys.exit(SAVED_RUN_AGAIN)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)


def end_with_the_launcher() -> None:
    """Ask the kernel for a SIGTERM when the launcher dies: a worker left alone saves and leaves the
    GPU.
    """
    import ctypes
    import signal

    set_parent_death_signal = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def end_worker() -> NoReturn:
    """A worker's end, done: DeepSpeed leaves threads behind, which now and then abort a process at
    its very end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(DONE)
