"""Answers and their scores: samples, and what they come to.

In: prompts, their answers, the scorers of the recipe. Out: samples, one a prompt, with every
    scorer's score; and for
each scorer a metric, the mean with its count and 95% interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from trainer import dist
from trainer.config.eval import Choice, Function, Judge, Math, Scorer
from trainer.datatypes import BadInput, Prompt
from trainer.eval.confidence import interval
from trainer.eval.llm_judge import judged
from trainer.eval.openai_client import Unreachable
from trainer.eval.scorers import TooSlow, Unscored, expected, score
from trainer.utils.math_answers import check_installed
from trainer.utils.user_functions import load_function

# of processor time that a scorer may lose to answers that it cannot score in time, in one
# evaluation
SLOW_S = 60.0


class Sample(NamedTuple):
    """One held-out prompt, its answer, and the answer's scores by the scorers' names: 0 to 1, or
    None with the reason in `unscored`."""

    prompt: str
    answer: str
    reference: str
    scores: dict[str, float | None]
    unscored: Mapping[str, str] = {}

    def as_json(self) -> dict[str, Any]:
        """A line of samples.jsonl, less the step; `unscored` where there is something."""
        fields = self._asdict()
        return (
            fields
            if self.unscored
            else {key: value for key, value in fields.items() if key != "unscored"}
        )


class Metric(NamedTuple):
    """The mean of `count` scores and its 95% interval; without a value where there is no score, for
    the reason in `missing`."""

    value: float | None
    count: int
    low: float | None
    high: float | None
    missing: str | None = None

    def as_json(self) -> dict[str, Any]:
        """As evaluations.jsonl has it: `missing` where something is."""
        fields = self._asdict()
        return (
            fields
            if self.missing
            else {key: value for key, value in fields.items() if key != "missing"}
        )


def check_scorers(scorers: Mapping[str, Scorer], prompts: Sequence[Prompt]) -> None:
    """Say before anything is trained what a scorer lacks, to be logged where it is of some prompts
    only.

    Raises:
        BadInput: a scorer lacks a library, a function or a file, or has nothing to hold any of the
            answers against.
    """
    for name, rule in scorers.items():
        what = f"eval.generate.scorers.{name} ({rule.kind})"
        if isinstance(rule, Math):
            check_installed(what)
        if isinstance(rule, Function):
            load_function(rule.function)
        try:
            reasons = Counter(reason for prompt in prompts if (reason := _lacking(rule, prompt)))
        except TooSlow as slow:
            raise BadInput(f"{what}: {slow}, at a reference; make it simpler") from None
        lacking = sum(reasons.values())
        if lacking and lacking == len(prompts):
            raise BadInput(
                f"{what}: none of the {lacking} held-out prompts can be scored: "
                f"{_most_common(reasons)}; "
                "give data.eval rows that can, or correct the scorer"
            )
        if lacking:
            dist.log.warning(
                "%s: %d of %d prompts are left out: %s",
                what,
                lacking,
                len(prompts),
                _most_common(reasons),
            )


def samples(
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    scorers: Mapping[str, Scorer],
    letters: Mapping[str, Sequence[str]] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> list[Sample]:
    """The answers with all their scores. What a scorer could not score is logged, in one line.

    Args:
        letters: of each scorer of the kind `choice`, by its name: the likeliest letter after each
            prompt.
        stopping: asked now and then while a judge is waited for.

    Raises:
        Cancelled (trainer.eval.openai_client): `stopping` said yes.
    """
    columns = {}
    for name, rule in scorers.items():
        said = (letters or {})[name] if isinstance(rule, Choice) else answers
        columns[name] = _scores(rule, prompts, said, stopping)
        reasons = Counter(found for found in columns[name] if isinstance(found, str))
        if reasons:
            what = f"{name} ({rule.kind}): {sum(reasons.values())} of {len(answers)} answers have no score"
            dist.log.warning("%s: %s", what, _most_common(reasons))
    made = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        found = {name: column[number] for name, column in columns.items()}
        unscored = {name: reason for name, reason in found.items() if isinstance(reason, str)}
        scores = {name: None if isinstance(value, str) else value for name, value in found.items()}
        made.append(Sample(prompt.text, answer, prompt.reference, scores, unscored))
    return made


def metrics(samples: Sequence[Sample]) -> dict[str, Metric]:
    """What the samples come to, by the scorers' names."""
    return {name: _metric(name, samples) for name in (samples[0].scores if samples else {})}


def as_table(samples: Sequence[Sample], rows: int = 8, characters: int = 600) -> str:
    """The first samples as a Markdown table; a text is shown up to so many characters, a prompt's
    last.
    """
    names = list(samples[0].scores) if samples else []
    heads = ["prompt", "answer", "reference", *names]
    lines = [heads, ["---"] * len(heads)]
    for sample in samples[:rows]:
        texts = (
            sample.prompt[-characters:],
            sample.answer[:characters],
            sample.reference[:characters],
        )
        scores = ["" if value is None else f"{value:.3g}" for value in sample.scores.values()]
        lines.append([*map(_cell, texts), *scores])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """The text as it is, whatever it would mean in Markdown or HTML, on one line."""
    return "<br>".join("".join(map(_safe, line)) for line in text.splitlines())


def _safe(character: str) -> str:
    if not character.isprintable():
        return " "
    return character if character.isalnum() or character == " " else f"&#{ord(character)};"


def _lacking(rule: Scorer, prompt: Prompt) -> str | None:
    try:
        expected(rule, prompt)
    except TooSlow:
        raise
    except Unscored as reason:
        return str(reason)
    return None


def _scores(
    rule: Scorer, prompts: Sequence[Prompt], answers: Sequence[str], stopping: Callable[[], bool]
) -> list[float | str]:
    """A score for each answer, or the reason why there is none."""
    if isinstance(rule, Judge):
        return _judgements(rule, prompts, answers, stopping)
    found: list[float | str] = []
    slow_s = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        try:
            found.append(score(rule, prompt, answer))
        except TooSlow as slow:
            slow_s += slow.limit_s
            if slow_s >= SLOW_S:  # what is left would take as long: the metric is missing
                return [f"given up: {slow}, at {round(slow_s / slow.limit_s)} answers"] * len(
                    answers
                )
            found.append(str(slow))
        except Unscored as reason:
            found.append(str(reason))
    return found


def _judgements(
    rule: Judge, prompts: Sequence[Prompt], answers: Sequence[str], stopping: Callable[[], bool]
) -> list[float | str]:
    found: list[float | str] = [_lacking(rule, prompt) or "" for prompt in prompts]
    asked = [number for number, reason in enumerate(found) if not reason]
    try:
        grades = judged(
            rule,
            [prompts[number] for number in asked],
            [answers[number] for number in asked],
            stopping,
        )
    except Unreachable as error:
        return [str(error)] * len(answers)
    for number, grade in zip(asked, grades, strict=True):
        found[number] = "the judge's reply ends in no verdict" if grade is None else grade
    return found


def _metric(name: str, samples: Sequence[Sample]) -> Metric:
    scores = [value for sample in samples if (value := sample.scores[name]) is not None]
    if not scores:
        reasons = Counter(sample.unscored.get(name, "no score") for sample in samples)
        return Metric(None, 0, None, None, _most_common(reasons))
    return Metric(sum(scores) / len(scores), len(scores), *interval(scores))


def _most_common(reasons: Counter[str]) -> str:
    return reasons.most_common(1)[0][0]
