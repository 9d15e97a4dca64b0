"""Make the tables of docs/experiments.md from run folders.

Arms are compared prompt by prompt: all answer the same prompts, and a prompt's score is its mean
over the seeds. Intervals and tests are over the prompts.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from catalogue import EXPERIMENTS, Experiment, Run, runs

from packhorse.trainer.config.recipe import Recipe, load_recipe
from packhorse.trainer.eval.confidence import interval, paired
from packhorse.trainer.utils.json_lines import read_json_lines

FORMAT, ANSWER = "format_accuracy", "answer_accuracy"
CLEAR = 0.01  # p below which a difference counts: about a dozen comparisons are made
SHOWN = {  # columns of an experiment's table, after the arm
    1: ("answers", "against", "format", "spread", "peak", "loss"),
    2: ("answers", "against", "format"),  # without the loss: its tokens differ between the arms
    3: ("answers", "against", "format", "loss", "rows"),
    4: ("answers", "against", "format", "loss"),
    6: ("answers", "against", "format", "loss", "speed", "memory"),
}


# -------------------------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class Result:
    """A finished run, read from its folder."""

    folder: Path

    @cached_property
    def _lines(self) -> list[dict[str, Any]]:
        return read_json_lines(self.folder / "metrics.jsonl")

    @cached_property
    def recipe(self) -> Recipe:
        return load_recipe(self.folder / "recipe.yaml")

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The log lines of optimizer steps."""
        return [line for line in self._lines if "train/loss" in line]

    @property
    def losses(self) -> dict[int, float]:
        """Steps done -> held-out loss."""
        return {line["step"]: line["eval/loss"] for line in self._lines if "eval/loss" in line}

    @property
    def last(self) -> int:
        return max(self.losses)

    @cached_property
    def _scores(self) -> dict[int, dict[str, dict[str, float]]]:
        found: dict[int, dict[str, dict[str, float]]] = {}
        # after a kill an evaluation is repeated: the last one counts
        for sample in read_json_lines(self.folder / "samples.jsonl"):
            found.setdefault(sample["step"], {})[sample["prompt"]] = sample["scores"]
        return found

    def scores(self, scorer: str, step: int | None = None) -> dict[str, float]:
        """Return prompt -> score, after `step` steps or at the end."""
        found = self._scores[self.last if step is None else step]
        return {prompt: float(scores[scorer]) for prompt, scores in found.items()}

    @property
    def norms(self) -> list[float]:
        """Gradient norms before clipping, without the warm-up."""
        warm = math.ceil(self.recipe.optim.warmup_ratio * len(self.steps))
        return [line["train/grad_norm"] for line in self.steps[warm:]]

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second, padding not counted, without the first step, which warms up."""
        lines = self.steps[1:]
        return sum(line["perf/tokens_per_s"] * line["perf/step_s"] for line in lines) / sum(
            line["perf/step_s"] for line in lines
        )


# --------------------------------------------------------------------------------------------- arms


def _by_prompt(results: Sequence[Result], scorer: str) -> dict[str, float]:
    """Return prompt -> mean score over the seeds."""
    each = [result.scores(scorer) for result in results]
    return {prompt: statistics.mean(scores[prompt] for scores in each) for prompt in each[0]}


def _share(scores: Mapping[str, float]) -> str:
    """Return a mean and its interval, as `61.7% (53.1 to 69.7)`."""
    low, high = interval(list(scores.values()))
    return f"{statistics.mean(scores.values()):.1%} ({100 * low:.1f} to {100 * high:.1f})"


def _each(values: Sequence[float], form: str) -> str:
    """Return the seeds' values, one after the other."""
    return ", ".join(form.format(value) for value in values)


def against(
    scores: Mapping[str, float], others: Mapping[str, float], *, agreed: bool = True
) -> str:
    """Return by how many points `scores` exceed `others`, its interval, p and a verdict.

    Args:
        agreed: the seeds agree which is better.
    """
    points, low, high, p = paired(list(others.values()), [scores[prompt] for prompt in others])
    verdict = (
        "no difference seen" if p >= CLEAR or not agreed else "better" if points > 0 else "worse"
    )
    return (
        f"{100 * points:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}), p {p:.2g}: {verdict}"
    )


def _against_first(results: Sequence[Result], first: Sequence[Result]) -> str:
    pairs = zip(results, first, strict=True)
    gains = [
        sum(result.scores(ANSWER).values()) - sum(other.scores(ANSWER).values())
        for result, other in pairs
    ]
    agreed = all(gain > 0 for gain in gains) or all(gain < 0 for gain in gains)
    return against(_by_prompt(results, ANSWER), _by_prompt(first, ANSWER), agreed=agreed)


HEADS = {
    "answers": "right answers",
    "against": "against the first",
    "format": "in the format",
    "spread": "gradient norm: deviation / mean",
    "peak": "highest / median",
    "loss": "held-out loss",
    "rows": "rows trained on",
    "speed": "tokens/s",
    "memory": "peak memory, GiB",
}


