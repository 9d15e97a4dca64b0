"""Start child processes that neither outlive their parent nor hold up its exit.

A multiprocessing context and a function enter; a `Child` leaves: a pipe to the function, and a way
to end it. No child searches the current folder for modules, where a `packhorse.py` or `torch.py`
would take the place of the real one.
"""

from __future__ import annotations

import fcntl
import multiprocessing.process
import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import util
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

END_S = 5.0  # that a killed child may take to end


def _spawn(path: Any, arguments: Sequence[Any], fds: Any) -> int:
    """Start one of multiprocessing's processes, which are all `python -c PROGRAM`, without the
    current folder, which Python would search first."""
    arguments = list(arguments)
    program = arguments.index("-c") + 1
    arguments[program] = f"import sys; sys.path[:] = filter(None, sys.path); {arguments[program]}"
    return _spawn_plainly(path, arguments, fds)


# Python 3.10 has no switch for it. This is how spawned children, the fork server and the resource
# tracker are started, of which the last is started by libraries, too.
_spawn_plainly = util.spawnv_passfds
util.spawnv_passfds = _spawn


class Child(NamedTuple):
    """A running child: this side's end of the pipe to it, what kills it, and its process id.

    `pipe.recv` raises EOFError once the child is gone. `end()` kills it and returns its exit code,
    the negative of a signal that ended it; None if the kernel does not let go of it in time, as
    while it waits for a file system that is away. A second call does nothing and returns None.
    """

    pipe: Connection
    end: Callable[[], int | None]
    pid: int


def start_child(context: Any, target: Callable[..., None], *arguments: Any) -> Child:
    """Run `target(pipe, *arguments)` in a new process.

    The child is deaf to Ctrl-C and to the signals that Slurm sends to every process of a job's
    step: they are for the parent. It ends with the parent, however that ends.

    Args:
        context: "spawn" or "forkserver" of `multiprocessing.get_context`.
    """
    ours, theirs = context.Pipe()
    lifeline, held_here = context.Pipe(duplex=False)
    process = context.Process(target=_run_child, args=(lifeline, target, theirs, *arguments))
    process.start()
    theirs.close()  # as long as it is open here, recv() would not notice the child's end
    lifeline.close()
    # At exit multiprocessing sends SIGTERM at most, to which the child is deaf, and then waits
    # without a deadline. What has an exitpriority of 0 or above runs before that.
    end = Finalize(None, _end_child, args=(process, ours, held_here), exitpriority=0)
    return Child(ours, end, process.pid)


def _end_child(process: Any, ours: Connection, held_here: Connection) -> int | None:
    process.kill()
    process.join(END_S)
    if process.exitcode is None:
        # A thread of ours may read from it, and multiprocessing waits for all its processes at
        # exit: neither has a deadline.
        with suppress(OSError), socket.socket(fileno=os.dup(ours.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)
        vars(multiprocessing.process)["_children"].discard(process)
    held_here.close()
    return process.exitcode


def _run_child(
    lifeline: Connection, target: Callable[..., None], pipe: Connection, *arguments: Any
) -> None:
    # A handler that does nothing, as processes that the child starts would inherit an ignored or
    # a blocked signal: a SIGTERM could not end them, and who waits for them would wait for ever.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
        signal.siginterrupt(number, False)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # Nothing is ever written to the lifeline. When the parent is gone, its other end is closed, and
    # the kernel sends SIGIO, which ends this process. A thread that waits for the parent could not
    # do that while C code holds the interpreter's lock, and PR_SET_PDEATHSIG would end this process
    # with the thread that started it.
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    # A copy that only the kernel closes: the parent sees EOF when there is an exit code, no sooner.
    os.dup(pipe.fileno())
    if not lifeline.poll():  # else the parent has gone before
        target(pipe, *arguments)
