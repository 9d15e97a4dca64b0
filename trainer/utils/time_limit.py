"""Run calls that may never end or take all memory: a user's regular expression, a formula.

A function and its arguments enter; its result leaves, or `OutOfTime` or `Failed` is raised. Python
cannot interrupt C code such as a formula's, so a helper process makes the call, under a timer that
the kernel keeps. Past a limit of processor time (not of the clock, so that a busy
machine changes no result) the kernel ends the helper, and the next call starts another one.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.child_process import Child, start_child
from packhorse.trainer.utils.text import error_line

LIMIT_BYTES = 4 << 30  # of memory that a call may take beyond what the helper takes at its start
TICK_S = 0.1  # of processor time
NAME_S = 1.0  # of processor time, for a pattern of the recipe at one name of a model

T = TypeVar("T")


class OutOfTime(Exception):
    """The call took more than its limit of processor time."""


class Failed(Exception):
    """The call raised what it should not, needed more than LIMIT_BYTES, or ended its process."""


class Killed(Exception):
    """The helper process was killed twice, which the call did not do. So it must not decide which
    rows are trained on."""

    def __init__(self) -> None:
        super().__init__("the helper process was killed twice, as the kernel does without memory")


def bounded(
    function: Callable[..., T], *arguments: Any, limit_s: float, imports: Sequence[str] = ()
) -> T:
    """Return `function(*arguments)`, computed by the helper process.

    Args:
        function: a module's own function, so that it can be pickled.
        limit_s: seconds of processor time that the call may take.
        imports: modules that the call imports; their import does not count as its time.

    Raises:
        OutOfTime: the call took more than `limit_s`.
        Failed: it raised anything, needed more than LIMIT_BYTES, or ended its process.
        Killed: the helper was killed twice.
        RuntimeError: the helper could not work, whatever the call.
    """
    global _helper
    exit_code = None
    with _lock:
        for _ in range(2):  # again, as what ended the helper may not have been the call
            _helper = _helper or start_child(multiprocessing.get_context("spawn"), _serve)
            try:
                _helper.pipe.send((function, arguments, limit_s, tuple(imports)))
                result, fault = _helper.pipe.recv()
            except (EOFError, OSError):
                exit_code, _helper = _helper.end(), None
                if exit_code == -signal.SIGPROF:
                    raise OutOfTime from None
                if exit_code is None or exit_code >= 0:
                    # Not the arguments' fault: it must not be counted as a row that failed.
                    raise RuntimeError(
                        f"the helper process ended with exit code {exit_code}; "
                        f"its own message stands above"
                    ) from None
            except BaseException:  # Ctrl-C in a notebook: its reply is not the next call's
                _helper.end()
                _helper = None
                raise
            else:
                if fault:
                    raise Failed(fault)
                return result
    if exit_code == -signal.SIGKILL:
        raise Killed
    raise Failed(f"its process ended with exit code {exit_code}")


class interrupted_after:  # noqa: N801  used as a function
    """Raise OutOfTime inside the block once it has taken `limit_s` of processor time, or TICK_S
    more.

    Python looks for signals between its own instructions and within a regular expression. So this
    ends a template's loops and an expression that backtracks for ever, and costs no helper process.
    Only a main thread gets signals: in another one, the block has no limit. No such block holds
    another one.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s

    def __enter__(self) -> None:
        global _end
        self._is_main = threading.current_thread() is threading.main_thread()
        self._timer = None if _is_ticking or not self._is_main else many_interruptions()
        if self._timer:
            self._timer.__enter__()
        if self._is_main:  # what the timer counts, and ticks do not while C code runs
            _end = os.times().user + self._limit_s

    def __exit__(self, *error: Any) -> None:
        global _end
        if self._is_main:
            _end = None
        if self._timer:
            self._timer.__exit__(*error)


@contextmanager
def many_interruptions() -> Iterator[None]:
    """Keep one timer for many short blocks of `interrupted_after`, which then cost no system call:
    a row takes hardly longer to render than the calls for a timer of its own."""
    global _is_ticking, _end
    if _is_ticking or threading.current_thread() is not threading.main_thread():
        yield
        return
    before, _is_ticking = signal.signal(signal.SIGVTALRM, _tick), True
    signal.setitimer(signal.ITIMER_VIRTUAL, TICK_S, TICK_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        # a tick that came as a block ended may have left a rest
        _is_ticking, _end = False, None
        signal.signal(signal.SIGVTALRM, before)


def names_matching(
    option: str, pattern: str, names: Iterable[str], match: Callable[..., Any] = re.search
) -> list[str]:
    """Return the names of parameters or modules that a pattern of the recipe fits.

    Args:
        option: the recipe's key of the pattern, for the message.

    Raises:
        BadInput: at one name it takes longer than NAME_S, as (a+)+$ does, which backtracks without
            end. At all names together a slow one may take its time, on any machine.
    """
    found = []
    with many_interruptions():
        for name in names:
            try:
                with interrupted_after(NAME_S):
                    if match(pattern, name):
                        found.append(name)
            except OutOfTime:
                raise BadInput(
                    f"{option}: `{pattern[:200]}` was not finished at the model's name "
                    f"`{name[:200]}` within {NAME_S:g} s of computing; make it simpler"
                ) from None
    return found


def _tick(*_: object) -> None:
    # and again at each tick, as code may swallow the first
    if _end is not None and os.times().user > _end:
        raise OutOfTime


_is_ticking = False
_end: float | None = None  # of the block that the main thread is in, by this process's user time
_helper: Child | None = None
_lock = threading.Lock()


def limit_memory() -> None:
    """Let this process take LIMIT_BYTES more than now; beyond that it gets a MemoryError."""
    import psutil

    hard_limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard_limit == resource.RLIM_INFINITY:  # else the machine's owner has set one
        resource.setrlimit(
            resource.RLIMIT_AS, (psutil.Process().memory_info().vms + LIMIT_BYTES, hard_limit)
        )


@contextmanager
def memory_limited() -> Iterator[None]:
    """Let the block take LIMIT_BYTES, in a process that goes on after it."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit_memory()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _serve(pipe: Connection) -> None:
    """Make calls until the parent is gone."""
    logging.disable(logging.CRITICAL)  # math-verify logs every text that it cannot read
    limit_memory()
    while True:
        try:
            function, arguments, limit_s, imports = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            for module in imports:
                importlib.import_module(module)
            # Nothing handles SIGPROF, so the kernel ends the process, even within C code.
            signal.setitimer(signal.ITIMER_PROF, limit_s)
            reply = function(*arguments), ""
        except Exception as error:  # RecursionError from sympy and MemoryError among them
            reply = None, error_line(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send(reply)