def _cell(column: str, results: Sequence[Result], first: Sequence[Result]) -> str:
    """Return one cell of the table.

    Args:
        results: of the arm, one for each seed.
        first: of the first arm.
    """
    if column in ("answers", "format"):
        scorer = ANSWER if column == "answers" else FORMAT
        seeds = [statistics.mean(result.scores(scorer).values()) for result in results]
        shown = _share(_by_prompt(results, scorer))
        return shown if len(seeds) == 1 else f"{shown}: {_each(seeds, '{:.1%}')}"
    if column == "against":
        return "" if results is first else _against_first(results, first)
    if column == "spread":
        return _each(
            [statistics.stdev(r.norms) / statistics.mean(r.norms) for r in results], "{:.3f}"
        )
    if column == "peak":
        return _each([max(r.norms) / statistics.median(r.norms) for r in results], "{:.2f}")
    if column == "loss":
        return _each([r.losses[r.last] for r in results], "{:.4f}")
    if column == "rows":
        train = json.loads((results[0].folder / "data.json").read_text(encoding="utf-8"))["train"]
        return str(train["documents"])
    if column == "speed":
        return _each([r.tokens_per_s for r in results], "{:.0f}")
    assert column == "memory"
    key = "mem/gpu_peak_gib" if "mem/gpu_peak_gib" in results[0].steps[-1] else "mem/host_peak_gib"
    return _each([max(line[key] for line in r.steps) for r in results], "{:.1f}")


# -------------------------------------------------------------------------------------- experiments


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def _of_arms(number: int, experiment: Experiment, results: Mapping[str, Sequence[Result]]) -> str:
    first = results[experiment.arms[0]]
    rows = [
        [f"`{arm}`", *(_cell(column, results[arm], first) for column in SHOWN[number])]
        for arm in experiment.arms
    ]
    n = len(first[0].scores(ANSWER))
    seeds = " " + "Each seed's value stands beside the other's, of shares behind the colon." * (
        len(first) > 1
    )
    footer = f"{n} prompts.{seeds}".rstrip()
    return table(["arm", *(HEADS[column] for column in SHOWN[number])], rows) + "\n\n" + footer


def _of_packing(results: Mapping[str, Sequence[Result]]) -> str:
    rows = []
    for arm, (result,) in results.items():
        (packed,) = results[arm.replace("alone", "packed")]
        differences = [
            max(
                abs(a[key] - b[key]) / abs(b[key])
                for a, b in zip(result.steps, packed.steps, strict=True)
            )
            for key in ("train/loss", "train/grad_norm")
        ]
        fill = statistics.mean(line["pack/fill"] for line in result.steps)
        apart = (
            ["", ""] if result is packed else [f"{difference:.1e}" for difference in differences]
        )
        loss = [f"{result.steps[0]['train/loss']:.6f}", f"{result.steps[-1]['train/loss']:.6f}"]
        rows.append([f"`{arm}`", f"{result.tokens_per_s:.0f}", *loss, *apart, f"{fill:.1%}"])
    head = [
        "arm",
        "tokens/s",
        "first loss",
        "last loss",
        "losses differ by",
        "gradient norms by",
        "fill",
    ]
    return table(head, rows)


def _of_choice(result: Result) -> str:
    """Return the table of checkpoints, chosen by loss and by metric.

    One half of the prompts chooses and the other judges, because the best of many noisy numbers is
    partly luck.
    """
    steps = [step for step in sorted(result.losses) if step]
    choosing, judging = (
        set(list(result.scores(ANSWER))[::2]),
        set(list(result.scores(ANSWER))[1::2]),
    )

    def halves(step: int) -> tuple[dict[str, float], dict[str, float]]:
        scores = result.scores(ANSWER, step)
        return {p: scores[p] for p in scores if p in choosing}, {
            p: scores[p] for p in scores if p in judging
        }

    by_loss = min(steps, key=lambda step: result.losses[step])
    by_metric = max(steps, key=lambda step: (sum(halves(step)[0].values()), -result.losses[step]))
    marks = {by_loss: "lowest loss", by_metric: "best metric"}
    if by_loss == by_metric:
        marks = {by_loss: "lowest loss, best metric"}
    rows = [
        [str(step), f"{result.losses[step]:.4f}", *map(_share, halves(step)), marks.get(step, "")]
        for step in steps
    ]
    head = [
        "step",
        "held-out loss",
        "right answers, half that chooses",
        "half that judges",
        "chosen by",
    ]
    if by_loss == by_metric:
        summary = "Both rules choose the same checkpoint."
    else:
        gain = against(halves(by_metric)[1], halves(by_loss)[1])
        summary = (
            f"On the half that judges, the one chosen by metric against the one chosen by loss: "
            f"{gain}."
        )
    return table(head, rows) + "\n\n" + summary


def block(number: int, out: Path) -> str:
    """Return the table of an experiment, or how many of its runs are done."""
    experiment = EXPERIMENTS[number]
    wanted = runs([number])
    done = [run for run in wanted if (out / run.name / "summary.json").exists()]
    if len(done) < len(wanted):
        return f"Not run yet: {len(done)} of its {len(wanted)} runs are done."
    results = {
        arm: [Result(out / Run(arm, seed).name) for seed in experiment.seeds]
        for arm in experiment.arms
    }
    if number == 5:
        return _of_packing(results)
    if number == 7:
        return "\n\n".join(f"`{arm}`\n\n{_of_choice(result)}" for arm, (result,) in results.items())
    return _of_arms(number, experiment, results)


def fill(page: str, blocks: Mapping[str, str]) -> str:
    """Return the page with the text between `<!-- NAME -->` and `<!-- end -->` replaced."""
    for name, text in blocks.items():
        place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(\n?<!-- end -->)", re.DOTALL)
        page, count = place.subn(lambda found, text=text: f"{found[1]}{text}\n<!-- end -->", page)
        assert count == 1, f"the page has no place for {name}"
    return page
