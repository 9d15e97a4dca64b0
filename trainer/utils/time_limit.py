"""Calls that may never end, or take all memory: a regular expression of the user's on a model's
answer, a formula.

A function and its arguments enter; its result leaves, or TooLong, or Failed. Python cannot
interrupt C code, as a regular expression is, so the work is done in a process beside this one, with
a timer that the kernel keeps: past a limit of its own processor time (not of the clock: a busy
machine changes no result) that process is ended, and the next one starts.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import resource
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from trainer.utils.text import error_line

LIMIT_BYTES = 4 << 30  # of memory beyond what the process takes at its start; what needs more fails

T = TypeVar("T")


class TooLong(Exception):
    """The call took more than its limit of processor time."""


class Failed(Exception):
    """The call raised what it should not, needed more than LIMIT_BYTES, or ended its process."""


def bounded(
    function: Callable[..., T], *arguments: Any, limit_s: float, imports: Sequence[str] = ()
) -> T:
    """What the function, one of a module's own, makes of the arguments.

    Args:
        imports: modules that it will import, which is not its time.

    Raises:
        TooLong: it took more than `limit_s` of processor time.
        Failed: it raised anything, needed more than LIMIT_BYTES, or ended its process.
    """
    global _beside
    code = None
    with _lock:
        for _ in range(
            2
        ):  # once more where the process was ended by a signal that was meant for all
            _beside = _beside or _start()
            process, calls = _beside
            try:
                calls.send((function, arguments, limit_s, tuple(imports)))
                result, fault = calls.recv()
            except (EOFError, OSError):
                calls.close()
                process.join()
                _beside, code = None, process.exitcode
                if code == -signal.SIGPROF:
                    raise TooLong from None
                if code >= 0:  # not the arguments' fault: it must not pass for one
                    raise RuntimeError(
                        "the process beside this one failed; what it says stands above"
                    ) from None
            else:
                if fault:
                    raise Failed(fault)
                return result
    raise Failed(f"its process ended with exit code {code}")


_beside: tuple[Any, Connection] | None = None  # the process, and where it takes calls
_lock = threading.Lock()


def _start() -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # or its end would not be noticed here
    return process, ours


def _serve(calls: Connection) -> None:
    """Answer until the process that asks is gone."""
    for number in (
        signal.SIGINT,
        signal.SIGUSR1,
    ):  # Ctrl-C, and Slurm's word to all, are for the one that asks
        signal.signal(number, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)  # math-verify logs every text that it cannot read
    import psutil

    hard_limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard_limit == resource.RLIM_INFINITY:  # else the machine's owner has set one
        resource.setrlimit(
            resource.RLIMIT_AS, (psutil.Process().memory_info().vms + LIMIT_BYTES, hard_limit)
        )
    while True:
        try:
            function, arguments, limit_s, imports = calls.recv()
        except (EOFError, OSError):
            return
        try:
            for module in imports:
                importlib.import_module(module)
            signal.setitimer(
                signal.ITIMER_PROF, limit_s
            )  # SIGPROF, which nothing handles, ends the process
            reply = function(*arguments), ""
        except Exception as error:  # of sympy's depths, a MemoryError among them
            reply = None, error_line(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        calls.send(reply)
