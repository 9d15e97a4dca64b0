"""The loop: step, measure, evaluate, save, stop.

In: everything built by train.py. Out: the step it stopped at, and whether that is the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trainer import dist
from trainer.config.recipe import Recipe
from trainer.data.loader import Loader
from trainer.datatypes import Batch, StepPlan, StepResult
from trainer.engine.engine import Engine
from trainer.engine.optim import learning_rate
from trainer.guard import Guard
from trainer.hang_watchdog import Watch
from trainer.metrics import Metrics, Profiler
from trainer.utils.progress import Progress


@dataclass(frozen=True)
class Outcome:
    """Where the loop left the plan, and why: its end, a stop (saved), or a step that asks for the
    last checkpoint.
    """

    step: int
    end: Literal["done", "stopped", "rollback"]


def run(
    recipe: Recipe,
    engine: Engine,
    loader: Loader,
    guard: Guard,
    metrics: Metrics,
    profiler: Profiler,
    progress: Progress,
    stop: dist.StopFlag,
    watch: Watch,
    *,
    first_step: int,
    evaluate: Callable[[int], bool],
    save: Callable[[int], None],
    is_best: Callable[[int], bool],
    rows_of: Callable[[StepPlan], str],
    trace: Callable[[int, list[Batch], StepResult], None] | None,
) -> Outcome:
    """Take the plan's steps from `first_step` on.

    Args:
        evaluate: evaluates after so many steps; False where the stop flag ended it.
        save: saves a checkpoint after so many steps.
        is_best: whether an evaluation has found the model after so many steps to be the best so
            far.
        rows_of: names the rows of a step, for the message where it is not applied.
        trace: writes down what an applied step was made of.

    Raises:
        StepNotApplied: a step went wrong, and by the guard's rule the run stops (C12).
    """
    plan, steps = loader.plan, loader.plan.steps
    check_loss = guard.check_loss if guard.looks_at_losses else None
    for index in range(first_step, steps):
        done = index + 1
        watch.beat(f"step {done}")
        stop.start()
        if index not in guard.skipped_steps:
            profiler.before(index)
            metrics.begin_step()
            with metrics.clock.part("data", host=True):
                batches = loader.step(index)
            lr = learning_rate(index, steps, recipe.optim)
            result = engine.step(batches, lr, metrics.clock, check_loss)
            if result.skipped is None:
                line = metrics.step(plan.step(index), result, batches, lr)
                progress.step(done, line)
                if trace:
                    trace(done, batches, result)
            elif guard.decide(done, result.skipped, rows_of(plan.step(index))) == "rollback":
                stop.agreed()
                return Outcome(index, "rollback")
            profiler.after(index)

        stopping = stop.agreed() or done == recipe.run.stop_after
        last = done == steps
        if is_due(done, recipe.eval.every_steps) and not last and not stopping:
            stopping = not evaluate(done)
        if last or stopping or is_due(done, recipe.checkpoint.every_steps) or is_best(done):
            with metrics.clock.part("checkpoint", host=True):
                watch.pause()
                save(done)
        if stopping and not last:
            return Outcome(done, "stopped")
    return Outcome(steps, "done")


def is_due(step: int, every: int | None) -> bool:
    """Whether after so many steps it is time for what is done `every` so many steps."""
    return every is not None and step % every == 0
