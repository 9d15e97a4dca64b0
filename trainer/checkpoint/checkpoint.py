"""Checkpoints that are complete or absent, and that any world resumes (C7, C8).

checkpoints/
  .saving-step-000200/            being written; never read
  step-000200/                    published by one rename
    rank00000-000.safetensors     slices of weights and moments (shards.py)
    manifest.json                 RunState, shapes, size and checksum of every file, digest of every tensor
  latest                          the newest one's name; a convenience, nothing trusts it
  best                            likewise, the best one's by eval.best, which pruning spares
"""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import xxhash

from trainer import dist
from trainer.config.recipe import CheckpointSection
from trainer.datatypes import BadInput
from trainer.engine import sharded_state
from trainer.engine.engine import Engine
from trainer.engine.sharded_state import FROZEN, Digests, File, Shards, Slice, add_digests
from trainer.utils.files import publish_folder, write_synced

_MANIFEST = "manifest.json"
_FORMAT = 2
_SHARE_OF_MEMORY = (
    0.5  # of what the host has left, which a copy of the state may take without being asked for
)


@dataclass(frozen=True)
class RunState:
    """Where a run stands. Order, learning rate and noise follow from the step, so this is all."""

    step: int  # of the plan, taken or passed over
    updates: int  # applied: AdamW counts them
    data: str  # fingerprint of the tokenized training data
    micro_batch_size: int  # which may not change where the model has dropout
    recent_losses: Sequence[float]  # where the guard looks for spikes
    world_size: int  # that wrote it, for whoever reads the manifest, as
    stage: int  # ZeRO's


