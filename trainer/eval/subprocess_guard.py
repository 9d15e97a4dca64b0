"""Run a command, and end it with all its children when the process that started it has died,
however that happened.

    python subprocess_guard.py PARENT COMMAND ...

PARENT is the id of the process that starts this one. On SIGTERM, which the kernel also sends when
PARENT dies, every descendant of the command is ended: vLLM's engine outlives its server if that
alone is killed, and would keep the GPU. If this process is killed, the command gets a SIGTERM.
vllm_server.py runs this as a file; it imports nothing of the trainer, only psutil.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial

import psutil

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # options of prctl(2)
_GRACE_S = 20.0  # between SIGTERM and SIGKILL


def main(parent: int, command: list[str]) -> int:
    """Run the command. Return its exit code, or SIGTERM's if it was ended."""

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the cleanup short
        raise SystemExit

    signal.signal(signal.SIGTERM, leave)
    # orphans become our children, so that all descendants can be found
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1)
    try:
        _end_with(parent)
        return subprocess.Popen(command, preexec_fn=partial(_end_with, os.getpid())).wait()
    except SystemExit:
        return 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_descendants()


def _end_with(parent: int) -> None:
    """Let the kernel send this process SIGTERM when its parent has died."""
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGTERM)


def _end_descendants() -> None:
    number, patience_s = signal.SIGTERM, _GRACE_S
    # again until none is left: some may have started meanwhile
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)
        psutil.wait_procs(children, patience_s)
        number, patience_s = signal.SIGKILL, 1.0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
