"""A run, from the recipe to the summary. Read it from top to bottom.

recipe -> run folder -> tokenizer -> data (no process group yet) -> plan
       -> process group -> model -> probe -> engine -> loop -> summary
"""

from __future__ import annotations

import json
import platform
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trainer import __version__, checkpoint, config, dist
from trainer.checkpoint import RunState
from trainer.config import Recipe
from trainer.data.loader import Loader, Prepared, documents_of, eval_plan, held_out_prompts, prepare, train_plan
from trainer.data.mask import Masker
from trainer.data.plan import Plan
from trainer.engine import Engine, clear_nvme, deepspeed_config, gathered, sharded_init
from trainer.evaluate import accuracies, generate, held_out_loss, write_samples
from trainer.export import save_description
from trainer.flow import STOP_FILE, BadInput, Prompt, StepPlan
from trainer.loop import run
from trainer.metrics import Metrics, Profiler, model_flops, read_lines
from trainer.model.load import load_config, load_model, load_tokenizer
from trainer.model.probe import probe
from trainer.model.sft import SftModel
from trainer.once import Stopped
from trainer.optim import parameter_groups
from trainer.progress import Progress


def train(recipe: Recipe) -> None:
    """Train what the recipe says, from its run folder's last checkpoint on. One call a rank.

    Raises:
        BadInput: the recipe, its data or its run folder cannot be used.
        StepNotApplied: an update was not finite.
    """
    dist.start_logging()
    stop = dist.StopFlag()
    run_dir = Path(recipe.run.dir)
    if dist.is_main():
        open_run_folder(recipe, run_dir)
    tokenizer = load_tokenizer(recipe.model)
    try:
        train_data = prepare(recipe, tokenizer, "train", lambda: stop.raised)
        plan = train_plan(recipe, train_data, lambda: stop.raised)
        eval_data = prepare(recipe, tokenizer, "eval", lambda: stop.raised) if recipe.data.eval else None
    except Stopped:
        _write_json(run_dir / STOP_FILE, {"step": 0})
        return
    with dist.process_group():
        stop.join()
        fit(recipe, run_dir, tokenizer, train_data, plan, eval_data, stop)


def fit(
    recipe: Recipe,
    run_dir: Path,
    tokenizer: Any,
    train_data: Prepared,
    plan: Plan,
    eval_data: Prepared | None,
    stop: dist.StopFlag,
) -> None:
    """Everything that needs the process group: model, engine, loop, summary."""
    require_same_data(train_data, eval_data)
    warning = plan.check_world(dist.world_size(), recipe.parallel.allow_idle_ranks)
    if warning:
        dist.log.warning(warning)

    engine = build_engine(recipe, run_dir, tokenizer)
    model: Any = engine.module.model
    first_step = resume(run_dir, engine, train_data)
    if first_step == plan.steps and (run_dir / "summary.json").is_file():
        dist.log.info("%s: all %d steps are done; give another run.dir for another run", run_dir, plan.steps)
        return

    loader = Loader(train_data, plan, dist.rank(), dist.world_size(), pin=dist.device().type == "cuda")
    metrics = Metrics(
        run_dir,
        log_every=recipe.run.log_every,
        row_tokens=recipe.batch.row_tokens,
        flops=model_flops(model),
        resumed_at=first_step,
        steps=plan.steps,
    )
    masker = Masker(tokenizer, recipe.data.train_on, recipe.data.train_on_eot)
    model.generation_config.eos_token_id = sorted(masker.stop_token_ids)  # what was learned to end an answer
    if dist.is_main():
        describe(recipe, run_dir, train_data, eval_data, metrics)
        save_description(model, tokenizer, run_dir)
    evaluation = Evaluation(recipe, run_dir, engine, eval_data, masker, metrics, stop)
    if first_step == 0 and not evaluation(0):
        return _stopped(run_dir, 0)

    dist.log.info(
        "%s: steps %d to %d, %.1f%% filled rows, %d ranks",
        run_dir, first_step + 1, plan.steps, 100 * plan.fill(), dist.world_size(),
    )  # fmt: skip
    progress = Progress(plan.steps, first_step)
    outcome = run(
        recipe,
        engine,
        loader,
        metrics,
        Profiler(recipe.profile, run_dir),
        progress,
        stop,
        first_step=first_step,
        evaluate=evaluation,
        save=partial(save, run_dir, engine, train_data, recipe.checkpoint.keep),
        rows_of=lambda step: _rows_of(plan, step, train_data),
    )
    progress.close()
    if outcome.stopped or not evaluation(outcome.step):
        return _stopped(run_dir, outcome.step)
    if dist.is_main():
        summarise(run_dir, plan.steps, metrics.tokens_per_s)
    metrics.close()
    loader.close()
    return None


