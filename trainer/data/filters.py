"""Leave out rows by the content of their last answer, or of their text.

A row and its Conversation enter; nothing leaves, or `Filtered` is raised with a reason that can be
counted. A row that cannot be judged is a RowError, which is counted apart: it has no reference, its
value cannot be computed in time, or the user's function fails at it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from packhorse.trainer.config.data import Filters
from packhorse.trainer.datatypes import Conversation, Filtered, RowError
from packhorse.trainer.utils.math_answers import LIMIT_S, check_installed, math_verdict
from packhorse.trainer.utils.time_limit import OutOfTime, interrupted_after
from packhorse.trainer.utils.user_functions import FunctionFailed, call_function, load_function

PATTERN_S = 1.0  # of processor time for a pattern at one row
NO_VERDICT = {
    "no reference": "the reference holds no value",
    "too long": f"no verdict within {LIMIT_S:g} s of computing",
    "failed": "math-verify failed at the answer",
}


def check_filters(filters: Filters) -> None:
    """Raise BadInput if a filter cannot work here; called before anything is read."""
    if filters.math_answer:
        check_installed("`math_answer`")
    if filters.function:
        load_function(filters.function)


def apply_filters(filters: Filters, row: Mapping[str, Any], conversation: Conversation) -> None:
    """Raise Filtered if a filter leaves the row out, RowError if the row cannot be judged."""
    answer = conversation.text
    if answer is None:
        answer = [one.content for one in conversation.messages if one.role == "assistant"][-1]
    if filters.answer_words:
        fewest, most = filters.answer_words
        words = len(answer.split())
        if words < fewest:
            raise Filtered(f"answer_words: fewer than {fewest}")
        if words > most:
            raise Filtered(f"answer_words: more than {most}")
    if filters.pattern is not None and not _found(filters.pattern, answer):
        raise Filtered("pattern: not found")
    if filters.math_answer:
        _verify(answer, row.get(filters.math_answer))
    if filters.function:
        _ask(filters.function, row, conversation)


def _found(pattern: str, answer: str) -> bool:
    try:
        with interrupted_after(PATTERN_S):
            return re.search(pattern, answer) is not None
    except OutOfTime:
        # a pattern such as ^(a+)+$ backtracks for ever
        raise RowError(f"pattern: not finished within {PATTERN_S:g} s of computing") from None


def _verify(answer: str, reference: Any) -> None:
    # True is an int to Python, and no value of an answer.
    if isinstance(reference, bool) or not isinstance(reference, str | int | float):
        raise RowError("math_answer: no reference")
    verdict = math_verdict(answer, str(reference))
    if verdict == "wrong":
        raise Filtered("math_answer: not the reference's value")
    if verdict in NO_VERDICT:
        raise RowError(f"math_answer: {NO_VERDICT[verdict]}")


def _ask(name: str, row: Mapping[str, Any], conversation: Conversation) -> None:
    try:
        said = call_function(name, dict(row), conversation)
    except FunctionFailed as error:
        raise RowError(str(error)) from None
    if said is True:
        return
    if said is False:
        raise Filtered(f"{name}: False")
    if not isinstance(said, str):
        raise RowError(f"{name}: it must give True, False or a reason, not {type(said).__name__}")
    raise Filtered(f"{name}: {said[:80].encode(errors='replace').decode()}")
