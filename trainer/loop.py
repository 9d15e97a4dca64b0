"""The training loop on one screen: step, measure, evaluate, save, stop.

In: a `TrainingRun`, whose parts train.py builds. Out: the step at which the loop stopped, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.data.loader import Loader
from packhorse.trainer.datatypes import Batch, StepPlan, StepResult
from packhorse.trainer.engine.engine import Engine
from packhorse.trainer.engine.optim import learning_rate
from packhorse.trainer.guard import Guard
from packhorse.trainer.hang_watchdog import Watch
from packhorse.trainer.metrics import Metrics, Profiler
from packhorse.trainer.stop_flag import StopFlag
from packhorse.trainer.utils.progress import Progress


@dataclass(frozen=True)
class TrainingRun:
    """Everything that the loop works with. Steps given to the functions count from 1."""

    recipe: Recipe
    engine: Engine
    loader: Loader
    guard: Guard
    metrics: Metrics
    profiler: Profiler
    progress: Progress
    stop: StopFlag
    watch: Watch
    first_step: int  # steps that the checkpoint holds
    evaluate: Callable[[int], bool]  # False if the stop flag ended the evaluation
    save: Callable[[int], None]
    is_best: Callable[[int], bool]  # whether an evaluation chose this step as the best so far
    ends_early: Callable[[int], bool]  # whether evaluations up to this step say that it is enough
    describe_rows: Callable[[StepPlan], str]  # for the message about a step that is not applied
    trace: Callable[[int, list[Batch], StepResult], None] | None  # records each applied step


@dataclass(frozen=True)
class Outcome:
    """The number of steps taken, and why the loop ended.

    `stopped`: by the stop flag, after a save. `rollback`: the guard asks for the last checkpoint.
    `early`: evaluations no longer improve; the last one was of this step, which is saved.
    """

    step: int
    end: Literal["done", "early", "stopped", "rollback"]


def train_loop(run: TrainingRun) -> Outcome:
    """Take the steps of the plan from `run.first_step` on. Every rank calls it.

    Raises StepNotApplied if a step went wrong and the guard's rule is to stop (C12).
    """
    recipe, guard, metrics = run.recipe, run.guard, run.metrics
    plan, steps = run.loader.plan, run.loader.plan.steps
    if run.ends_early(run.first_step):  # killed before its end was written down
        return Outcome(run.first_step, "early")
    check_loss = guard.check_loss if guard.looks_at_losses else None
    for index in range(run.first_step, steps):
        done = index + 1
        run.watch.beat(f"step {done}")
        # The ranks' vote on stopping travels while the step computes, so that no GPU waits (C9).
        run.stop.start()
        if index not in guard.skipped_steps:
            run.profiler.before(index)
            metrics.begin_step()
            with metrics.clock.part("data", host=True):
                batches = run.loader.step(index)
            lr = learning_rate(index, steps, recipe.optim)
            result = run.engine.step(batches, lr, metrics.clock, check_loss)
            if result.skipped is None:
                line = metrics.step(plan.step(index), result, batches, lr)
                run.progress.step(done, line)
                if run.trace:
                    run.trace(done, batches, result)
            else:
                rows = run.describe_rows(plan.step(index))
                if guard.decide(done, result.skipped, rows) == "rollback":
                    # The vote that was started must be read on every rank before the loop is left.
                    run.stop.agreed()
                    return Outcome(index, "rollback")
            run.profiler.after(index)

        stopping = run.stop.agreed() or done == recipe.run.stop_after
        last = done == steps
        save_due = last or stopping or is_due(done, recipe.checkpoint.every_steps)
        if save_due:
            _save(run, done)
        # After the save: an evaluation asks servers and users' functions, and may fail. The last
        # step is evaluated after the loop.
        if is_due(done, recipe.eval.every_steps) and not last and not stopping:
            stopping = not run.evaluate(done)
            is_enough = not stopping and run.ends_early(done)
            if stopping or is_enough or run.is_best(done):
                _save(run, done)
            if is_enough:
                return Outcome(done, "early")
        if stopping and not last:
            return Outcome(done, "stopped")
    return Outcome(steps, "done")


def _save(run: TrainingRun, step: int) -> None:
    with run.metrics.clock.part("checkpoint", host=True):
        run.watch.pause()
        run.save(step)


def is_due(step: int, every: int | None) -> bool:
    """Return whether something done every `every` steps is due after `step` steps."""
    return every is not None and step % every == 0