def build_engine(recipe: Recipe, run_dir: Path, tokenizer: Any) -> Engine:
    """The model with its loss, loaded in shards where the stage is 3, under DeepSpeed, and proved (C4)."""
    hidden_size = load_config(recipe.model).get_text_config().hidden_size
    ds_config = deepspeed_config(recipe.parallel, recipe.model, recipe.optim, hidden_size, run_dir)
    clear_nvme(ds_config)
    model = load_model(
        recipe.model,
        tokenizer,
        seed=recipe.train.seed,
        sharded_init=partial(sharded_init, ds_config),
        gathered=gathered,
    )
    module = SftModel(model, recipe.loss, recipe.train.seed, dist.device())
    engine = Engine(module, parameter_groups(module, recipe.optim), recipe.optim, ds_config)
    prove(recipe, module)
    return engine


def prove(recipe: Recipe, module: SftModel) -> None:
    """The start-up probe, on the loaded model, through the backend that it will train with."""
    one_document = recipe.data.packing == "none" and recipe.batch.rows_per_micro == 1
    proof = probe(module, row_tokens=recipe.batch.row_tokens, one_document=one_document, seed=recipe.train.seed)
    dist.log.info(
        "probe: documents of %s tokens, packed against apart: hidden states differ by %.1e, the loss by %.1e",
        ", ".join(map(str, proof.lengths)), proof.hidden_difference, proof.loss_difference,
    )  # fmt: skip


def require_same_data(*prepared: Prepared | None) -> None:
    """Raises BadInput where a rank's cache, which may be its node's own, holds other documents than rank 0's."""
    prints = dist.gather([data.fingerprint for data in prepared if data])
    others = [rank for rank, theirs in enumerate(prints) if theirs != prints[0]]
    if others:
        raise BadInput(
            f"ranks {others} tokenised other data than rank 0: the nodes see other files under the same path, or have "
            "other versions of the tokenizer; make them alike, or put data.cache on a shared folder"
        )


# ----------------------------------------------------------------------------------------------- the run folder


def open_run_folder(recipe: Recipe, run_dir: Path) -> None:
    """Make the folder and save the resolved recipe; a folder with checkpoints must be this recipe's.

    Raises:
        BadInput: the folder holds a run of another recipe (C8), or cannot be written.
    """
    saved = run_dir / "recipe.yaml"
    if saved.is_file() and any((run_dir / "checkpoints").glob("step-*")):
        before, now = config.load(saved).fixed(), recipe.fixed()
        changed = [key for key in now if now[key] != before.get(key)]
        if changed:
            shown = "; ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in changed)
            raise BadInput(f"{run_dir} holds a run of another recipe: {shown}; give another run.dir, or set them back")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        saved.write_text(recipe.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"run.dir: {run_dir} cannot be written ({error})") from None


def describe(recipe: Recipe, run_dir: Path, train_data: Prepared, eval_data: Prepared | None, metrics: Metrics) -> None:
    """environment.json, data.json, and the recipe as text in TensorBoard."""
    packages = ("torch", "deepspeed", "transformers", "datasets", "tokenizers")
    _write_json(
        run_dir / "environment.json",
        {
            "packhorse": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": {name: version(name) for name in packages},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            "world_size": dist.world_size(),
        },
    )
    reports = {"train": train_data.report, **({"eval": eval_data.report} if eval_data else {})}
    _write_json(run_dir / "data.json", reports)
    rows = "\n".join(f"| {key} | {value} |" for key, value in recipe.fixed().items())
    metrics.text("recipe", f"| key | value |\n|---|---|\n{rows}")


