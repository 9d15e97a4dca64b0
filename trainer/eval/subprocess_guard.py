"""Runs a command, and ends it with all its children when the process that asked for it is gone,
however that died.

    python supervise.py PARENT COMMAND ...

PARENT is the id of the process that starts this one. On SIGTERM, which the kernel also sends when
PARENT dies, all that has come of the command is ended: vLLM's engine outlives its server where that
alone is killed, and keeps the GPU. Run as a file, by no other than served.py: it needs none of the
trainer's packages but psutil.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress

import psutil

_DEATH_SIGNAL, _ADOPT_ORPHANS = 1, 36  # of prctl
_GRACE_S = 20.0  # to end by itself


def main(parent: int, command: list[str]) -> int:
    """Returns the command's exit code; that of SIGTERM where it was ended."""
    signal.signal(signal.SIGTERM, _leave)
    prctl = ctypes.CDLL(None).prctl
    prctl(_DEATH_SIGNAL, signal.SIGTERM)
    prctl(_ADOPT_ORPHANS, 1)  # so that all of them are found
    try:
        if os.getppid() != parent:  # it died before the kernel was asked
            return 128 + signal.SIGTERM
        return subprocess.Popen(command).wait()
    except SystemExit:
        return 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_all()


def _leave(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the end short
    raise SystemExit


def _end_all() -> None:
    children = psutil.Process().children(recursive=True)
    for child in children:
        _send(child, signal.SIGTERM)
    psutil.wait_procs(children, _GRACE_S)
    while children := psutil.Process().children(recursive=True):  # also what was started meanwhile
        for child in children:
            _send(child, signal.SIGKILL)
        psutil.wait_procs(children, 1.0)


def _send(child: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        child.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
