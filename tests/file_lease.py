"""Hold a lease of the kernel on a file, as an NFS server or Samba does for its clients."""

import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def leased(path: Path) -> Iterator[None]:
    """Hold a lease on the file until another one opens it: a plain open waits until it is given
    back, and one with O_NONBLOCK fails."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # by which the kernel asks for it
    descriptor = os.open(path, os.O_RDWR)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    ended = threading.Event()

    def give_back_when_asked() -> None:
        while fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_WRLCK and not ended.is_set():
            time.sleep(0.01)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    holder = threading.Thread(target=give_back_when_asked)
    holder.start()
    try:
        yield
    finally:
        ended.set()
        holder.join()
        os.close(descriptor)
        signal.signal(signal.SIGIO, before)
