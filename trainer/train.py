"""One training run, from the recipe to the summary. Read it from top to bottom.

recipe -> run folder -> tokenizer -> data (no process group yet) -> plan
       -> process group -> model -> packing check -> engine -> loop -> summary
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from packhorse.trainer import dist, run_folder
from packhorse.trainer.attention_choice import choose_attention
from packhorse.trainer.build_engine import (
    be_deterministic,
    build_engine,
    explain_out_of_memory,
    memory_dry_run,
    open_metrics,
    require_same_data,
    require_same_micro_batch,
    resolve_checkpointing,
    resolve_micro_batch,
    resolve_sequence,
)
from packhorse.trainer.checkpoint import checkpoint
from packhorse.trainer.checkpoint.best import Best, final_step
from packhorse.trainer.checkpoint.export_folder import describe
from packhorse.trainer.checkpoint.hf_export import save_description
from packhorse.trainer.checkpoint.hub import check_push, push_run
from packhorse.trainer.checkpoint.manifest import RunState
from packhorse.trainer.checkpoint.mirror import Mirror, open_mirror
from packhorse.trainer.checkpoint.saver import Saver, name_and_prune
from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.data.batch_plan import Plan
from packhorse.trainer.data.loader import Loader
from packhorse.trainer.data.prepare import (
    Prepared,
    TrainData,
    documents_of,
    masker_of,
    train_plan,
)
from packhorse.trainer.data.streaming import prepare_data
from packhorse.trainer.datatypes import BadInput, StepPlan
from packhorse.trainer.engine.engine import Engine
from packhorse.trainer.engine.optim import learning_rate
from packhorse.trainer.eval.evaluator import Evaluation
from packhorse.trainer.eval.generate import stop_tokens
from packhorse.trainer.eval.server_answers import check_server
from packhorse.trainer.guard import Guard, StepNotApplied
from packhorse.trainer.hang_watchdog import Watch
from packhorse.trainer.loop import Outcome, TrainingRun, is_due, train_loop
from packhorse.trainer.metrics import EVALUATIONS, Metrics, Profiler
from packhorse.trainer.model.load import load_tokenizer
from packhorse.trainer.stop_flag import StopFlag
from packhorse.trainer.trackers import Trackers, open_trackers
from packhorse.trainer.utils.files import sync_file
from packhorse.trainer.utils.lease import owned
from packhorse.trainer.utils.log_lines import LOGS
from packhorse.trainer.utils.numa import bind_to_numa_node
from packhorse.trainer.utils.progress import Progress
from packhorse.trainer.utils.staged_build import Stopped


def train(recipe: Recipe, *, extend: bool = False) -> None:
    """Train the recipe's model, from the last checkpoint of its run folder. Every rank calls it.

    Args:
        extend: allow the recipe to have more epochs or steps than the run in its folder.

    Raises:
        BadInput: the recipe, its data or its run folder cannot be used.
        StepNotApplied: a step was not applied, and the guard's rule is to stop.
    """
    dist.start_logging()
    stop = StopFlag()
    run_dir = Path(recipe.run.dir)
    recipe = resolve_micro_batch(recipe, run_dir)
    if dist.is_main():
        stop_in_time(recipe, stop)
        run_folder.require_same_run(recipe, run_dir, extend=extend)
    with owned(run_dir) if dist.is_main() else nullcontext():
        mirror: Mirror | None = None
        if dist.is_main():
            mirror = open_mirror(recipe, run_dir)
            run_folder.open_run_folder(recipe, run_dir, extend=extend)
            check_server(recipe)
            if recipe.run.push_to_hub:
                check_push(recipe.run.push_to_hub)
        with (
            dist.saved_log(run_dir / run_folder.LOG_FILE),
            open_trackers(recipe, run_dir) as trackers,
        ):
            prepare_and_fit(recipe, run_dir, stop, mirror, trackers)


def prepare_and_fit(
    recipe: Recipe, run_dir: Path, stop: StopFlag, mirror: Mirror | None, trackers: Trackers
) -> None:
    """Prepare the data, then train in a process group. Every rank calls it."""
    tokenizer = load_tokenizer(recipe.model)
    # No process group yet: preparation may take longer than any collective's time-out (C10).
    try:
        train_data, eval_data = prepare_data(recipe, tokenizer, stop.raised_early)
        plan = train_plan(recipe, train_data, stop.raised_early)
        if not stop.wait_for_ranks():
            raise Stopped("stopped before all ranks were ready")
    except Stopped:
        run_folder.write_stop(run_dir, 0)
        return
    # not earlier: rank 0 prepares the data on all cores
    if bound := bind_to_numa_node(dist.local_rank(), dist.local_world_size()):
        dist.log.info("ranks are bound to cores: rank 0 to %s", bound)
    with dist.process_group():
        stop.attach_group()
        given = (recipe, run_dir, tokenizer, train_data, plan, eval_data, stop, trackers, mirror)
        fit(PreparedRun(*given))
    # not in the group, where the other ranks would wait in vain
    if dist.is_main():
        steps = final_step(recipe.eval, run_dir, plan.steps)
        done = run_folder.is_done(run_dir, steps)
        if mirror:
            mirror.finish(is_done=done)
        if done and recipe.run.push_to_hub:
            push_run(run_dir, recipe.run.push_to_hub, steps)


@dataclass(frozen=True)
class PreparedRun:
    """What each rank has before the process group exists."""

    recipe: Recipe
    run_dir: Path
    tokenizer: Any
    train_data: TrainData
    plan: Plan
    eval_data: Prepared | None
    stop: StopFlag
    trackers: Trackers
    mirror: Mirror | None = None  # rank 0's


def fit(prepared: PreparedRun) -> None:
    """Build the engine and train to the end of the plan, again after each rollback.

    Raises:
        BadInput: the ranks see different folders or data, or the model does not fit into memory.
        StepNotApplied: a step was not applied, and no checkpoint exists to roll back to.
    """
    recipe, run_dir = prepared.recipe, prepared.run_dir
    run_folder.require_shared(run_dir)
    if recipe.train.deterministic:
        be_deterministic()
    if dist.local_world_size() < dist.world_size():
        mib, gb_per_s = dist.all_reduce_speed()
        world = dist.world_size()
        dist.log.info("all-reduce over %d ranks, %.0f MiB: %.2f GB/s", world, mib, gb_per_s)
    require_same_micro_batch(recipe)
    require_same_data(prepared.train_data, prepared.eval_data)
    recipe = resolve_sequence(recipe, prepared.plan)
    parallel = recipe.parallel
    given = (dist.world_size(), parallel.allow_idle_ranks, parallel.ranks_a_sequence)
    if warning := prepared.plan.check_world(*given):
        dist.log.warning(warning)
    recipe = resolve_checkpointing(recipe, prepared.plan)
    recipe = choose_attention(recipe, prepared.plan, run_dir)
    prepared = replace(prepared, recipe=recipe)
    with explain_out_of_memory("the model with its training state"):
        engine = build_engine(recipe, run_dir, prepared.tokenizer)
    with Watch(recipe.guard, run_dir) as watch:
        while train_from_checkpoint(prepared, engine, watch) == "rollback":
            if checkpoint.find(run_dir) is None:
                raise StepNotApplied(
                    "guard: no checkpoint exists to roll back to; run the same command again to "
                    "start from the beginning without this step, and set checkpoint.every_steps"
                )


def train_from_checkpoint(
    prepared: PreparedRun, engine: Engine, watch: Watch
) -> Literal["ended", "rollback"]:
    """Load the last checkpoint, train, evaluate and write the summary.

    Returns "rollback" where the guard asks to train from the last checkpoint once more.
    """
    recipe, run_dir, plan = prepared.recipe, prepared.run_dir, prepared.plan
    first_step, recent_losses = resume(prepared, engine)
    if has_ended(prepared, first_step):
        dist.log.info("%s: all %d steps are done; set another run.dir", run_dir, first_step)
        if dist.is_main():
            dist.log.info(run_folder.describe_end(recipe, run_dir))
        return "ended"

    guard = Guard(recipe.guard, run_dir, recent_losses)
    place = (dist.rank(), dist.world_size(), dist.device().type == "cuda")
    loader = Loader(prepared.train_data, plan, *place, *recipe.parallel.cut)
    peak_bytes = memory_dry_run(recipe, engine, loader, first_step)
    metrics = open_metrics(recipe, run_dir, engine, watch, first_step, prepared.trackers)
    best = Best(recipe.eval, run_dir)
    evaluate = build_evaluation(prepared, engine, metrics, watch, best)
    # A resumed run repeats an evaluation only if it was stopped before its end.
    due = first_step == 0 or is_due(first_step, recipe.eval.every_steps)
    if due and not evaluate(first_step):
        run_folder.write_stop(run_dir, first_step)
        return "ended"

    log_schedule(prepared, first_step)
    if peak_bytes:
        metrics.expect_memory(peak_bytes)
    description = describe(run_dir, recipe) if dist.is_main() else None
    parts = (run_dir, engine, recipe.checkpoint, prepared.mirror, description)
    with loader, Saver(*parts) as saver:
        run = TrainingRun(
            recipe=recipe,
            engine=engine,
            loader=loader,
            guard=guard,
            metrics=metrics,
            profiler=Profiler(recipe.run.profile_steps, run_dir),
            progress=Progress(plan.steps, first_step),
            stop=prepared.stop,
            watch=watch,
            first_step=first_step,
            evaluate=evaluate,
            save=partial(save, prepared, saver, engine, guard, best),
            is_best=lambda step: step == best.step,
            ends_early=lambda step: step == best.early_end,
            describe_rows=partial(describe_rows, prepared),
            trace=partial(run_folder.write_trace, run_dir, engine) if recipe.run.trace else None,
        )
        outcome = train_loop(run)
    run.progress.close()
    conclude(prepared, run, best, outcome)
    watch.pause()
    metrics.close()
    return "rollback" if outcome.end == "rollback" else "ended"


def has_ended(prepared: PreparedRun, step: int) -> bool:
    """Return whether the run's last step is done. Every rank calls it; rank 0 reads, as other nodes
    may see an older state of a shared file system."""
    recipe, run_dir = prepared.recipe, prepared.run_dir
    ended = dist.is_main() and step == final_step(recipe.eval, run_dir, prepared.plan.steps)
    return dist.broadcast(ended and run_folder.is_done(run_dir, step))


def conclude(prepared: PreparedRun, run: TrainingRun, best: Best, outcome: Outcome) -> None:
    """Evaluate the last step, and write the summary of a run that is done, or that it stopped."""
    run_dir, metrics = prepared.run_dir, run.metrics
    if outcome.end == "stopped" or (outcome.end == "done" and not run.evaluate(outcome.step)):
        run_folder.write_stop(run_dir, outcome.step)
    elif outcome.end in ("done", "early") and dist.is_main():
        if outcome.end == "early":
            dist.log.info("eval.early_stopping ends the run after step %d", outcome.step)
        # The last evaluation may have chosen the last step as the best.
        root, keep = run_dir / "checkpoints", prepared.recipe.checkpoint.keep
        name_and_prune(root, outcome.step, best.step, keep, prepared.mirror)
        speed, skipped = metrics.tokens_per_s, len(run.guard.skipped_steps)
        rest_s = metrics.clock.read()  # the last checkpoint and evaluation
        run_folder.write_summary(run_dir, outcome.step, speed, skipped, rest_s, best.summary())
        dist.log.info(run_folder.describe_end(prepared.recipe, run_dir))


def build_evaluation(
    prepared: PreparedRun, engine: Engine, metrics: Metrics, watch: Watch, best: Best
) -> Evaluation:
    """Build the evaluation, and write the run folder's description of model and data."""
    recipe, run_dir, model = prepared.recipe, prepared.run_dir, engine.module.model
    masker = masker_of(recipe.data, prepared.tokenizer)
    model.generation_config.eos_token_id = stop_tokens(model, masker.stop_token_ids)
    eval_data, stop = prepared.eval_data, prepared.stop
    if dist.is_main():
        train_data, plan = prepared.train_data, prepared.plan
        run_folder.write_description(recipe, run_dir, train_data, plan, eval_data, metrics)
        save_description(model, prepared.tokenizer, recipe.model, run_dir)
    if recipe.eval.lm_eval:
        dist.log.info("eval.lm_eval is not run in training: `packhorse eval %s RECIPE`", run_dir)
    return Evaluation(recipe, run_dir, engine, eval_data, masker, metrics, stop, watch, best.update)


