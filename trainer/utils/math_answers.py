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
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.time_limit import Failed, OutOfTime, bounded

MARKED = re.compile(r"####([^\n]*)\s*\Z|<answer>(.*?)</answer>", re.DOTALL)
# Values that the library reads as what they say, in the one \\boxed{} of a text. It has readings of
# its own: it takes 01,000 for 1, compares no more than 15 digits, of which 6 are decimals, and
# takes neither -5% nor 1,000% for a percentage.
DECIMALS = r"(?:\.[0-9]{1,4})?"
# with separators, and without a unit after them, which the library reads otherwise
LARGE = rf"[1-9][0-9]{{0,2}}(?:(?:,|\{{,\}})[0-9]{{3}}){{1,2}}{DECIMALS}(?! ?[\\^])"
NUMBER = rf"(?:{LARGE}|[0-9]{{1,9}}{DECIMALS})"
FRACTION = r"\\[dt]?frac\{(-?[0-9]{1,9})\}\{([1-9][0-9]{0,8})\}"
# not words that mean something to the library
UNIT = r"(?:\\,|\\? )?\\text\{(?![^}]*\b(?:and|or|percent|percentage|pct)\b)[A-Za-z ]+\}"
UNIT = rf"(?:{UNIT}|\^(?:\\circ|\{{\\circ\}}))?"
PERCENT = r"((?:0|[1-9][0-9]{0,5})(?:\.[0-9]{1,4})?) ?\\?%"
VALUE = rf"(?:{PERCENT}|(-?)(?:(?:\\\$)?({NUMBER})|{FRACTION}){UNIT})"
BOXED = re.compile(rf"\\boxed\{{{VALUE}\}}")
IN_DOLLARS = re.compile(rf"\$({NUMBER})|\$({VALUE})\$")
# Before and after the box: where the library may take something else, or more than the box.
BEFORE = re.compile(r"\\boxed|\\fbox|final answer.*\sis", re.IGNORECASE | re.DOTALL)
AFTER = re.compile(r"\\boxed|\\fbox|%|percent|pct|final answer", re.IGNORECASE)
# "The final answer is $\\boxed{18}$." goes before all else, and is nothing else.
FINAL = re.compile(
    rf"(?:(?!\\boxed|\\fbox|\$|final answer).)*final answer is:?\s*\$\\boxed\{{{VALUE}\}}\$\.?\s*",
    re.IGNORECASE | re.DOTALL,
)
SHORT = 100  # characters of a text that is worth remembering: the same references come again
LIMIT_S = 10.0

Verdict = Literal["right", "wrong", "no reference", "too long", "failed"]


def check_installed(what: str) -> None:
    """Raise BadInput if the library is not installed; `what` is the setting that needs it."""
    if importlib.util.find_spec("math_verify") is None:
        raise BadInput(
            f"{what} needs the library math-verify: pip install 'math-verify[antlr4-13-2]'"
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
    # The library needs 2 to 7 ms for a value, and most finals of word problems are such.
    values = [BOXED.fullmatch(final) for final in finals]
    if values[0] and values[1]:
        equal = _equal(_value(values[0]), _value(values[1]))
        if equal is not None:
            return "right" if equal else "wrong"
    try:
        return bounded(_verdict, *finals, limit_s=LIMIT_S, imports=["math_verify"])
    except OutOfTime:
        return "too long"
    except Failed:
        return "failed"


class _Value(NamedTuple):
    number: Fraction
    percent: bool
    whole: bool  # 5.0 is not


def _value(boxed: re.Match[str]) -> _Value:
    percent, sign, number, above, below = boxed.groups()
    if below:
        found = Fraction(int(above), int(below))
    else:
        found = Fraction(re.sub("[,{}]", "", percent or number))
    whole = found.denominator == 1 and "." not in boxed[0]
    return _Value(-found if sign else found, bool(percent), whole)


def _equal(given: _Value, right: _Value) -> bool | None:
    """Return whether the library takes the two as equal; None, if that depends on its rounding, or
    on its rule that 50% is 50 if both are whole."""
    same_number = given.number == right.number
    if same_number and (given.percent == right.percent or (given.whole and right.whole)):
        return True
    one, other = (value.number / (100 if value.percent else 1) for value in (given, right))
    if one == other:
        return None if given.whole and right.whole else True
    return False if abs(one - other) > Fraction(1, 10**5) else None


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
    box = BOXED.search(final)
    if box and (
        FINAL.fullmatch(final)
        or not (BEFORE.search(final[: box.start()]) or AFTER.search(final[box.end() :]))
    ):
        return box[0]
    if (marked or alone) and "\\boxed" not in final:
        dollars = IN_DOLLARS.fullmatch(final.strip())
        if dollars or "$" not in final:
            return f"\\boxed{{{dollars[1] or dollars[2] if dollars else final.strip()}}}"
    return final
