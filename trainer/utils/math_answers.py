"""Compare the value of an answer with that of a reference, by the library math-verify.

An answer and a reference enter; a verdict leaves. The library reads numbers, formulas and sets, and
computes; a text may be a tower of powers that no computer finishes. Its own time limit is a Python
signal handler, which fails outside the main thread and waits while C code runs. So it works in a
helper process (`time_limit.bounded`); past LIMIT_S the verdict is `too long`, not `wrong`.

`#### x` at the end (gsm8k), `<answer>x</answer>` and `\\boxed{x}` mark the final answer; without a
mark it is what the library finds: the value after "the answer is", else the last one. Reasoning,
which ends with `</think>`, is ignored.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Literal

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.time_limit import Failed, TooLong, bounded

MARKED = re.compile(r"####([^\n]*)\s*\Z|<answer>(.*?)</answer>", re.DOTALL)
LIMIT_S = 10.0

Verdict = Literal["right", "wrong", "no reference", "too long", "failed"]


def check_installed(what: str) -> None:
    """Raise BadInput if the library is not installed; `what` is the setting that needs it."""
    if importlib.util.find_spec("math_verify") is None:
        raise BadInput(
            f"{what} needs the library math-verify: pip install 'math-verify[antlr4_13_2]'"
        )


def math_verdict(answer: str, reference: str, *, alone: bool = True) -> Verdict:
    """Return whether the answer has the reference's value.

    Args:
        alone: a reference without a mark is one value and nothing else; if False, the value is
            searched for as in an answer.

    Returns:
        `right` or `wrong`; `no reference`, if the reference holds no value; `too long`, above
        LIMIT_S of processor time; `failed`, if the library did or needed too much memory.
    """
    try:
        return bounded(_verdict, answer, reference, alone, limit_s=LIMIT_S, imports=["math_verify"])
    except TooLong:
        return "too long"
    except Failed:
        return "failed"


def _verdict(answer: str, reference: str, alone: bool) -> Verdict:
    from math_verify import parse, verify

    right = parse(_final(reference, alone=alone), parsing_timeout=0)
    if not right:
        return "no reference"
    given = parse(_final(answer, alone=False), parsing_timeout=0)
    return "right" if verify(right, given, timeout_seconds=0) else "wrong"


def _final(text: str, *, alone: bool) -> str:
    """Return the marked part of the text, or all of it, without its reasoning; a value that stands
    `alone` is marked, so that all of it is read."""
    text = text.rpartition("</think>")[2].replace("\N{MINUS SIGN}", "-")
    marked = [match[match.lastindex or 0] for match in MARKED.finditer(text)]
    final = marked[-1] if marked else text
    if (marked or alone) and "\\boxed" not in final and "$" not in final:
        return f"\\boxed{{{final.strip()}}}"
    return final
