"""Find and restore checkpoints that are complete or absent, at any world size (C7, C8).

checkpoints/
  .a1b2c3d4-saving-step-000200/   being written, by the start of that token; never read
  step-000200/                    published by one rename
    rank00000-000.safetensors     slices of weights and moments (engine/sharded_state.py)
    manifest.json                 RunState; shapes; size and checksum of every file; a digest of
                                  every tensor
  latest                          the newest one's name: for people, nothing reads it
  best                            the name of the best one by eval.best, which pruning spares
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from packhorse.trainer import dist
from packhorse.trainer.checkpoint.manifest import Manifest, RunState, list_published
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine.sharded_state import FROZEN, Shards
from packhorse.trainer.utils.files import checksum

if TYPE_CHECKING:  # what reads a run needs no DeepSpeed
    from packhorse.trainer.engine.engine import Engine


# --------------------------------------------------------------------------------------------- find


def last_step(run_dir: Path) -> int:
    """Return the step of a run's last checkpoint, whole or not. Raises ValueError without one."""
    return max(list_published(run_dir / "checkpoints"))


def find(run_dir: Path) -> tuple[Path, Manifest] | None:
    """Return the newest whole checkpoint, every byte of it checked, or None if there is none.

    Damaged ones are named in the log and skipped. Every rank calls it and reads its share of the
    bytes.

    Raises:
        BadInput: there are checkpoints, and none of them is whole.
    """
    root = run_dir / "checkpoints"
    # from rank 0, as a network file system may show ranks different folders for a moment
    names = dist.broadcast([folder.name for folder in list_published(root).values()])
    fault: str | None = None
    for folder in (root / name for name in reversed(names)):
        fault = find_fault(folder)
        if fault is None:
            return folder, Manifest.read(folder)
        dist.log.warning("skipping the damaged checkpoint %s: %s", folder, fault)
    if names:
        raise BadInput(
            f"{run_dir}: none of its {len(names)} checkpoints can be used ({fault}); put a whole "
            "one back, or give another run.dir to start from the beginning"
        )
    return None


def open_checkpoint(run_dir: Path, step: int | None = None) -> tuple[Shards, Manifest]:
    """Open the checkpoint of a step, by default the newest whole one, to read tensors by name.

    Raises:
        BadInput: there is none, or that of `step` is damaged: no other one takes its place.
    """
    found = find(run_dir) if step is None else _find_step(run_dir, step)
    if found is None:
        raise BadInput(f"{run_dir}: there is no whole checkpoint to export; train first")
    folder, manifest = found
    return Shards(folder, manifest.files, manifest.shapes), manifest


def _find_step(run_dir: Path, step: int) -> tuple[Path, Manifest]:
    folders = list_published(run_dir / "checkpoints")
    if step not in folders:
        there = f"there are: {', '.join(map(str, folders))}" if folders else "there is none at all"
        raise BadInput(f"{run_dir}: there is no checkpoint of step {step}; {there}")
    folder = folders.pop(step)
    fault = find_fault(folder)
    if fault is not None:
        raise BadInput(
            f"{folder} cannot be used: {fault}; put a whole one back, or give another --step: "
            f"{', '.join(map(str, folders)) or 'none'}"
        )
    return folder, Manifest.read(folder)


def find_fault(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None. Every rank calls it."""
    return next((fault for fault in dist.gather(_find_own_fault(folder)) if fault), None)


def _find_own_fault(folder: Path) -> str | None:
    try:
        files = sorted(Manifest.read(folder).files.items())
        for name, file in files[dist.rank() :: dist.world_size()]:
            if not (folder / name).is_file():  # a pipe would be waited for without end
                return f"{name} is missing, or no file"
            if (folder / name).stat().st_size != file.bytes:
                return f"{name} has another size than the manifest says"
            if checksum(folder / name) != file.xxh3:
                return f"{name} has other bytes than were written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


# ------------------------------------------------------------------------------------------ restore


def restore(folder: Path, manifest: Manifest, engine: Engine) -> None:
    """Put a checkpoint's state into the engine, and check it there. Every rank calls it.

    Raises:
        BadInput: the model has other parameters, or other frozen weights, than the checkpoint was
            written from.
        RuntimeError: a tensor differs from what was saved.
    """
    engine.state.restore(Shards(folder, manifest.files, manifest.shapes), manifest.state.updates)
    # Files were checked already. This checks the copy from files to parameters: digests are sums
    # over elements, so those of the ranks' slices add up to the digest of the whole tensor.
    found = engine.state.digests()
    keys = sorted(manifest.digests)
    sums = dist.sum_mod_2_64([found.get(key, 0) for key in keys])
    for (name, state), total in zip(keys, sums, strict=True):
        if total == manifest.digests[name, state]:
            continue
        if state == FROZEN:
            raise BadInput(
                f"`{name}`, which is not trained, has other values in the model's folder than "
                f"when {folder} was written; put the old model back, or give another run.dir"
            )
        raise RuntimeError(
            f"{folder}: `{name}` ({state}) differs from what was saved; this is a bug, report it"
        )


def require_same_run(saved: RunState, data: str, micro_batch_size: int, is_random: bool) -> None:
    """Refuse a resume on other data, or that draws random numbers for other micro-batches."""
    if saved.data != data:
        raise BadInput(
            "the training data (if it streams: shards.jsonl), its tokenizer or its masks are not "
            "those that the run folder's checkpoint was trained on; put them back, or give another "
            "run.dir"
        )
    if is_random and saved.micro_batch_size != micro_batch_size:
        raise BadInput(
            f"batch.micro_batch_size was {saved.micro_batch_size} and is {micro_batch_size}: the "
            "model draws random numbers (dropout, or a router's jitter) for each micro-batch; set "
            "it back, or give another run.dir"
        )
