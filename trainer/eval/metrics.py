"""Score all answers of an evaluation, and summarize each scorer as a metric.

Prompts, answers and the recipe's scorers enter. One sample a prompt leaves, with every scorer's
score; and one metric a scorer: the mean score, its count and its 95% interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from packhorse.trainer import dist
from packhorse.trainer.config.eval import Choice, Function, Judge, Math, Scorer
from packhorse.trainer.datatypes import BadInput, Prompt
from packhorse.trainer.eval.confidence import interval
from packhorse.trainer.eval.llm_judge import judge_answers
from packhorse.trainer.eval.openai_client import Unreachable
from packhorse.trainer.eval.scorers import TooSlow, Unscored, expected, score
from packhorse.trainer.utils.math_answers import check_installed
from packhorse.trainer.utils.staged_build import Stopped
from packhorse.trainer.utils.text import error_line
from packhorse.trainer.utils.user_functions import load_function

# processor time that a scorer may lose, in one evaluation, on answers that exceed its time limit
SLOW_S = 60.0


class Sample(NamedTuple):
    """A held-out prompt, its answer, and the answer's scores by the scorers' names: 0 to 1, or None
    with the reason in `unscored`."""

    prompt: str
    answer: str
    reference: str
    scores: dict[str, float | None]
    unscored: Mapping[str, str] = {}

    def as_json(self) -> dict[str, Any]:
        """Return the fields of a line of samples.jsonl, without `unscored` if that is empty."""
        return {key: value for key, value in self._asdict().items() if value or key != "unscored"}


class Metric(NamedTuple):
    """The mean of `count` scores and its 95% interval; no value if there is no score, for the
    reason in `missing`."""

    value: float | None
    count: int
    low: float | None
    high: float | None
    missing: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the fields in evaluations.jsonl, without `missing` if nothing is."""
        return {key: value for key, value in self._asdict().items() if value or key != "missing"}


def check_scorers(scorers: Mapping[str, Scorer], prompts: Sequence[Prompt]) -> None:
    """Raise BadInput, before training, if a scorer lacks a library, a function or a file, or can
    score none of the prompts. Log those that it cannot."""
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
                f"{_most_common(reasons)}; give data.eval rows that can, or correct the scorer"
            )
        if lacking:
            dist.log.warning(
                "%s: %d of %d prompts are left out: %s",
                *(what, lacking, len(prompts), _most_common(reasons)),
            )


def score_samples(
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    scorers: Mapping[str, Scorer],
    letters: Mapping[str, Sequence[str]] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> list[Sample]:
    """Score the answers by all scorers. Log in one line what a scorer could not score.

    Args:
        letters: by the name of each scorer of kind `choice`, the likeliest letter after each
            prompt.
        stopping: called while a judge is waited for; if it returns True, Stopped is raised.
    """
    columns: dict[str, list[float | str]] = {}
    for name, rule in scorers.items():
        scored = (letters or {})[name] if isinstance(rule, Choice) else answers
        try:
            columns[name] = _scores(rule, prompts, scored, stopping)
        except Stopped:
            raise
        except Exception as error:  # whatever a scorer does, training must go on
            columns[name] = [f"the scorer failed: {error_line(error)}"] * len(scored)
        reasons = Counter(found for found in columns[name] if isinstance(found, str))
        if reasons:
            dist.log.warning(
                "%s (%s): %d of %d answers have no score: %s",
                *(name, rule.kind, sum(reasons.values()), len(answers), _most_common(reasons)),
            )
    samples = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        found = {name: column[number] for name, column in columns.items()}
        unscored = {name: reason for name, reason in found.items() if isinstance(reason, str)}
        scores: dict[str, float | None] = {
            name: None if isinstance(value, str) else value for name, value in found.items()
        }
        samples.append(Sample(prompt.text, answer, prompt.reference, scores, unscored))
    return samples


def summarize(samples: Sequence[Sample]) -> dict[str, Metric]:
    """Return each scorer's metric over the samples, by the scorer's name."""
    metrics = {}
    for name in samples[0].scores if samples else ():
        scores = [value for sample in samples if (value := sample.scores[name]) is not None]
        if scores:
            metrics[name] = Metric(sum(scores) / len(scores), len(scores), *interval(scores))
        else:
            reasons = Counter(sample.unscored.get(name, "no score") for sample in samples)
            metrics[name] = Metric(None, 0, None, None, _most_common(reasons))
    return metrics


def as_table(samples: Sequence[Sample], rows: int = 8, characters: int = 600) -> str:
    """Return the first samples as a Markdown table. Of a longer text the first `characters` are
    shown, of a prompt the last."""
    heads = ["prompt", "answer", "reference", *(samples[0].scores if samples else ())]
    lines = [heads, ["---"] * len(heads)]
    for sample in samples[:rows]:
        texts = [text[:characters] for text in (sample.answer, sample.reference)]
        scores = ["" if value is None else f"{value:.3g}" for value in sample.scores.values()]
        lines.append([*map(_table_cell, (sample.prompt[-characters:], *texts)), *scores])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _table_cell(text: str) -> str:
    """Return the text on one line, escaped: TensorBoard reads it as Markdown and HTML."""
    return "<br>".join("".join(map(_escape, line)) for line in text.splitlines())


def _escape(character: str) -> str:
    if not character.isprintable():
        return " "
    return character if character.isalnum() or character == " " else f"&#{ord(character)};"


def _lacking(rule: Scorer, prompt: Prompt) -> str | None:
    """Return why no answer to the prompt can be scored; None if one can. Raises TooSlow."""
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
    """Return a score for each answer, or the reason why it has none."""
    if isinstance(rule, Judge):
        return _judge_scores(rule, prompts, answers, stopping)
    found: list[float | str] = []
    slow_s = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        try:
            found.append(score(rule, prompt, answer))
        except TooSlow as slow:
            slow_s += slow.limit_s
            # the answers that are left would take as long, and the evaluation must end
            if slow_s >= SLOW_S:
                reason = f"given up: {slow}, at {round(slow_s / slow.limit_s)} answers"
                return [reason] * len(answers)
            found.append(str(slow))
        except Unscored as reason:
            found.append(str(reason))
    return found


def _judge_scores(
    rule: Judge, prompts: Sequence[Prompt], answers: Sequence[str], stopping: Callable[[], bool]
) -> list[float | str]:
    found: list[float | str] = [_lacking(rule, prompt) or "" for prompt in prompts]
    asked = [number for number, reason in enumerate(found) if not reason]
    try:
        scores = judge_answers(
            rule, [prompts[i] for i in asked], [answers[i] for i in asked], stopping
        )
    except Unreachable as error:
        return [str(error)] * len(answers)
    for number, value in zip(asked, scores, strict=True):
        found[number] = "the judge's reply ends in no verdict" if value is None else value
    return found


def _most_common(reasons: Counter[str]) -> str:
    return reasons.most_common(1)[0][0]
