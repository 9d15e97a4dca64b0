"""A run, from the recipe to the summary. Read it from top to bottom.

recipe -> run folder -> tokenizer -> data (no process group yet) -> plan
       -> process group -> model -> probe -> engine -> loop -> summary
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trainer import dist
from trainer.checkpoint import checkpoint
from trainer.checkpoint.best import Best
from trainer.checkpoint.checkpoint import RunState, Saver
from trainer.checkpoint.hf_export import save_description
from trainer.config.recipe import OptimSection, Recipe
from trainer.data.batch_plan import Plan
from trainer.data.leakage import check_leakage
from trainer.data.loader import Loader
from trainer.data.prepare import Prepared, TrainData, documents_of, masker_of, prepare, train_plan
from trainer.data.streaming import prepare_train
from trainer.datatypes import BadInput, StepPlan
from trainer.engine.ds_config import clear_nvme, deepspeed_config, stage
from trainer.engine.engine import Engine, gathered, sharded_init
from trainer.engine.optim import learning_rate, parameter_groups
from trainer.estimate.report import predicted
from trainer.eval.evaluator import Evaluation
from trainer.eval.generate import stop_tokens
from trainer.eval.vllm_server import check_generator
from trainer.guard import Guard, StepNotApplied
from trainer.hang_watchdog import Watch
from trainer.loop import is_due, run
from trainer.metrics import Metrics, Profiler, model_flops
from trainer.model.load import load_config, load_model, load_tokenizer
from trainer.model.lora import require_stage
from trainer.model.packing_check import probe
from trainer.model.sft import SftModel
from trainer.run_folder import (
    describe,
    is_done,
    open_run_folder,
    require_shared,
    summarise,
    write_stop,
    write_trace,
)
from trainer.utils.files import Stopped
from trainer.utils.progress import Progress


def train(recipe: Recipe, *, extend: bool = False) -> None:
    """Train what the recipe says, from its run folder's last checkpoint on. One call a rank.

    Args:
        extend: the run folder's run may be one of fewer epochs or steps.

    Raises:
        BadInput: the recipe, its data or its run folder cannot be used.
        StepNotApplied: an update was not finite.
    """
    dist.start_logging()
    stop = dist.StopFlag()
    if dist.is_main():
        stop_in_time(recipe, stop)
    run_dir = Path(recipe.run.dir)
    if dist.is_main():
        open_run_folder(recipe, run_dir, extend=extend)
        check_generator(recipe)
    tokenizer = load_tokenizer(recipe.model)
    try:
        train_data = prepare_train(recipe, tokenizer, stop.raised_early)
        plan = train_plan(recipe, train_data, stop.raised_early)
        eval_data = (
            prepare(recipe, tokenizer, "eval", stop.raised_early) if recipe.has_eval else None
        )
        if eval_data and isinstance(
            train_data, Prepared
        ):  # where it grows, each shard is looked at when it is prepared
            eval_data = check_leakage(recipe, tokenizer, train_data, eval_data, stop.raised_early)
        if not stop.wait_for_ranks():
            raise Stopped("stopped before the ranks had met")
    except Stopped:
        write_stop(run_dir, 0)
        return
    with dist.process_group():
        stop.attach_group()
        fit(Job(recipe, run_dir, tokenizer, train_data, plan, eval_data, stop))


@dataclass(frozen=True)
class Job:
    """What is there before the ranks meet."""

    recipe: Recipe
    run_dir: Path
    tokenizer: Any
    train_data: TrainData
    plan: Plan
    eval_data: Prepared | None
    stop: dist.StopFlag


def fit(job: Job) -> None:
    """Everything that needs the process group: model, engine, loop, summary."""
    require_shared(job.run_dir)
    if dist.local_world_size() < dist.world_size():
        dist.log.info(
            "all-reduce over %d ranks, %.0f MiB: %.2f GB/s",
            dist.world_size(),
            *dist.all_reduce_speed(),
        )
    require_same_data(job.train_data, job.eval_data)
    warning = job.plan.check_world(dist.world_size(), job.recipe.parallel.allow_idle_ranks)
    if warning:
        dist.log.warning(warning)
    with out_of_memory_told("the model with its training state"):
        engine = build_engine(job.recipe, job.run_dir, job.tokenizer)
    while train_from_checkpoint(job, engine):
        if checkpoint.find(job.run_dir) is None:
            raise StepNotApplied(
                "guard: there is no checkpoint to go back to; the same command starts from the "
                "beginning, without the "
                "step; set checkpoint.every_steps"
            )


REHEARSED_ON = (
    "cuda",
)  # devices whose memory runs out in the middle of a run; elsewhere it would only cost time


def memory_dry_run(engine: Engine, loader: Loader, first_step: int) -> tuple[int, int]:
    """Run the fullest micro-batches of the plan, so that a GPU too small for them says so now.

    Returns:
        The most tokens and the most trained tokens of one.

    Raises:
        BadInput: they do not fit.
    """
    batches = loader.fullest(first_step)
    tokens, trained = (
        max(batch.tokens for batch in batches),
        max(batch.trained_tokens for batch in batches),
    )
    with out_of_memory_told(
        f"the fullest micro-batch of the run ({tokens:,} tokens, {trained:,} trained)"
    ):
        engine.memory_dry_run(batches)
    dist.log.info(
        "rehearsed the fullest micro-batch: %d tokens, %d of them trained, fit", tokens, trained
    )
    return tokens, trained


@contextmanager
def out_of_memory_told(what: str) -> Iterator[None]:
    """A GPU that has no room for `what` is bad input, and the sentence says what takes less."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise BadInput(
            f"{what} does not fit into the memory of rank {dist.rank()}'s GPU: lower "
            f"batch.micro_batch_size or "
            "batch.seq_len, set model.activation_checkpointing=full, take more GPUs or a template "
            "of ds_configs/ that shards or "
            "offloads more; `packhorse plan` says which one fits"
        ) from None


