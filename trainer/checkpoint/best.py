"""Find the best evaluated step of a run by the recipe's eval.best rule.

In: the lines of evaluations.jsonl, the rule. Out: best.json, with the rule, the step, and every
candidate with its metrics. No state is kept between starts but evaluations.jsonl: best.json is only
a report, and whoever needs the step computes it anew.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from packhorse.trainer import dist
from packhorse.trainer.config.best import EVAL_LOSS, BestSection, EarlyStoppingSection
from packhorse.trainer.config.eval import EvalSection
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.metrics import EVALUATIONS
from packhorse.trainer.utils.files import write_json
from packhorse.trainer.utils.json_lines import read_json_lines
from packhorse.trainer.utils.log_lines import check_evaluation


def evaluations(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the lines of a folder's evaluations.jsonl by step, in order."""
    # a run that is still writing may have left half a line
    lines = read_json_lines(folder / EVALUATIONS, skip_damaged=True, check=check_evaluation)
    return {line["step"]: line for line in sorted(lines, key=lambda line: line["step"])}


def numbers(line: dict[str, Any]) -> dict[str, float | None]:
    """Return an evaluation's numbers by the names that rules use; None for one that is missing."""
    metrics = {name: metric["value"] for name, metric in line["metrics"].items()}
    return {EVAL_LOSS: line["eval_loss"], **metrics}


def reject_reason(rule: BestSection, line: dict[str, Any]) -> str | None:
    """Return why the evaluated step cannot be the best one, or None if it can."""
    values = numbers(line)
    for name in rule.places.values():
        value = values.get(name)
        if value is None or not math.isfinite(value):
            return f"{name} is missing" if value is None else f"{name} is {value}"
    for name, condition in rule.conditions.items():
        value = values[name]
        assert value is not None, "checked above"
        if not condition.holds(value):
            return f"{name} is {value:.4g}, not {rule.subject_to[name]}"
    return None


def choose(rule: BestSection, lines: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Return the content of best.json: rule, best step or None, and all candidates in order.

    Every evaluated step is a candidate but 0: the untrained model has no checkpoint.
    """
    candidates = []
    for step, line in lines.items():
        if step > 0:
            reason = reject_reason(rule, line)
            refused = {} if reason is None else {"why_not": reason}
            candidates.append({**line, "meets": reason is None, **refused})

    def rank_key(candidate: dict[str, Any]) -> tuple[float, float, int]:
        values = numbers(candidate)
        aim, tie = values[rule.metric], values[rule.tie] if rule.tie else 0.0
        assert aim is not None, "such a candidate does not meet the rule"
        assert tie is not None
        # at last, the earlier step
        return (
            -aim if rule.metric == EVAL_LOSS else aim,
            -tie if rule.tie == EVAL_LOSS else tie,
            -candidate["step"],
        )

    best = max((c for c in candidates if c["meets"]), key=rank_key, default=None)
    rules = rule.model_dump(exclude_defaults=True)
    return {"rule": rules, "step": best["step"] if best else None, "candidates": candidates}


def early_end(rule: EarlyStoppingSection | None, lines: dict[int, dict[str, Any]]) -> int | None:
    """Return the evaluated step at which the run ends early, or None if it goes on.

    A missing value is no better than another, but does not end a run that has no best step yet.
    """
    if rule is None:
        return None
    steps = [step for step in lines if step > 0]
    seen = {step: lines[step] for step in steps}
    best = choose(BestSection(metric=rule.metric), seen)["step"]
    # the last evaluation decides: a rule that is new in a resumed run ends no step of the past
    ended = best is not None and len(steps) - 1 - steps.index(best) >= rule.patience
    return steps[-1] if ended else None


def final_step(section: EvalSection, run_dir: Path, steps: int) -> int:
    """Return the step at which a run ends, by what is known yet: its early end, or `steps`."""
    return early_end(section.early_stopping, evaluations(run_dir)) or steps


def best_step(run_dir: Path) -> int:
    """Return the best step of a run by the rule of its recipe. Without one it raises BadInput."""
    if not (run_dir / "recipe.yaml").is_file():
        raise BadInput(f"{run_dir}: not a run folder (it has no recipe.yaml)")
    rule = load_recipe(run_dir / "recipe.yaml").eval.best
    if rule is None:
        raise BadInput(
            f"{run_dir}: its recipe has no eval.best, the rule for what is best; give --step, or "
            "take the last checkpoint"
        )
    found = choose(rule, evaluations(run_dir))
    if found["step"] is None:
        raise BadInput(
            f"{run_dir}: there is no best checkpoint: {_explain_none(found)}; give --step to take "
            "one all the same"
        )
    return found["step"]


def _explain_none(found: dict[str, Any]) -> str:
    if not found["candidates"]:
        return "no step was evaluated yet"
    return "; ".join(f"step {c['step']}: {c['why_not']}" for c in found["candidates"][-3:])


class Best:
    """The best step so far, and the step of an early end, on every rank. Only rank 0 reads and
    writes files.

    Build it after Metrics, which drops the lines of steps after the checkpoint: a killed run or the
    guard's rollback leaves those, and they are trained again.
    """

    def __init__(self, section: EvalSection, run_dir: Path) -> None:
        rule = section.best
        self._rule, self._early, self._run_dir = rule, section.early_stopping, run_dir
        self.early_end: int | None = None
        self.found: dict[str, Any] = {"step": None}
        if rule is None and dist.is_main():
            (run_dir / "best.json").unlink(missing_ok=True)  # of a rule that was removed
        self.update()

    @property
    def step(self) -> int | None:
        return self.found["step"]

    def update(self) -> None:
        """Find the best step again, after an evaluation. Every rank calls it."""
        if self._early:
            lines = evaluations(self._run_dir) if dist.is_main() else {}
            self.early_end = dist.broadcast(early_end(self._early, lines))
        if self._rule is None:
            return
        before = self.step
        if dist.is_main():
            self.found = choose(self._rule, evaluations(self._run_dir))
            write_json(self._run_dir / "best.json", self.found)
        self.found = dist.broadcast(self.found)
        if self.step != before:
            dist.log.info("the best step so far is %s, by %s", self.step, self._rule)

    def summary(self) -> dict[str, Any] | None:
        """Return the step, the rule and the metrics for summary.json, or why there is no step."""
        if self._rule is None:
            return None
        if self.step is None:
            return {"step": None, "rule": str(self._rule), "why": _explain_none(self.found)}
        line = next(c for c in self.found["candidates"] if c["step"] == self.step)
        return {"step": self.step, "rule": str(self._rule), "metrics": numbers(line)}
