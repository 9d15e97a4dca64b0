"""Write what a run leaves in its folder beside checkpoints and metrics.

    recipe.yaml        the resolved recipe
    attention.json     where several attention kernels work: each one's time, and the choice
    environment.json   versions, device, number of ranks, and how many share a sequence
    data.json          counts of the prepared data; data.png a picture of them
    trackers.json      ids of this run in the experiment trackers
    rejects.jsonl      rows that were left out for a fault
    logs/rank00000.log what rank 0 logged, of all starts
    summary.json       metrics before and after, written when the run is done
    stop.json          the step at which the run was stopped on request
    trace.jsonl        if run.trace: what each step was made of

If the training data streams, data.json has the shards that were known at the start; shards.jsonl
has all of them.
"""

from __future__ import annotations

import os
import platform
import secrets
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from packhorse import __version__
from packhorse.trainer import dist
from packhorse.trainer.checkpoint.manifest import list_published
from packhorse.trainer.config.code_keys import used_code_keys
from packhorse.trainer.config.parsing import read_yaml
from packhorse.trainer.config.recipe import Recipe, load_recipe
from packhorse.trainer.data import summary
from packhorse.trainer.data.batch_plan import Plan
from packhorse.trainer.data.prepare import Prepared, TrainData
from packhorse.trainer.data.shard_log import LOG
from packhorse.trainer.datatypes import FILLER, STOP_FILE, BadInput, Batch, StepResult
from packhorse.trainer.metrics import EVALUATIONS, PARTS, Metrics
from packhorse.trainer.trackers import IDS
from packhorse.trainer.utils.files import read_json_file, write_json, write_synced
from packhorse.trainer.utils.json_lines import append_json_lines, read_json_lines
from packhorse.trainer.utils.log_lines import check_summary

if TYPE_CHECKING:  # what reads a run needs no DeepSpeed
    from packhorse.trainer.engine.engine import Engine

LOG_FILE = "logs/rank00000.log"  # in the run folder
# What a run replaces, appends to or deletes, besides data.json and data.png. Not shards.jsonl: a
# log from another run makes this one use the shards in the same order.
_WRITTEN = (
    *("checkpoints", "model", "serving", "tensorboard"),
    *("metrics.jsonl", EVALUATIONS, "samples.jsonl", "rejects.jsonl", "skipped_steps.jsonl"),
    *("attention.json", "trace.jsonl", "environment.json", "best.json", "summary.json"),
    *("pushed.json", LOG_FILE, IDS),
)
_FOLDERS = ("checkpoints", "logs", "model", "profile", "serving", "shards", "tensorboard")
_FILES = {*_WRITTEN, "recipe.yaml", "data.json", "data.png", STOP_FILE, LOG} - {*_FOLDERS}
_APPENDED = (LOG_FILE, LOG)  # without being replaced at a start, as the others are
_LENGTHS = ("train.epochs", "train.steps")


def open_run_folder(recipe: Recipe, run_dir: Path, *, extend: bool = False) -> None:
    """Make the folder and save the resolved recipe.

    A folder with checkpoints must hold a run of this recipe. Without checkpoints the recipe may
    change; then another recipe's log of shards and its evaluations are deleted.

    Args:
        extend: the saved recipe may have fewer epochs or steps (C8).

    Raises:
        BadInput: as `require_same_run`; or the folder cannot be written.
    """
    changed = require_same_run(recipe, run_dir, extend=extend)
    saved = run_dir / "recipe.yaml"
    text = saved.read_text(encoding="utf-8") if saved.is_file() else None
    if not has_checkpoint(run_dir):
        if text not in (None, recipe.to_yaml()):
            # the untrained model of another recipe may be another model
            (run_dir / EVALUATIONS).unlink(missing_ok=True)
            (run_dir / IDS).unlink(missing_ok=True)
        if changed:
            (run_dir / LOG).unlink()
    elif changed:
        dist.log.info("%s is extended: %s", run_dir, changed)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # an earlier start's would make the launcher take this start's end for a stop
        (run_dir / STOP_FILE).unlink(missing_ok=True)
        write_synced(saved, recipe.to_yaml())
    except OSError as error:
        raise BadInput(f"run.dir: {run_dir} cannot be written ({error})") from None


