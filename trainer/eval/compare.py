"""Compare two evaluations: each metric with its interval, the difference, and a paired test.

Folders with evaluations.jsonl and samples.jsonl enter, of a run or of `packhorse eval`; tables
leave. Samples are paired by their prompts, so that questions which are hard for both models do not
blur the difference.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from packhorse.trainer.checkpoint.best import best_step, evaluations
from packhorse.trainer.config.best import EVAL_LOSS
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.eval.confidence import Difference, paired
from packhorse.trainer.metrics import EVALUATIONS
from packhorse.trainer.utils.files import read_json_file
from packhorse.trainer.utils.json_lines import read_json_lines
from packhorse.trainer.utils.log_lines import check_pair, check_scores
from packhorse.trainer.utils.tables import plain_cell, shorten_path, terminal_width

if TYPE_CHECKING:
    from rich.table import Table

# of lm-evaluation-harness: its metrics as in a line of evaluations.jsonl, and its samples
HARNESS_METRICS, HARNESS_SAMPLES = "lm_eval.json", "lm_eval.jsonl"
# least share of the larger side's prompts that both answered; below it they were asked other things
SHARED = 0.9

Scores = dict[tuple[str, int], float]
"""(prompt, its number among equal prompts) -> score."""


class Results(NamedTuple):
    """One evaluation."""

    name: str
    step: int
    eval_loss: float
    # value, count, low, high; or no value, and why it is missing
    metrics: dict[str, dict[str, Any]]
    scores: dict[str, Scores]  # by metric, of the samples that could be scored
    held_out: str  # hash of the held-out rows' tokens
    tokenizer: str  # hash


def read_results(place: str) -> Results:
    """Read an evaluation by its folder, as `runs/a`, `runs/a@200` or `runs/a@best`; without a step
    the last one.

    Raises:
        BadInput: the folder holds no evaluation, or none of that step.
    """
    name, step = place, ""
    if not Path(place).expanduser().is_dir():
        name, _, step = place.rpartition("@")
    folder = Path(name).expanduser()
    if not name or not folder.is_dir():
        raise BadInput(
            f"{place}: there is no such folder; give a run folder or results of packhorse eval"
        )
    lines = evaluations(folder)
    if not lines:
        raise BadInput(
            f"{folder}: nothing was evaluated there (it has no {EVALUATIONS}); run packhorse eval"
        )
    if step and step != "best" and not step.isdigit():
        raise BadInput(f"{place}: after the @ comes a step, or best")
    at = best_step(folder) if step == "best" else int(step) if step else max(lines)
    if at not in lines:
        raise BadInput(
            f"{folder}: step {at} was not evaluated; those that were: {', '.join(map(str, lines))}"
        )
    if not {"held_out", "tokenizer"} <= lines[at].keys():
        raise BadInput(
            f"{folder}: the evaluation of step {at} was written by an earlier version: run "
            "packhorse eval"
        )
    metrics = dict(lines[at]["metrics"])
    samples = [
        line
        for line in read_json_lines(folder / "samples.jsonl", skip_damaged=True, check=check_pair)
        if line.get("step") == at
    ]
    if (folder / HARNESS_METRICS).is_file():
        of_harness = read_json_file(folder / HARNESS_METRICS)
        try:
            check_scores(of_harness)
        except (LookupError, TypeError) as error:
            raise BadInput(f"{folder / HARNESS_METRICS}: damaged ({error})") from None
        metrics |= of_harness
        samples += read_json_lines(folder / HARNESS_SAMPLES, skip_damaged=True, check=check_pair)
    return Results(
        name=f"{name} at step {at}",
        step=at,
        eval_loss=lines[at]["eval_loss"],
        metrics=metrics,
        scores=_scores(samples),
        held_out=lines[at]["held_out"],
        tokenizer=lines[at]["tokenizer"],
    )


def _scores(samples: list[dict[str, Any]]) -> dict[str, Scores]:
    found: dict[str, Scores] = {}
    seen: Counter[str] = Counter()
    for sample in samples:
        key = sample["prompt"], seen[sample["prompt"]]
        seen[sample["prompt"]] += 1
        for name, score in sample["scores"].items():
            if score is not None:
                found.setdefault(name, {})[key] = float(score)
    return found


def require_comparable(a: Results, b: Results) -> None:
    """Raise BadInput if they were not evaluated on the same held-out rows, in the same tokens."""
    if a.held_out == b.held_out:
        return
    if a.tokenizer != b.tokenizer:
        raise BadInput(
            f"{a.name} and {b.name}: their tokenizers or chat templates differ, and losses over "
            "other tokens cannot be compared"
        )
    raise BadInput(
        f"{a.name} and {b.name}: their held-out rows differ, or which tokens of them count; "
        "evaluate both with the same recipe: packhorse eval RUN RECIPE"
    )


def difference(a: Results, b: Results, name: str) -> tuple[Difference, int] | None:
    """Return B less A in one metric, and the number of prompts that both answered; None if one side
    has no scored samples.

    Raises:
        BadInput: the two were asked different prompts.
    """
    left, right = a.scores.get(name, {}), b.scores.get(name, {})
    both = [key for key in left if key in right]
    most = max(len(left), len(right))
    if not left or not right:
        return None
    if len(both) < SHARED * most:
        raise BadInput(
            f"{name}: {a.name} and {b.name} have {len(both)} prompts in common, of {len(left)} and "
            f"{len(right)}: they were asked other questions; evaluate both with the same recipe"
        )
    return paired([left[key] for key in both], [right[key] for key in both]), len(both)


# ------------------------------------------------------------------------------------------- tables


def table_of_one(results: Results) -> Table:
    """Return a table of each metric with its count and 95% interval."""
    from rich.table import Table

    table = Table("metric", "value", "95% interval", "count", title=_short(results.name))
    table.add_row(EVAL_LOSS, f"{results.eval_loss:.4f}", "", "")
    for name, metric in results.metrics.items():
        interval = _interval(metric.get("low"), metric.get("high"))
        table.add_row(plain_cell(name), _value(metric), interval, str(metric["count"]))
    return table


def table_of_two(a: Results, b: Results) -> Table:
    """Return a table of each metric of A and B, and of B less A over the prompts of both; raise
    BadInput if they cannot be compared."""
    from rich.table import Table

    require_comparable(a, b)
    heads = ("metric", "A", "B", "B - A", "95% interval", "p", "prompts")
    table = Table(*heads, title=f"A: {_short(a.name)}\nB: {_short(b.name)}")
    less = b.eval_loss - a.eval_loss
    table.add_row(EVAL_LOSS, f"{a.eval_loss:.4f}", f"{b.eval_loss:.4f}", f"{less:+.4f}", "", "", "")
    for name in dict.fromkeys([*a.metrics, *b.metrics]):
        shown = [_with_interval(results.metrics.get(name)) for results in (a, b)]
        found = difference(a, b, name)
        if found is None:
            table.add_row(plain_cell(name), *shown, "", "", "", "")
            continue
        test, prompts = found
        p = "< 0.001" if test.p < 0.001 else f"{test.p:.3f}"
        table.add_row(
            plain_cell(name),
            *shown,
            f"{test.value:+.3f}",
            _interval(test.low, test.high, "+"),
            p,
            str(prompts),
        )
    return table


def _short(name: str) -> str:
    return plain_cell(shorten_path(name, terminal_width() - len("A: ")))


def _value(metric: dict[str, Any]) -> str:
    if metric["value"] is None:
        return plain_cell(f"missing: {metric.get('missing', '')}")
    return f"{metric['value']:.3f}"


def _interval(low: float | None, high: float | None, sign: str = "") -> str:
    return "" if low is None or high is None else f"{low:{sign}.3f} to {high:{sign}.3f}"


def _with_interval(metric: dict[str, Any] | None) -> str:
    if metric is None:
        return "not measured"
    interval = _interval(metric.get("low"), metric.get("high"))
    return _value(metric) + (f" ({interval})" if interval else "")
