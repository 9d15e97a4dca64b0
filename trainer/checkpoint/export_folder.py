"""Decide whether an export may be written where the user says, and by which mode of files; tell
which step it is."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import xxhash

from packhorse.trainer import dist
from packhorse.trainer.checkpoint import best, checkpoint
from packhorse.trainer.checkpoint.manifest import Manifest, list_published
from packhorse.trainer.config.recipe import Recipe, load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine.sharded_state import EMA, Shards
from packhorse.trainer.utils.files import checksum, sync_file
from packhorse.trainer.utils.own_output import require_replaceable

# In a run folder: configuration, generation configuration and tokenizer, without weights.
MODEL_FOLDER = "model"
# In a run folder: packhorse deletes what lies there, or takes it for its own.
_RECIPE = "model.dtype and adapter in recipe.yaml"  # beside the names of the folder's files
_OF_THE_RUN = ("checkpoints", "evals", MODEL_FOLDER, "serving")


def run_recipe(run_dir: Path) -> Recipe:
    """Return the recipe of a run. Raises BadInput if the folder is no run folder."""
    if not (run_dir / "recipe.yaml").is_file():
        raise BadInput(f"{run_dir}: not a run folder (it has no recipe.yaml)")
    return load_recipe(run_dir / "recipe.yaml")


def require_own_place(run_dir: Path, out: Path) -> None:
    """Refuse an `out` that is or holds the run or its base model, or that lies in the base model's
    folder or in a part of the run folder that the run uses.
    """
    place, run = out.resolve(), run_dir.resolve()
    base = Path(run_recipe(run_dir).model.name).expanduser().resolve()
    for folder, what in ((run, "run folder"), (base, "base model's folder")):
        if folder.exists() and folder.is_relative_to(place):
            raise BadInput(f"--out {out}: is or holds the {what}; give another --out")
    if place.is_relative_to(base) and not place.is_relative_to(run):
        raise BadInput(f"--out {out}: lies in the base model's folder; give another --out")
    if place.is_relative_to(run) and place.relative_to(run).parts[0] in _OF_THE_RUN:
        raise BadInput(
            f"--out {out}: the run uses this part of its folder; give another --out, as "
            f"{run_dir / 'export'}"
        )


def open_for_export(
    run_dir: Path,
    recipe: Recipe,
    out: Path,
    step: int | None,
    *,
    overwrite: bool,
    ema: bool = False,
) -> tuple[Shards, Manifest]:
    """Open a checkpoint, the newest whole one by default, to be written to `out`.

    Args:
        ema: read the averages of the weights in their place.

    Raises:
        BadInput: the run has no such checkpoint or no averages, or `out` may not be written (see
            own_output).
    """
    replaced = require_replaceable(out, overwrite=overwrite)
    saved, manifest = checkpoint.open_checkpoint(run_dir, step)
    dist.log.info("exporting %s", describe_step(run_dir, recipe, manifest.state.step))
    if ema:
        saved.averaged = frozenset(name for name, state in manifest.digests if state == EMA)
        if not saved.averaged:
            raise BadInput(f"--ema: {run_dir} keeps no average; train with optim.ema_decay")
        dist.log.info("--ema: the averages of %d weights in their place", len(saved.averaged))
    if replaced:
        dist.log.info("--overwrite: once it is whole, it replaces %s in %s", replaced, out)
    return saved, manifest


def describe(run_dir: Path, recipe: Recipe) -> dict[str, str]:
    """Bring the files of a run's MODEL_FOLDER to the disk, and return their checksums by relative
    path; with that of what an export takes from the run's recipe.yaml.
    """
    folder = run_dir / MODEL_FOLDER
    # without defaults: a key that a later version adds changes nothing
    adapter = recipe.adapter and recipe.adapter.model_dump(mode="json", exclude_defaults=True)
    taken = [recipe.model.dtype, adapter]
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        sync_file(path)
    found = {path.relative_to(folder).as_posix(): checksum(path) for path in paths}
    return found | {_RECIPE: xxhash.xxh3_128_hexdigest(json.dumps(taken).encode())}


def require_described(run_dir: Path, recipe: Recipe, manifest: Manifest) -> None:
    """Refuse a run folder whose description of the model was changed since a checkpoint.

    Any checkpoint of the run will do: a start with another version of transformers may have written
    the same description in other words.
    """
    found, known = describe(run_dir, recipe), [manifest.description]
    for folder in list_published(run_dir / "checkpoints").values():
        with suppress(OSError, ValueError, KeyError, TypeError):  # damaged: it proves nothing
            known.append(Manifest.read(folder).description)
    if found not in known:
        names = found.keys() | manifest.description.keys()
        changed = sorted(n for n in names if found.get(n) != manifest.description.get(n))
        raise BadInput(
            f"{run_dir}: its description of the model is not as the run wrote it: "
            f"{', '.join(changed[:5])}; put that back, or resume the run, which writes it anew"
        )


def describe_step(run_dir: Path, recipe: Recipe, step: int) -> str:
    """Return which step of a run this is, and whether it is the last or the best one."""
    last, rule = checkpoint.last_step(run_dir), recipe.eval.best
    place = "the last one" if step == last else f"not the last one, which is {last}"
    if rule is None:
        merit = "which is best is not known, as its recipe has no eval.best"
    else:
        chosen = best.choose(rule, best.evaluations(run_dir))["step"]
        if chosen is None:
            merit = f"none is the best by {rule}"
        else:
            merit = "the best" if chosen == step else f"not the best, which is {chosen},"
            merit += f" by {rule}"
    return f"step {step} of {run_dir}: {place}; {merit}"