def require_same_run(recipe: Recipe, run_dir: Path, *, extend: bool = False) -> str:
    """Check that the recipe may train in this folder. Nothing is written.

    Returns:
        What differs from the recipe of the folder's run, where that may differ; or nothing.

    Raises:
        BadInput: the folder holds a run of another recipe (C8), or files that no run wrote and
            this one would replace.
    """
    _require_kinds(run_dir)
    saved = run_dir / "recipe.yaml"
    saves = has_checkpoint(run_dir)
    if not (saves and saved.is_file()):
        _require_own(run_dir)
    if not saved.is_file() or not (saves or (run_dir / LOG).is_file()):
        return ""
    before, now = load_recipe(saved).fixed(), recipe.fixed()
    changed = [key for key in now if now[key] != before.get(key)]
    shown = "; ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in changed)
    longer = all(key in _LENGTHS and (before[key] or 0) < (now[key] or 0) for key in changed)
    if changed and saves and not (longer and extend):
        instead = "add --extend to train on" if longer else "give another run.dir, or set them back"
        raise BadInput(f"{run_dir} holds a run of another recipe: {shown}; {instead}")
    return shown


def has_checkpoint(run_dir: Path) -> bool:
    """Return whether the folder holds a run that has saved."""
    return bool(list_published(run_dir / "checkpoints"))


def _require_kinds(run_dir: Path) -> None:
    """Refuse a folder in which something else has the name of a file or folder of a run, such as a
    pipe, for which it would wait without end. A file may be a link, as into a store of git-annex or
    DVC, where the run replaces it, and not where it would write through the link."""
    for name in sorted({*_FILES, *_FOLDERS}):
        path = run_dir / name
        is_folder = name in _FOLDERS
        if os.path.lexists(path) and not (path.is_dir() if is_folder else path.is_file()):
            raise BadInput(
                f"run.dir: {path} is no {'folder' if is_folder else 'plain file'}, as the run "
                "writes it there; move it away, or give another run.dir"
            )
        if name in _APPENDED and path.is_symlink():
            raise BadInput(
                f"run.dir: {path} is a link, through which the run would append to another file; "
                "put a copy of that file in its place, or give another run.dir"
            )


def _require_own(run_dir: Path) -> None:
    """Refuse a folder in which the run would replace files that no run wrote."""
    saved = run_dir / "recipe.yaml"
    if saved.is_file():
        tree = read_yaml(saved)
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        has_all = isinstance(tree, dict) and tree.keys() >= Recipe.model_fields.keys()
        if has_all and text == saved.read_text(encoding="utf-8"):
            return
        raise BadInput(
            f"run.dir: {saved} is not the resolved recipe of a run, and would be replaced; give "
            "another run.dir, or move it away"
        )
    there = [name for name in _WRITTEN if (run_dir / name).exists()]
    if there:
        raise BadInput(
            f"run.dir: {run_dir} is no run folder (it has no recipe.yaml), and the run would write "
            f"over {', '.join(there)}; give another run.dir"
        )
    summary.require_own(run_dir)