def log_schedule(prepared: PreparedRun, first_step: int) -> None:
    """Log the steps ahead, the packing fill, and the learning rate at its turning points."""
    plan = prepared.plan
    optim, last = prepared.recipe.optim, plan.steps - 1
    # the rate is the highest where the warm-up ends; there may be too many steps to look at each
    warmed_up = min(max(first_step, math.ceil(optim.warmup_ratio * plan.steps) - 1), last)
    turns = sorted({step for step in (first_step, warmed_up, last) if first_step <= step <= last})
    rates = {step: learning_rate(step, plan.steps, optim) for step in turns}
    fill = plan.fill(plan.step(min(first_step, plan.steps - 1)).epoch)
    dist.log.info(
        "%s: steps %d to %d, sequences %.1f%% full, %d ranks; learning rate %s",
        *(prepared.run_dir, first_step + 1, plan.steps, 100 * fill, dist.world_size()),
        ", ".join(f"{rates[step]:.1e} at step {step + 1}" for step in turns),
    )


def stop_in_time(recipe: Recipe, stop: StopFlag) -> None:
    """Raise the stop flag after `train.max_hours`, and `checkpoint.before_timeout_s` before the end
    of the Slurm job.
    """
    if recipe.train.max_hours is not None:
        stop.raise_at(time.time() + 3600 * recipe.train.max_hours)
    before_s, end_s = recipe.checkpoint.before_timeout_s, os.environ.get("SLURM_JOB_END_TIME")
    if before_s is not None and end_s is not None:
        if not re.fullmatch("[0-9]{1,18}", end_s):
            raise BadInput(f"the environment variable SLURM_JOB_END_TIME is {end_s!r}, no time")
        stop.raise_at(float(end_s) - before_s)