def summarise(run_dir: Path, steps: int, tokens_per_s: float) -> None:
    """summary.json: the numbers before and after, read back from the log, and one sample."""
    evaluated = {line["step"]: line for line in read_lines(run_dir / "metrics.jsonl") if "eval/loss" in line}
    numbers = {at: {k: v for k, v in line.items() if k.startswith("eval/")} for at, line in evaluated.items()}
    of_last = [sample for sample in read_lines(run_dir / "samples.jsonl") if sample["step"] == steps]
    _write_json(
        run_dir / "summary.json",
        {
            "before": numbers.get(0, {}),
            "after": numbers.get(steps, {}),
            "steps": steps,
            "tokens_per_s": tokens_per_s,
            "sample": of_last[0] if of_last else None,
            "versions": json.loads((run_dir / "environment.json").read_text())["packages"],
        },
    )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _stopped(run_dir: Path, step: int) -> None:
    """The launcher reads this and ends with 75: run me again."""
    if dist.is_main():
        _write_json(run_dir / STOP_FILE, {"step": step})
        dist.log.info("stopped after step %d on request; the same command goes on from there", step)


# ----------------------------------------------------------------------------------------------- save, resume, evaluate


def save(run_dir: Path, engine: Engine, data: Prepared, keep: int, step: int) -> None:
    """Publish a checkpoint of `step` applied steps."""
    state = RunState(step=step, world_size=dist.world_size(), stage=engine.stage, data=data.fingerprint)
    checkpoint.publish(run_dir, state, engine.save, keep=keep, bytes_needed=engine.state_bytes())


def resume(run_dir: Path, engine: Engine, data: Prepared) -> int:
    """Load the newest whole checkpoint; returns the steps it holds, 0 where there is none."""
    found = dist.broadcast(checkpoint.find(run_dir) if dist.is_main() else None)
    if found is None:
        return 0
    folder, state = found
    checkpoint.require_same_run(state, dist.world_size(), engine.stage, data.fingerprint)
    engine.load(folder)
    dist.log.info("resuming from %s", folder)
    return state.step


class Evaluation:
    """Called with the number of applied steps: evaluates, logs, and says whether it ran to its end."""

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        engine: Engine,
        data: Prepared | None,
        masker: Masker,
        metrics: Metrics,
        stop: dist.StopFlag,
    ) -> None:
        self._engine, self._tokenizer, self._metrics, self._stop = engine, masker.tokenizer, metrics, stop
        self._generate = recipe.eval.generate
        self._samples = run_dir / "samples.jsonl"
        self._loader: Loader | None = None
        self._prompts: list[Prompt] = []
        if data is not None:
            self._loader = Loader(data, eval_plan(recipe, data), dist.rank(), dist.world_size(), pin=False)
            if self._generate:
                self._prompts = held_out_prompts(recipe, masker, self._generate.rows)

    def __call__(self, step: int) -> bool:
        if self._loader is None:
            return True
        loss = held_out_loss(self._engine, self._loader.stream(0), self._stop)
        if loss is None:
            return False
        line = {"eval/loss": loss}
        if self._generate and self._prompts:
            samples = generate(self._engine, self._prompts, self._generate, self._tokenizer)
            line |= accuracies(samples)
            if dist.is_main():
                write_samples(self._samples, step, samples)
        self._metrics.write(step, line)
        dist.log.info("after %d steps: %s", step, "  ".join(f"{key} {value:.4f}" for key, value in line.items()))
        return True


def _rows_of(plan: Plan, step: StepPlan, data: Prepared) -> str:
    """The rows of a step as `file:row`, the first few of them."""
    names = documents_of(plan, step, data)
    return ", ".join(f"{file}:{row}" for file, row in names[:20]) + (" ..." if len(names) > 20 else "")