def require_shared(run_dir: Path) -> None:
    """Check that all nodes see the same run folder: each writes a file that all look for (C7).

    Packhorse's launchers have checked it before (launch/preflight.py); torchrun's do not.

    Raises:
        BadInput: a node does not see another one's file; on every rank.
    """
    if dist.local_world_size() == dist.world_size():
        return
    # the random part keeps a file of a killed start from being taken for this start's
    name = f".node-of-rank-%d-{dist.broadcast(secrets.token_hex(8))}"
    mine = run_dir / (name % dist.rank())
    if dist.local_rank() == 0 and run_dir.is_dir():
        mine.touch()
    # `gather` is also the barrier: all files are written before the first is looked for, and all
    # are found before the first is deleted
    nodes = [rank for rank, leads in enumerate(dist.gather(dist.local_rank() == 0)) if leads]
    unseen = dist.gather([rank for rank in nodes if not (run_dir / (name % rank)).exists()])
    mine.unlink(missing_ok=True)
    if any(unseen):
        raise BadInput(
            f"run.dir: {run_dir} is not the same folder on all nodes; put it on a file system that "
            "all of them share"
        )


def write_description(
    recipe: Recipe,
    run_dir: Path,
    train_data: TrainData,
    plan: Plan,
    eval_data: Prepared | None,
    metrics: Metrics,
) -> None:
    """Write environment.json, data.json, data.png and rejects.jsonl, and the recipe as a text to
    TensorBoard.
    """
    packages = ("torch", "deepspeed", "transformers", "datasets", "tokenizers")
    on_gpu = torch.cuda.is_available()
    write_json(
        run_dir / "environment.json",
        {
            "packhorse": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": {name: version(name) for name in packages},
            "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu",
            "world_size": dist.world_size(),
            "ranks_a_sequence": recipe.parallel.ranks_a_sequence,
        },
    )
    if isinstance(train_data, Prepared):
        summary.write(run_dir, train_data, plan, eval_data)
    else:
        content = {"train": train_data.report, **summary.of_eval(eval_data)}
        write_json(run_dir / "data.json", content)
    rejects = [
        data.rejects_path.read_text(encoding="utf-8")
        for data in (train_data, eval_data)
        if isinstance(data, Prepared)
    ]
    write_synced(run_dir / "rejects.jsonl", "".join(rejects))
    rows = "\n".join(f"| {key} | {value} |" for key, value in recipe.fixed().items())
    metrics.write_text("recipe", f"| key | value |\n|---|---|\n{rows}")


def write_summary(
    run_dir: Path,
    steps: int,
    tokens_per_s: float,
    skipped_steps: int,
    rest_s: Mapping[str, float],
    best: dict[str, Any] | None = None,
) -> None:
    """Write summary.json: the metrics before and after, and the time by part, read back from the
    log; the best step's metrics; and one sample.

    Args:
        rest_s: seconds by part that no line of the log holds.
    """
    logged = read_json_lines(run_dir / "metrics.jsonl")
    evaluated = {
        line["step"]: {key: value for key, value in line.items() if key.startswith("eval/")}
        for line in logged
        if "eval/loss" in line
    }
    samples = read_json_lines(run_dir / "samples.jsonl")
    environment = read_json_file(run_dir / "environment.json")  # or nothing, if it was deleted
    write_json(
        run_dir / "summary.json",
        {
            "before": evaluated.get(0, {}),
            "after": evaluated.get(steps, {}),
            "steps": steps,
            "best": best,
            "skipped_steps": skipped_steps,
            "tokens_per_s": tokens_per_s,
            "seconds": _seconds_by_part(logged, rest_s),
            "sample": next((sample for sample in samples if sample["step"] == steps), None),
            "versions": environment.get("packages"),
        },
    )


def _seconds_by_part(
    logged: Sequence[Mapping[str, float]], rest_s: Mapping[str, float]
) -> dict[str, float]:
    """Return the seconds that the run has spent in each part, over all its starts.

    A line has the mean of the steps since the line before.
    """
    seconds, last = Counter(rest_s), 0
    for line in logged:
        if "train/loss" in line:
            steps, last = line["step"] - last, line["step"]
            seconds.update({part: steps * line.get(f"perf/{part}_s", 0.0) for part in PARTS})
    return {part: round(seconds[part], 3) for part in PARTS}


