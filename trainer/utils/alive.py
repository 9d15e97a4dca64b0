"""Tell from a run folder alone, on any machine that shares it, whether a process works there.

A thread of rank 0 touches a file in the folder. Whoever lists runs compares its age: a process
number would mean nothing on another host, and file locks do not work on every shared file system.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ALIVE_FILE = ".alive"  # in the run folder, while a start of the run lasts
BEAT_S = 10.0  # between two touches
SILENT_S = 60.0  # a file that is older was left by a killed process; clocks of hosts differ a bit


@contextmanager
def shown_alive(folder: Path) -> Iterator[None]:
    """Keep the folder's ALIVE_FILE young while the block runs, and delete it afterwards."""
    path = folder / ALIVE_FILE
    ended = threading.Event()

    def beat() -> None:
        # A beat that cannot be written, on a folder that is away for a moment, makes the run look
        # dead in a list. It must not end the run.
        while not ended.wait(BEAT_S):
            with suppress(OSError):
                path.touch()

    path.touch()
    thread = threading.Thread(target=beat, name="alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):  # the block's own error matters more
            path.unlink()


def is_alive(folder: Path) -> bool:
    """Return whether a process has touched the folder's ALIVE_FILE within the last SILENT_S."""
    try:
        return time.time() - (folder / ALIVE_FILE).stat().st_mtime < SILENT_S
    except OSError:
        return False