def train_from_checkpoint(job: Job, engine: Engine) -> bool:
    """Train from the last checkpoint on. True where the guard asks for just that once more."""
    recipe, run_dir, plan = job.recipe, job.run_dir, job.plan
    first_step, recent_losses = resume(job, engine)
    if first_step == plan.steps and is_done(run_dir, plan.steps):
        dist.log.info(
            "%s: all %d steps are done; give another run.dir for another run", run_dir, plan.steps
        )
        return False

    guard = Guard(recipe.guard, run_dir, recent_losses)
    watch = Watch(recipe.guard, run_dir)
    loader = Loader(
        job.train_data, plan, dist.rank(), dist.world_size(), pin=dist.device().type == "cuda"
    )
    # where states lie on an NVMe it is not yet proved that a rehearsal leaves no trace
    rehearses = dist.device().type in REHEARSED_ON and not engine.swaps and first_step < plan.steps
    fullest = memory_dry_run(engine, loader, first_step) if rehearses else None
    metrics = Metrics(
        run_dir,
        log_every=recipe.run.log_every,
        seq_len=recipe.batch.seq_len,
        flops=model_flops(engine.module.model),
        resumed_at=first_step,
        beat=watch.beat,
    )
    best = Best(recipe.eval.best, run_dir)
    evaluation = evaluation_of(job, engine, metrics, watch, best)
    due = first_step == 0 or is_due(first_step, recipe.eval.every_steps)
    if due and not evaluation(first_step):  # made already, unless this step's was stopped half-way
        write_stop(run_dir, first_step)
        return False

    say_what_is_ahead(job, first_step)
    if (
        fullest
        and dist.is_main()
        and dist.device().type == "cuda"
        and (expected := predicted(recipe, *fullest))
    ):
        metrics.predict(expected)
    progress = Progress(plan.steps, first_step)
    with loader, Saver(run_dir, engine, recipe.checkpoint) as saver:
        outcome = run(
            recipe,
            engine,
            loader,
            guard,
            metrics,
            Profiler(recipe.profile, run_dir),
            progress,
            job.stop,
            watch,
            first_step=first_step,
            evaluate=evaluation,
            save=partial(save, job, saver, engine, guard, best),
            is_best=lambda step: step == best.step,
            rows_of=lambda step: _rows_of(plan, step, job.train_data),
            trace=partial(write_trace, run_dir, engine) if recipe.run.trace else None,
        )
    progress.close()
    if outcome.end == "rollback":
        metrics.close()
        return True
    if outcome.end == "stopped" or not evaluation(outcome.step):
        write_stop(run_dir, outcome.step)
        return False
    if dist.is_main():
        checkpoint.point_at_best(run_dir / "checkpoints", best.step)  # it may be the last one
        summarise(
            run_dir, plan.steps, metrics.tokens_per_s, len(guard.skipped_steps), best.summary()
        )
    metrics.close()
    return False


def evaluation_of(
    job: Job, engine: Engine, metrics: Metrics, watch: Watch, best: Best
) -> Evaluation:
    """What evaluates the run; beside it, what the run folder says of the model and the data."""
    recipe, model = job.recipe, engine.module.model
    masker = masker_of(recipe.data, job.tokenizer)
    model.generation_config.eos_token_id = stop_tokens(model, masker.stop_token_ids)
    if dist.is_main():
        describe(recipe, job.run_dir, job.train_data, job.plan, job.eval_data, metrics)
        save_description(model, job.tokenizer, job.run_dir)
    if recipe.eval.lm_eval:
        dist.log.info(
            "eval.lm_eval: its tasks are run by `packhorse eval %s RECIPE`, not in training",
            job.run_dir,
        )
    return Evaluation(
        recipe, job.run_dir, engine, job.eval_data, masker, metrics, job.stop, watch, best.look
    )


def say_what_is_ahead(job: Job, first_step: int) -> None:
    """Steps, fill, ranks and learning rates, as a line of the log."""
    plan = job.plan
    epoch = plan.step(min(first_step, plan.steps - 1)).epoch
    dist.log.info(
        "%s: steps %d to %d, %.1f%% filled rows, %d ranks; learning rate %s",
        job.run_dir, first_step + 1, plan.steps, 100 * plan.fill(epoch), dist.world_size(),
        schedule(first_step, plan.steps, job.recipe.optim),
    )  # fmt: skip


