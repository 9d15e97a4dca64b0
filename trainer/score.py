"""Answers and their scores.

In: an answer, the reference it should get, a scorer of the recipe. Out: a score from 0 to 1, and of many the mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from trainer.config_eval import Scorer
from trainer.flow import Prompt


class Sample(NamedTuple):
    """One held-out prompt, its generated answer, and the answer's scores by the scorers' names."""

    prompt: str
    answer: str
    reference: str
    scores: dict[str, bool]


def sample(prompt: Prompt, answer: str, scorers: Mapping[str, Scorer]) -> Sample:
    """The answer to a prompt with all its scores."""
    scores = {name: score(rule, answer, prompt.reference) for name, rule in scorers.items()}
    return Sample(prompt.text, answer, prompt.reference, scores)


def score(rule: Scorer, answer: str, reference: str) -> bool:
    """Whether an answer passes a scorer (see config.Scorer)."""
    if rule.pattern is not None:
        return re.fullmatch(rule.pattern, answer.strip(), re.DOTALL) is not None
    assert rule.extract is not None
    given, wanted = re.search(rule.extract, answer, re.DOTALL), re.search(rule.extract, reference, re.DOTALL)
    return given is not None and wanted is not None and given.group(1).strip() == wanted.group(1).strip()


def accuracies(samples: Sequence[Sample]) -> dict[str, float]:
    """`eval/<scorer>`: the share of samples that pass."""
    names = samples[0].scores if samples else {}
    return {f"eval/{name}": sum(s.scores[name] for s in samples) / len(samples) for name in names}
