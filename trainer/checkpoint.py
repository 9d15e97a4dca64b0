"""Checkpoints that are complete or absent (C7).

checkpoints/
  .saving-step-000200/      being written; never read
  step-000200/              published by one rename
    state/                  DeepSpeed's files
    manifest.json           RunState, and the size and checksum of every file
  latest                    the newest one's name; a convenience, nothing trusts it
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from trainer import dist
from trainer.flow import BadInput
from trainer.once import sync_folder

_MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class RunState:
    """Where a run stands. Order, learning rate and noise follow from the step, so this is all."""

    step: int  # applied steps
    world_size: int  # of the shards on disk
    stage: int  # ZeRO's
    data: str  # fingerprint of the tokenised training data


# ----------------------------------------------------------------------------------------------- save


def publish(run_dir: Path, state: RunState, write: Callable[[Path], None], *, keep: int, bytes_needed: int) -> Path:
    """Write a checkpoint aside, publish it by one rename, then prune older ones. Every rank calls it.

    Args:
        write: writes this rank's files under the folder it is given.
        bytes_needed: what all ranks together will write.

    Raises:
        BadInput: the disk has no room for it; nothing was written.
    """
    root = run_dir / "checkpoints"
    final = root / f"step-{state.step:06d}"
    staged = root / f".saving-{final.name}"
    if dist.is_main():
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(".saving-*"):  # of a killed save
            shutil.rmtree(left)
        staged.mkdir()
    _require_room(root, bytes_needed)
    write(staged)
    dist.barrier()
    shares = dist.gather({name: _seal(staged / name) for name in _files_of_rank(staged)})
    if dist.is_main():
        files = {name: facts for share in shares for name, facts in share.items()}
        manifest = {"format": _FORMAT, "state": asdict(state), "files": dict(sorted(files.items()))}
        _write_synced(staged / _MANIFEST, json.dumps(manifest, indent=1))
        for folder in {staged, *(path.parent for path in staged.rglob("*"))}:
            sync_folder(folder)
        if final.exists():  # a damaged one: a whole one would have been resumed from
            shutil.rmtree(final)
        staged.rename(final)
        sync_folder(root)
        _write_synced(root / "latest", final.name)
        for old in sorted(root.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def _require_room(folder: Path, bytes_needed: int) -> None:
    """Raises BadInput on every rank, from rank 0's look at the disk."""
    free = dist.broadcast(shutil.disk_usage(folder).free if dist.is_main() else None)
    if free < bytes_needed:
        raise BadInput(
            f"{folder}: a checkpoint needs {bytes_needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free there; "
            "make room and start again, or lower checkpoint.keep"
        )


def _files_of_rank(folder: Path) -> list[str]:
    """The files that this rank wrote: DeepSpeed puts the rank into their names; what names none is rank 0's."""
    names = []
    for path in folder.rglob("*"):
        shard = re.search(r"zero_pp_rank_(\d+)_|/rank(\d+)/", path.as_posix())
        rank = int(shard.group(1) or shard.group(2)) if shard else 0
        if path.is_file() and rank == dist.rank():
            names.append(str(path.relative_to(folder)))
    return names


def _seal(path: Path) -> dict[str, Any]:
    """Bring a file to the disk; its size and checksum."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "xxh3": _checksum(path)}


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _write_synced(path: Path, text: str) -> None:
    """Replace a small file at once."""
    aside = path.with_name(f".{path.name}.new")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


# ----------------------------------------------------------------------------------------------- find


def find(run_dir: Path) -> tuple[Path, RunState] | None:
    """The newest checkpoint that is whole, every byte of it checked; damaged ones are named and passed over."""
    for folder in sorted((run_dir / "checkpoints").glob("step-*"), reverse=True):
        fault = fault_of(folder)
        if fault is None:
            return folder, state_of(folder)
        dist.log.warning("passing over %s: %s", folder, fault)
    return None


def state_of(folder: Path) -> RunState:
    return RunState(**json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["state"])


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            return f"its format is {manifest['format']}, this version reads {_FORMAT}"
        for name, facts in manifest["files"].items():
            if (folder / name).stat().st_size != facts["bytes"]:
                return f"{name} has another size than the manifest says"
            if _checksum(folder / name) != facts["xxh3"]:
                return f"{name} has other bytes than were written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def require_same_run(saved: RunState, world_size: int, stage: int, data: str) -> None:
    """Refuse a resume that would not go on with the same run, or that the shards on disk cannot serve.

    Raises:
        BadInput: the data, the world size or the ZeRO stage is another one.
    """
    if saved.data != data:
        raise BadInput(
            "the training data, its tokenizer or its masks are not those that the run folder's checkpoint was trained "
            "on; put them back, or give another run.dir"
        )
    if (saved.world_size, saved.stage) != (world_size, stage):
        raise BadInput(
            f"the checkpoint was written by {saved.world_size} ranks at ZeRO stage {saved.stage}, this start has "
            f"{world_size} at stage {stage}; start it with --nproc {saved.world_size} and the same template"
        )
