"""What a run leaves in its folder beside checkpoints and metrics: the recipe, where it ran, what
became of it.

recipe.yaml   environment.json   data.json   data.png   rejects.jsonl   summary.json   stop.json   trace.jsonl

Where the training data grows, data.json has the shards that were known at the start; shards.jsonl
has them all.
"""

from __future__ import annotations

import json
import platform
import secrets
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trainer import __version__, dist
from trainer.config.recipe import Recipe, load_recipe
from trainer.data import summary
from trainer.data.batch_plan import Plan
from trainer.data.prepare import Prepared, TrainData
from trainer.data.streaming import LOG
from trainer.datatypes import STOP_FILE, BadInput, Batch, StepResult
from trainer.engine.engine import Engine
from trainer.metrics import EVALUATIONS, Metrics
from trainer.utils.files import read_json_lines, write_json, write_synced

_LENGTHS = ("train.epochs", "train.steps")


def open_run_folder(recipe: Recipe, run_dir: Path, *, extend: bool = False) -> None:
    """Make the folder and save the resolved recipe; a folder with checkpoints must be this
    recipe's. Without one the recipe may change, and the log of shards, if another recipe wrote one,
    is begun anew.

    Args:
        extend: it may be of fewer epochs or steps (C8).

    Raises:
        BadInput: the folder holds a run of another recipe (C8), or cannot be written.
    """
    saved = run_dir / "recipe.yaml"
    has_checkpoint = any((run_dir / "checkpoints").glob("step-*"))
    if (
        not has_checkpoint
        and saved.is_file()
        and saved.read_text(encoding="utf-8") != recipe.to_yaml()
    ):
        (run_dir / EVALUATIONS).unlink(
            missing_ok=True
        )  # the untrained model of another recipe may be another one
    if saved.is_file() and (has_checkpoint or (run_dir / LOG).is_file()):
        before, now = load_recipe(saved).fixed(), recipe.fixed()
        changed = [key for key in now if now[key] != before.get(key)]
        shown = "; ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in changed)
        longer = all(key in _LENGTHS and (before[key] or 0) < (now[key] or 0) for key in changed)
        if changed and not has_checkpoint:
            (run_dir / LOG).unlink()
        elif changed and longer and extend:
            dist.log.info("%s is extended: %s", run_dir, shown)
        elif changed:
            instead = (
                "add --extend to train on" if longer else "give another run.dir, or set them back"
            )
            raise BadInput(f"{run_dir} holds a run of another recipe: {shown}; {instead}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_synced(saved, recipe.to_yaml())
    except OSError as error:
        raise BadInput(f"run.dir: {run_dir} cannot be written ({error})") from None


def require_shared(run_dir: Path) -> None:
    """Raises BadInput where nodes do not see one and the same run folder: each writes a file that
    all look for (C7).

    Packhorse's launchers have looked before (launch/preflight.py); torchrun's do not.
    """
    if dist.local_world_size() == dist.world_size():
        return
    name = f".node-of-rank-%d-{dist.broadcast(secrets.token_hex(8))}"
    mine = run_dir / (name % dist.rank())
    if dist.local_rank() == 0 and run_dir.is_dir():
        mine.touch()
    nodes = [rank for rank, leads in enumerate(dist.gather(dist.local_rank() == 0)) if leads]
    unseen = dist.gather([rank for rank in nodes if not (run_dir / (name % rank)).exists()])
    mine.unlink(missing_ok=True)
    if any(unseen):
        raise BadInput(
            f"run.dir: {run_dir} is not the same folder on all nodes; put it on a file system that "
            f"all of them share"
        )


def describe(
    recipe: Recipe,
    run_dir: Path,
    train_data: TrainData,
    plan: Plan,
    eval_data: Prepared | None,
    metrics: Metrics,
) -> None:
    """environment.json, data.json, data.png, rejects.jsonl, and the recipe as text in TensorBoard."""
    packages = ("torch", "deepspeed", "transformers", "datasets", "tokenizers")
    write_json(
        run_dir / "environment.json",
        {
            "packhorse": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": {name: version(name) for name in packages},
            "device": torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else platform.processor() or "cpu",
            "world_size": dist.world_size(),
        },
    )
    if isinstance(train_data, Prepared):
        summary.write(run_dir, train_data, plan, eval_data)
    else:
        write_json(
            run_dir / "data.json", {"train": train_data.report, **summary.of_eval(eval_data)}
        )
    rejects = [
        data.rejects_path.read_text(encoding="utf-8")
        for data in (train_data, eval_data)
        if isinstance(data, Prepared)
    ]
    write_synced(run_dir / "rejects.jsonl", "".join(rejects))
    rows = "\n".join(f"| {key} | {value} |" for key, value in recipe.fixed().items())
    metrics.text("recipe", f"| key | value |\n|---|---|\n{rows}")


def summarise(
    run_dir: Path,
    steps: int,
    tokens_per_s: float,
    skipped_steps: int,
    best: dict[str, Any] | None = None,
) -> None:
    """summary.json: the numbers before and after, read back from the log, the best step's, and one
    sample.
    """
    evaluated = {
        line["step"]: line
        for line in read_json_lines(run_dir / "metrics.jsonl")
        if "eval/loss" in line
    }
    numbers = {
        at: {k: v for k, v in line.items() if k.startswith("eval/")}
        for at, line in evaluated.items()
    }
    of_last = [
        sample for sample in read_json_lines(run_dir / "samples.jsonl") if sample["step"] == steps
    ]
    write_json(
        run_dir / "summary.json",
        {
            "before": numbers.get(0, {}),
            "after": numbers.get(steps, {}),
            "steps": steps,
            "best": best,
            "skipped_steps": skipped_steps,
            "tokens_per_s": tokens_per_s,
            "sample": of_last[0] if of_last else None,
            "versions": json.loads((run_dir / "environment.json").read_text())["packages"],
        },
    )


def is_done(run_dir: Path, steps: int) -> bool:
    """Whether a run of so many steps has ended here, and not one that has been extended since."""
    summary = run_dir / "summary.json"
    return summary.is_file() and json.loads(summary.read_text())["steps"] == steps


def write_stop(run_dir: Path, step: int) -> None:
    """stop.json, which makes the launcher end with 75: run me again."""
    if dist.is_main():
        write_json(run_dir / STOP_FILE, {"step": step})
        where = f"after step {step}" if step else "before the first step"
        dist.log.info("stopped on request %s; the same command goes on from there", where)


def write_trace(
    run_dir: Path, engine: Engine, step: int, batches: list[Batch], result: StepResult
) -> None:
    """A line of what the step was made of: documents as (epoch, document, piece), loss, norm,
    hyperparameters.
    """
    keys = dist.gather(
        [key for batch in batches if not batch.is_filler for key in batch.document_keys]
    )
    loss = dist.sum_over_ranks([result.loss.item()])[0]
    if dist.is_main():
        line = {
            "step": step,
            "documents": sorted(key for share in keys for key in share),
            "train/loss": loss,
            "train/grad_norm": result.grad_norm,
            "groups": engine.hyperparameters(),
        }
        with (run_dir / "trace.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
