"""Whether an answer comes to the same value as a reference, by the library math-verify.

An answer and a reference enter; a verdict leaves. The library reads numbers, formulas and sets, and computes; what it
is given may be a tower of powers that no computer finishes. Its own time limit is a Python signal handler, which fails
outside the main thread and waits while C code runs. So the work is done in a process beside this one, with a timer
that the kernel keeps: past LIMIT_S of its own processor time (not of the clock: a busy machine changes no verdict) that
process is ended, the next one starts, and the verdict is that it took too long: that is not `wrong`.

`#### x` at the end (gsm8k), `<answer>x</answer>` and `\\boxed{x}` mark the final answer; where none of them is there,
it is what the library finds: the value after "the answer is", else the last one. Thinking, which ends with `</think>`,
is not looked at.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import re
import resource
import signal
import threading
from multiprocessing.connection import Connection
from typing import Literal

from trainer.flow import BadInput

MARKED = re.compile(r"####([^\n]*)\s*\Z|<answer>(.*?)</answer>", re.DOTALL)
LIMIT_S = 10.0
LIMIT_BYTES = 4 << 30  # of memory beyond what the library itself takes; what needs more fails

Verdict = Literal["right", "wrong", "no reference", "too long", "failed"]


def check_installed() -> None:
    """Raises BadInput where the library is not there."""
    if importlib.util.find_spec("math_verify") is None:
        raise BadInput("`verify: math` needs the library math-verify: pip install 'math-verify[antlr4_13_2]'")


def math_verdict(answer: str, reference: str) -> Verdict:
    """`no reference`: nothing in the reference is a value; `too long`: it took more than LIMIT_S; `failed`: the library
    did, or it needed more than LIMIT_BYTES."""
    global _process
    with _lock:
        if _process is None:
            _process = _start()
        try:
            _process.send((answer, reference))
            return _process.recv()
        except (EOFError, OSError):
            _process.close()
            _process = None
            return "too long"


_process: Connection | None = None
_lock = threading.Lock()


def _start() -> Connection:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_serve, args=(theirs, LIMIT_S), daemon=True).start()
    theirs.close()  # or its end would not be noticed here
    try:
        ours.recv()
    except EOFError:  # not a row's fault: it must not pass for one without a verdict
        raise RuntimeError("the process that verifies answers did not start; what it says stands above") from None
    return ours


def _serve(questions: Connection, limit_s: float) -> None:
    """Answer until the process that asks is gone."""
    for number in (
        signal.SIGINT,
        signal.SIGUSR1,
    ):  # Ctrl-C, and Slurm's word to all processes, are for the one that asks
        signal.signal(number, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)  # the library logs every text that it cannot read
    import math_verify  # noqa: F401  takes a second, which is not the first answer's
    import psutil

    hard_limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard_limit == resource.RLIM_INFINITY:  # else the machine's owner has set one
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + LIMIT_BYTES, hard_limit))
    questions.send("ready")
    while True:
        try:
            answer, reference = questions.recv()
        except (EOFError, OSError):
            return
        signal.setitimer(signal.ITIMER_PROF, limit_s)  # SIGPROF, which nothing handles, ends the process
        try:
            verdict = _verdict(answer, reference)
        except Exception:  # of sympy's depths, a MemoryError among them
            verdict = "failed"
        signal.setitimer(signal.ITIMER_PROF, 0)
        questions.send(verdict)


def _verdict(answer: str, reference: str) -> Verdict:
    from math_verify import parse, verify

    right = parse(_final(reference, alone=True), parsing_timeout=0)
    if not right:
        return "no reference"
    given = parse(_final(answer, alone=False), parsing_timeout=0)
    return "right" if verify(right, given, timeout_seconds=0) else "wrong"


def _final(text: str, *, alone: bool) -> str:
    """The text's final answer, or the text, less its thinking; a value that stands `alone` is marked, so that all of
    it is read."""
    text = text.rpartition("</think>")[2].replace("\N{MINUS SIGN}", "-")
    marked = [match[match.lastindex or 0] for match in MARKED.finditer(text)]
    final = marked[-1] if marked else text
    if (marked or alone) and "\\boxed" not in final and "$" not in final:
        return f"\\boxed{{{final.strip()}}}"
    return final
