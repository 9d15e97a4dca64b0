"""The loop: step, measure, evaluate, save, stop.

In: everything built by train.py. Out: the step it stopped at, and whether that is the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainer import dist
from trainer.config import Recipe
from trainer.data.loader import Loader
from trainer.engine import Engine
from trainer.flow import StepPlan
from trainer.metrics import Metrics, Profiler
from trainer.optim import learning_rate
from trainer.progress import Progress


@dataclass(frozen=True)
class Outcome:
    """`step` updates are applied and saved; `stopped` where a signal ended the run before its last step."""

    step: int
    stopped: bool


class StepNotApplied(RuntimeError):
    """An update was not finite, so it was not applied; the message names the step's rows."""


def run(
    recipe: Recipe,
    engine: Engine,
    loader: Loader,
    metrics: Metrics,
    profiler: Profiler,
    progress: Progress,
    stop: dist.StopFlag,
    *,
    first_step: int,
    evaluate: Callable[[int], bool],
    save: Callable[[int], None],
    rows_of: Callable[[StepPlan], str],
) -> Outcome:
    """Take the plan's steps from `first_step` on.

    Args:
        evaluate: evaluates after so many steps; False where the stop flag ended it.
        save: saves a checkpoint after so many steps.
        rows_of: names the rows of a step, for the message where it is not applied.

    Raises:
        StepNotApplied: the gradient norm of a step was not finite (C12).
    """
    plan, steps = loader.plan, loader.plan.steps
    for index in range(first_step, steps):
        done = index + 1
        stop.start()
        profiler.before(index)
        metrics.begin_step()
        with metrics.clock.part("data", host=True):
            batches = loader.step(index)
        lr = learning_rate(index, steps, recipe.optim)
        result = engine.step(batches, lr, metrics.clock)
        if result.skipped:
            rows = rows_of(plan.step(index))
            raise StepNotApplied(f"step {done} was not applied: {result.skipped}; its rows: {rows}")
        line = metrics.step(plan.step(index), result, batches, lr)
        profiler.after(index)
        progress.step(done, line)

        stopping = stop.agreed()
        last = done == steps
        if _due(done, recipe.eval.every_steps) and not last and not stopping:
            stopping = not evaluate(done)
        if last or stopping or _due(done, recipe.checkpoint.every_steps):
            with metrics.clock.part("checkpoint", host=True):
                save(done)
        if stopping and not last:
            return Outcome(done, stopped=True)
    return Outcome(steps, stopped=False)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
