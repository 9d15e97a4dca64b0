"""Put the answers of several runs to the same held-out prompts side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from packhorse.trainer.report.runs import Run
from packhorse.trainer.utils.json_lines import read_json_lines
from packhorse.trainer.utils.log_lines import check_sample

SHOWN = 12  # prompts, the first ones: no choice of ours makes a run look better


class Compared(NamedTuple):
    """The answers to `len(prompts)` of `total` prompts."""

    total: int
    prompts: list[dict[str, Any]]  # prompt, reference, answers: of `columns`, None if it has none
    columns: list[tuple[int, int]]  # run, step


Key = tuple[str, int]
"""A prompt, and its number among equal prompts."""


def compare_samples(runs: Sequence[Run]) -> Compared | None:
    """Return the answers at each run's last evaluated step, after those of the first run's first
    evaluation; None if no run has answered prompts."""
    found: dict[tuple[int, int], dict[Key, dict[str, Any]]] = {}
    for number, run in enumerate(runs):
        by_step = _by_step(run)
        first = list(by_step)[: number == 0]  # the untrained model's, of the first run alone
        for step in sorted({*first, *list(by_step)[-1:]}):
            found[number, step] = by_step[step]
    if not found:
        return None
    keys = list(dict.fromkeys(key for samples in found.values() for key in samples))
    prompts = []
    for key in keys[:SHOWN]:
        answers = [samples.get(key) for samples in found.values()]
        reference = next(answer["reference"] for answer in answers if answer)
        prompts.append({"prompt": key[0], "reference": reference, "answers": answers})
    return Compared(len(keys), prompts, list(found))


def _by_step(run: Run) -> dict[int, dict[Key, dict[str, Any]]]:
    """Return a run's samples of each finished evaluation, in the steps' order."""
    by_step: dict[int, dict[Key, dict[str, Any]]] = {}
    seen: Counter[tuple[int, str]] = Counter()
    path = run.folder / "samples.jsonl"
    for sample in read_json_lines(path, skip_damaged=True, check=check_sample):
        step, prompt = sample["step"], sample["prompt"]
        if step in run.evaluations:
            by_step.setdefault(step, {})[prompt, seen[step, prompt]] = sample
            seen[step, prompt] += 1
    return dict(sorted(by_step.items()))