# ------------------------------------------------------------------------------------- save, resume


def save(
    prepared: PreparedRun, saver: Saver, engine: Engine, guard: Guard, best: Best, step: int
) -> None:
    """Publish a checkpoint of the first `step` steps of the plan."""
    state = RunState(
        step=step,
        updates=guard.applied(step),
        data=prepared.train_data.fingerprint_at(step),
        micro_batch_size=prepared.recipe.batch.micro,
        recent_losses=guard.recent_losses,
        world_size=dist.world_size(),
        stage=engine.stage,
    )
    if dist.is_main():
        for name in (EVALUATIONS, *LOGS):  # a power cut must not take what a checkpoint follows
            sync_file(prepared.run_dir / name)
    saver.save(state, best.step)


def resume(prepared: PreparedRun, engine: Engine) -> tuple[int, Sequence[float]]:
    """Load the newest complete checkpoint, written by any world size and ZeRO stage (C8).

    Returns:
        The number of steps that it holds, 0 without a checkpoint, and their last losses.
    """
    found = checkpoint.find(prepared.run_dir)
    if found is None:
        return 0, ()
    folder, manifest = found
    state, micro_batch_size = manifest.state, prepared.recipe.batch.micro
    data = prepared.train_data.fingerprint_at(state.step)
    checkpoint.require_same_run(state, data, micro_batch_size, engine.module.is_random)
    checkpoint.restore(folder, manifest, engine)
    dist.log.info(
        "resuming from %s, written by %d ranks at ZeRO stage %d; every digest agrees",
        *(folder, state.world_size, state.stage),
    )
    if prepared.mirror:  # an earlier start may have ended before this checkpoint was copied
        prepared.mirror.offer(state.step)
    return state.step, state.recent_losses


def describe_rows(prepared: PreparedRun, step: StepPlan) -> str:
    """Name the first 20 rows of a step as `file:row`."""
    places = documents_of(prepared.plan, step, prepared.train_data)
    rest = " ..." if len(places) > 20 else ""
    return ", ".join(f"{file}:{row}" for file, row in places[:20]) + rest