def schedule(first_step: int, steps: int, optim: OptimSection) -> str:
    """The learning rates ahead, as `1.0e-05 at step 1, 2.0e-05 at step 10, 2.0e-06 at step 100`."""
    rates = {step: learning_rate(step, steps, optim) for step in range(first_step, steps)}
    highest = max(rates, key=lambda step: rates[step], default=first_step)
    return ", ".join(
        f"{rates[step]:.1e} at step {step + 1}"
        for step in sorted({first_step, highest, steps - 1} & set(rates))
    )


def stop_in_time(recipe: Recipe, stop: dist.StopFlag) -> None:
    """Raise the stop flag so long before the end of the Slurm job as the recipe asks for, where
    Slurm tells it.
    """
    before_s, end_s = recipe.checkpoint.before_timeout_s, os.environ.get("SLURM_JOB_END_TIME")
    if before_s is not None and end_s is not None:
        stop.raise_at(float(end_s) - before_s)


def build_engine(recipe: Recipe, run_dir: Path, tokenizer: Any, *, learns: bool = True) -> Engine:
    """The model with its loss, loaded in shards where the stage is 3, under DeepSpeed, and proved
    (C4).

    Args:
        learns: False builds no optimizer, nor what it would keep.
    """
    hidden_size = load_config(recipe.model).get_text_config().hidden_size
    ds_config = deepspeed_config(recipe.parallel, recipe.model, recipe.optim, hidden_size, run_dir)
    require_stage(recipe.adapter, stage(ds_config))
    clear_nvme(ds_config)
    model = load_model(
        recipe.model,
        tokenizer,
        seed=recipe.train.seed,
        adapter=recipe.adapter,
        sharded_init=partial(sharded_init, ds_config),
        gathered=gathered,
    )
    module = SftModel(model, recipe.loss, recipe.train.seed, dist.device())
    groups = parameter_groups(module, recipe.optim) if learns else None
    engine = Engine(module, groups, recipe.optim, ds_config)
    prove(recipe, module)
    return engine


def prove(recipe: Recipe, module: SftModel) -> None:
    """The start-up probe, on the loaded model, through the backend that it will train with."""
    one_document = recipe.data.packing == "none" and recipe.batch.micro_batch_size == 1
    proof = probe(
        module, seq_len=recipe.batch.seq_len, one_document=one_document, seed=recipe.train.seed
    )
    dist.log.info(
        "probe: documents of %s tokens, packed against apart: hidden states differ by %.1e, the "
        "loss by %.1e",
        ", ".join(map(str, proof.lengths)), proof.hidden_difference, proof.loss_difference,
    )  # fmt: skip


def require_same_data(*prepared: TrainData | None) -> None:
    """Raises BadInput where a rank's cache, which may be its node's own, holds other documents than
    rank 0's.
    """
    prints = dist.gather([data.fingerprint_at(1) for data in prepared if data])
    others = [rank for rank, theirs in enumerate(prints) if theirs != prints[0]]
    if others:
        raise BadInput(
            f"ranks {others} tokenized other data than rank 0: the nodes see other files under the "
            f"same path, or have "
            "other versions of the tokenizer; make them alike, or put data.cache on a shared folder"
        )


# ------------------------------------------------------------------------------------- save, resume


def save(job: Job, saver: Saver, engine: Engine, guard: Guard, best: Best, step: int) -> None:
    """Publish a checkpoint after the first `step` steps of the plan."""
    saver.save(
        RunState(
            step=step,
            updates=guard.applied(step),
            data=job.train_data.fingerprint_at(step),
            micro_batch_size=job.recipe.batch.micro_batch_size,
            recent_losses=guard.recent_losses,
            world_size=dist.world_size(),
            stage=engine.stage,
        ),
        best.step,
    )


def resume(job: Job, engine: Engine) -> tuple[int, Sequence[float]]:
    """Load the newest whole checkpoint, of whatever world; returns the steps that it holds, 0 where
    there is none, and the last of their losses."""
    found = checkpoint.find(job.run_dir)
    if found is None:
        return 0, ()
    folder, manifest = found
    state, micro_batch_size = manifest.state, job.recipe.batch.micro_batch_size
    data = job.train_data.fingerprint_at(state.step)
    checkpoint.require_same_run(state, data, micro_batch_size, engine.module.has_dropout)
    checkpoint.restore(folder, manifest, engine)
    dist.log.info(
        "resuming from %s, written by %d ranks at ZeRO stage %d; every digest agrees",
        folder, state.world_size, state.stage,
    )  # fmt: skip
    return state.step, state.recent_losses


def _rows_of(plan: Plan, step: StepPlan, data: TrainData) -> str:
    """The rows of a step as `file:row`, the first few of them."""
    names = documents_of(plan, step, data)
    return ", ".join(f"{file}:{row}" for file, row in names[:20]) + (
        " ..." if len(names) > 20 else ""
    )