@dataclass(frozen=True)
class Manifest:
    state: RunState
    shapes: dict[str, list[int]]  # of trained parameters and buffers
    files: dict[str, File]
    digests: Digests

    def to_json(self) -> str:
        digests: dict[str, dict[str, str]] = {}
        for (name, state), value in sorted(self.digests.items()):
            digests.setdefault(name, {})[state] = f"{value:016x}"
        files = {name: asdict(file) for name, file in sorted(self.files.items())}
        content = {"format": _FORMAT, "state": asdict(self.state), "shapes": self.shapes}
        content |= {"files": files, "digests": digests}
        return json.dumps({**content, "xxh3": _own_checksum(content)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises OSError, KeyError, TypeError or ValueError where it is not there, or not as
        `to_json` writes it.
        """
        content = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']}, this version reads {_FORMAT}")
        if content.pop("xxh3") != _own_checksum(content):
            raise ValueError(f"{_MANIFEST} does not say what was written")
        digests = {
            (n, s): int(value, 16)
            for n, states in content["digests"].items()
            for s, value in states.items()
        }
        files = {name: File(**file) for name, file in content["files"].items()}
        return cls(RunState(**content["state"]), content["shapes"], files, digests)


def _own_checksum(content: dict[str, Any]) -> str:
    """Of what a manifest says, whatever its spaces."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())


# --------------------------------------------------------------------------------------------- save


class Saver:
    """Writes checkpoints, beside training where the host's memory holds a copy of the state.

    Every rank has one and calls it at the same steps; left, it waits for the last one to be
    published. Ranks agree in the background over a group of their own.

    Raises:
        BadInput: `asynchronous: true`, and the host's memory does not hold the copy.
    """

    def __init__(self, run_dir: Path, engine: Engine, section: CheckpointSection) -> None:
        self._root = run_dir / "checkpoints"
        self._engine = engine
        self._keep = section.keep
        self._group = dist.new_group()
        self._in_background = _copy_fits(engine.state.bytes(), section.asynchronous)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def __enter__(self) -> Saver:
        failure = self._run_on_rank0(self._clear)
        if failure is not None:
            raise BadInput(f"{self._root}: the checkpoints' folder cannot be used: {failure}")
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def save(self, state: RunState, best: int | None = None) -> None:
        """Copy the state and write it in the background; or write it now, where memory does not
        hold the copy.

        Args:
            best: the step whose checkpoint is spared when older ones are removed, and not counted.

        Raises:
            BadInput: the disk has no room; nothing was written. Or the last save failed, and is
                reported here.
        """
        self.wait()
        _require_room(self._root, self._engine.state.bytes())
        staged = self._root / f".saving-{_name(state.step)}"
        self._raise_failure(state.step, self._run_on_rank0(staged.mkdir))
        # what is known without reading the state comes first: the background must not touch the
        # engine
        shapes, digests = self._engine.state.shapes(), self._engine.state.frozen_digests()
        groups: Iterable[list[Slice]] = self._engine.state.slices()
        if not self._in_background:
            self._write(staged, state, best, shapes, digests, groups)
            return
        copies = [[piece.copy() for piece in group] for group in groups]

        def write() -> None:
            try:
                self._write(staged, state, best, shapes, digests, copies)
            except Exception as error:  # raised by `wait`
                dist.log.warning("%s", error)
                self._failure = error

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when the last checkpoint is published; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write(
        self,
        staged: Path,
        state: RunState,
        best: int | None,
        shapes: dict[str, list[int]],
        digests: Digests,
        groups: Iterable[list[Slice]],
    ) -> None:
        """Write this rank's files; when all ranks have, rank 0 publishes. All ranks know whether it
        went well.
        """
        files: dict[str, File] = {}
        failure: str | None = None
        try:
            for number, group in enumerate(groups):
                name = f"rank{dist.rank():05d}-{number:03d}.safetensors"
                files[name], found = sharded_state.write(staged / name, group)
                add_digests(digests, found)
        except OSError as error:
            failure = _explained(error)
        shares = dist.gather((files, digests, failure), self._group)
        failure = next((failure for *_, failure in shares if failure), None)
        if failure is None:
            manifest = Manifest(state, shapes, {}, {})
            for files, digests, _ in shares:
                manifest.files.update(files)
                add_digests(manifest.digests, digests)
            failure = self._run_on_rank0(lambda: self._publish(staged, manifest, best))
        if failure is not None and dist.is_main():
            shutil.rmtree(staged, ignore_errors=True)
        self._raise_failure(state.step, failure)

    def _run_on_rank0(self, work: Callable[[], None]) -> str | None:
        return dist.run_on_rank0(work, _explained, self._group)

    def _raise_failure(self, step: int, failure: str | None) -> None:
        if failure is not None:
            raise BadInput(
                f"{self._root}: the checkpoint of step {step} could not be written: {failure}"
            )

    def _clear(self) -> None:
        """Of what a save or a removal that was killed has left. Here, as there may be no further
        save.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        for left in self._root.glob(".*-step-*"):
            shutil.rmtree(left)

    def _publish(self, staged: Path, manifest: Manifest, best: int | None) -> None:
        write_manifest(staged, manifest)
        final = self._root / staged.name.removeprefix(".saving-")
        if final.exists():  # a damaged one: a whole one would have been resumed from
            _remove(final)
        publish_folder(staged, final)
        write_synced(self._root / "latest", final.name)
        point_at_best(self._root, best)
        published = _published(self._root)
        # newer ones are damaged, as the run went on from an older one: they do not count, and stay
        # until their step
        others = [old for old in published[: published.index(final) + 1] if old.name != _name(best)]
        for old in others[: -self._keep]:
            _remove(old)


def _name(step: int | None) -> str | None:
    """Of a step's checkpoint."""
    return None if step is None else f"step-{step:06d}"


def point_at_best(root: Path, step: int | None) -> None:
    """Let `best` name the checkpoint of the best step, where it is there. Called on rank 0."""
    name = _name(step)
    if name and (root / name).is_dir():
        write_synced(root / "best", name)
    else:
        (root / "best").unlink(missing_ok=True)


def _published(root: Path) -> list[Path]:
    """From old to new; without what somebody put beside them, as `step-000200-copy`."""
    found = {
        int(number): path
        for path in root.glob("step-*")
        if (number := path.name[len("step-") :]).isdigit()
    }
    return [found[step] for step in sorted(found)]


def _copy_fits(bytes_of_all: int, asked: bool | None) -> bool:
    """Whether to copy the state to the host's memory: as asked for, else where the copy leaves half
    of it free.
    """
    here = bytes_of_all // dist.world_size() * dist.local_world_size()
    free = psutil.virtual_memory().available
    if asked and here > free:
        raise BadInput(
            f"checkpoint.asynchronous: the copy of the state takes {here / 2**30:.1f} GiB of this "
            f"host's memory, and "
            f"{free / 2**30:.1f} GiB are free; take it out, and training waits while a checkpoint "
            f"is written"
        )
    fits = asked if asked is not None else here <= _SHARE_OF_MEMORY * free
    chosen = all(dist.gather(fits))
    how = (
        f"beside training, from a copy of {here / 2**30:.2f} GiB a node"
        if chosen
        else "while training waits"
    )
    dist.log.info("checkpoints of %.2f GiB, written %s", bytes_of_all / 2**30, how)
    return chosen


def _require_room(folder: Path, bytes_needed: int) -> None:
    """Raises BadInput on every rank, from rank 0's look at the disk."""
    free = dist.broadcast(shutil.disk_usage(folder).free if dist.is_main() else None)
    if free < bytes_needed:
        raise BadInput(
            f"{folder}: a checkpoint needs {bytes_needed / 2**30:.2f} GiB and {free / 2**30:.2f} "
            f"GiB are free there; "
            "make room and start again, or lower checkpoint.keep"
        )


def _explained(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; make room and start again, or lower checkpoint.keep"
    return f"{error}; mend it and start again, the last checkpoint is untouched"


def _remove(folder: Path) -> None:
    """Take a checkpoint away so that no moment shows a part of it under its name."""
    aside = folder.with_name(f".removing-{folder.name}")
    folder.rename(aside)
    shutil.rmtree(aside)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_synced(folder / _MANIFEST, manifest.to_json())


# --------------------------------------------------------------------------------------------- find


def find(run_dir: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that is whole, every byte of it checked; damaged ones are named and
    passed over.

    Every rank calls it and reads its share of the bytes.

    Raises:
        BadInput: there are checkpoints, and none of them is whole.
    """
    names = dist.broadcast(
        [folder.name for folder in reversed(_published(run_dir / "checkpoints"))]
    )
    fault: str | None = None
    for name in names:
        folder = run_dir / "checkpoints" / name
        fault = fault_of(folder)
        if fault is None:
            return folder, Manifest.read(folder)
        dist.log.warning("passing over %s: %s", folder, fault)
    if names:
        raise BadInput(
            f"{run_dir}: none of its {len(names)} checkpoints can be used ({fault}); put a whole "
            f"one back, or give "
            "another run.dir to start from the beginning"
        )
    return None


def open_newest(run_dir: Path) -> tuple[Shards, Manifest]:
    """The newest whole checkpoint, to be read by name.

    Raises:
        BadInput: there is none.
    """
    found = find(run_dir)
    if found is None:
        raise BadInput(f"{run_dir}: there is no whole checkpoint to export; train first")
    folder, manifest = found
    return Shards(folder, manifest.files, manifest.shapes), manifest


def open_step(run_dir: Path, step: int) -> tuple[Shards, Manifest]:
    """The checkpoint of one step, to be read by name.

    Raises:
        BadInput: there is none, or it is not whole: no other one is taken in its place.
    """
    root = run_dir / "checkpoints"
    there = {int(path.name[len("step-") :]): path for path in _published(root)}
    if step not in there:
        shown = (
            f"those that there are: {', '.join(map(str, there))}"
            if there
            else "there is none at all"
        )
        raise BadInput(f"{run_dir}: there is no checkpoint of step {step}; {shown}")
    fault = fault_of(there[step])
    if fault is not None:
        others = ", ".join(str(other) for other in there if other != step) or "none"
        raise BadInput(
            f"{there[step]} cannot be used: {fault}; put a whole one back, or take another --step: "
            f"{others}"
        )
    manifest = Manifest.read(there[step])
    return Shards(there[step], manifest.files, manifest.shapes), manifest


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Every rank calls it."""
    return next((fault for fault in dist.gather(_fault_of_share(folder)) if fault), None)


def _fault_of_share(folder: Path) -> str | None:
    try:
        files = sorted(Manifest.read(folder).files.items())
        for name, file in files[dist.rank() :: dist.world_size()]:
            if (folder / name).stat().st_size != file.bytes:
                return f"{name} has another size than the manifest says"
            if sharded_state.checksum(folder / name) != file.xxh3:
                return f"{name} has other bytes than were written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


# ------------------------------------------------------------------------------------------ restore


def restore(folder: Path, manifest: Manifest, engine: Engine) -> None:
    """Put the checkpoint's state into the engine, and check that it is there. Every rank calls it.

    Raises:
        BadInput: the model has other parameters, or other frozen weights, than the checkpoint was
            written from.
        RuntimeError: a tensor differs from what was saved.
    """
    engine.state.restore(Shards(folder, manifest.files, manifest.shapes), manifest.state.updates)
    found = engine.state.digests()
    keys = sorted(manifest.digests)
    sums = dist.sum_mod_2_64([found.get(key, 0) for key in keys])
    for (name, state), total in zip(keys, sums, strict=True):
        if total != manifest.digests[name, state]:
            if state == FROZEN:
                raise BadInput(
                    f"`{name}`, which is not trained, has other values in the model's folder than "
                    f"when {folder} was "
                    "written; put the old model back, or give another run.dir"
                )
            raise RuntimeError(
                f"{folder}: `{name}` ({state}) differs from what was saved; this is a defect, "
                f"report it"
            )


def require_same_run(saved: RunState, data: str, micro_batch_size: int, has_dropout: bool) -> None:
    """Refuse a resume that would not go on with the same run.

    Raises:
        BadInput: the data is other data, or dropout would fall on other micro-batches.
    """
    if saved.data != data:
        raise BadInput(
            "the training data (where it grows: shards.jsonl), its tokenizer or its masks are not "
            "those that the run "
            "folder's checkpoint was trained on; put them back, or give another run.dir"
        )
    if has_dropout and saved.micro_batch_size != micro_batch_size:
        raise BadInput(
            f"batch.micro_batch_size was {saved.micro_batch_size} and is {micro_batch_size}: the "
            f"model has dropout, which is "
            "drawn for each micro-batch; set it back, or give another run.dir"
        )