def describe_end(recipe: Recipe, run_dir: Path) -> str:
    """Return what a person wants to know of a run that is done, from its summary.json: losses and
    scores before and after, time by part, where things are, and commands that may come next.

    Raises:
        BadInput: the summary is missing, damaged, or of an earlier version.
    """
    found = read_json_file(run_dir / "summary.json")
    try:
        check_summary(found)
    except (LookupError, TypeError):
        raise BadInput(
            f"{run_dir}/summary.json: missing, damaged, or written by an earlier version; the run "
            "is done, and its numbers are in metrics.jsonl"
        ) from None
    before, after, best = found["before"], found["after"], found["best"]
    rows = [(name, f"{_number(before.get(name))} -> {_number(after[name])}") for name in after]
    if best:
        rows.append(("best step", f"{best['step'] or 'none'}, by {best['rule']}"))
    if found["skipped_steps"]:
        rows.append(("skipped steps", str(found["skipped_steps"])))
    whole_s = sum(found["seconds"].values())
    parts = [f"{name} {s:,.1f} s" for name, s in found["seconds"].items() if s > 0.01 * whole_s]
    rows.append(("time", f"{whole_s:,.0f} s: {', '.join(parts)}"))
    rows.append(("speed", f"{found['tokens_per_s']:,.0f} tokens/s"))
    rows.append(("files", f"checkpoints/, metrics.jsonl, samples.jsonl, {LOG_FILE}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {text}" for name, text in rows]
    has_best = bool(best and best["step"])
    commands = [f"  {command}" for command in _next_commands(recipe, run_dir, has_best)]
    first = f"{run_dir}: {found['steps']} steps are done"
    return "\n".join([first, *lines, "Next:", *commands])


def _next_commands(recipe: Recipe, run_dir: Path, has_best: bool) -> list[str]:
    export = ["packhorse", "export", str(run_dir), "--out", str(run_dir / "export")]
    evaluate = ["packhorse", "eval", str(run_dir), str(run_dir / "recipe.yaml")]
    chat = ["packhorse", "chat", str(run_dir)]
    report = ["packhorse", "report", str(run_dir)]
    tensorboard = ["tensorboard", "--logdir", str(run_dir.parent)]
    best = ["--best"] * has_best
    trust = ["--trust-run"] * recipe.model.trust_remote_code
    evaluate += best + ["--trust-run"] * bool(used_code_keys(recipe))
    evaluations = [evaluate] if recipe.has_eval else []
    commands = [export + best + trust, *evaluations, chat + best + trust, report, tensorboard]
    return [shlex.join(command) for command in commands]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def is_done(run_dir: Path, steps: int) -> bool:
    """Return whether a run of so many steps has ended here, and was not extended since."""
    return read_json_file(run_dir / "summary.json").get("steps") == steps


def write_stop(run_dir: Path, step: int) -> None:
    """Write stop.json, by which the launcher knows to end with exit code 75: run me again."""
    if dist.is_main():
        write_json(run_dir / STOP_FILE, {"step": step})
        where = f"after step {step}" if step else "before the first step"
        dist.log.info("stopped on request %s; run the same command to continue", where)


def write_trace(
    run_dir: Path, engine: Engine, step: int, batches: list[Batch], result: StepResult
) -> None:
    """Append what a step was made of to trace.jsonl: documents as (epoch, document, piece), loss,
    gradient norm and hyperparameters. Every rank calls it.
    """
    counted = [batch for batch in batches if batch.is_counted]
    own_keys = [key for batch in counted for key in batch.document_keys if key[1] != FILLER]
    keys = dist.gather(own_keys)
    loss = dist.sum_over_ranks([result.loss.item()])[0]
    if dist.is_main():
        line = {
            "step": step,
            "documents": sorted(key for share in keys for key in share),
            "train/loss": loss,
            "train/grad_norm": result.grad_norm,
            "groups": engine.hyperparameters(),
        }
        append_json_lines(run_dir / "trace.jsonl", [line])
