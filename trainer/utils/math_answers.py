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
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.time_limit import Failed, TooLong, bounded

MARKED = re.compile(r"####([^\n]*)\s*\Z|<answer>(.*?)</answer>", re.DOTALL)
# A number that the library reads as what it says. It has others of its own: it takes 01,000 for 1,
# and compares no more than 15 digits, of which 6 are decimals.
PLAIN = re.compile(
    r"\\boxed\{(-?(?:[0-9]{1,9}|[1-9][0-9]{0,2}(?:,[0-9]{3}){1,2})(?:\.[0-9]{1,4})?)\}"
)
# Where the library looks for a formula before it takes what stands in \\boxed{} by itself.
ELSEWHERE = re.compile(r"\$|\[|\\\(|final answer", re.IGNORECASE)
SHORT = 100  # characters of a text that is worth remembering: the same references come again
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
    finals = _final(answer, alone=False), _final(reference, alone=alone)
    # The library needs 2 ms for a number, and most finals of word problems are numbers.
    plain = [PLAIN.fullmatch(final) for final in finals]
    if plain[0] and plain[1]:
        given, right = (Decimal(match[1].replace(",", "")) for match in plain if match)
        return "right" if given == right else "wrong"
    try:
        return bounded(_verdict, *finals, limit_s=LIMIT_S, imports=["math_verify"])
    except TooLong:
        return "too long"
    except Failed:
        return "failed"


def _verdict(answer: str, reference: str) -> Verdict:
    from math_verify import verify

    right = _parse(reference)
    if not right:
        return "no reference"
    return "right" if verify(right, _parse(answer), timeout_seconds=0) else "wrong"


def _parse(text: str) -> list[Any]:
    return _parse_short(text) if len(text) <= SHORT else _parse_short.__wrapped__(text)


@lru_cache(4096)
def _parse_short(text: str) -> list[Any]:
    from math_verify import parse

    return parse(text, parsing_timeout=0)


def _final(text: str, *, alone: bool) -> str:
    """Return the marked part of the text, or all of it, without its reasoning; a value that stands
    `alone` is marked, so that all of it is read."""
    text = text.rpartition("</think>")[2].replace("\N{MINUS SIGN}", "-")
    marked = [match[match.lastindex or 0] for match in MARKED.finditer(text)]
    final = marked[-1] if marked else text
    if (marked or alone) and "\\boxed" not in final and "$" not in final:
        return f"\\boxed{{{final.strip()}}}"
    number = PLAIN.search(final)
    if number and "}" not in final[number.end() :] and not ELSEWHERE.search(final):
        return number[0] if final.count("\\boxed") == 1 else final
    return final
