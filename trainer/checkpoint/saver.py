"""Save checkpoints that are complete or absent, in the background where memory allows (C7).

What a checkpoint consists of is in checkpoint.py, which finds and restores them.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from packhorse.trainer import dist
from packhorse.trainer.checkpoint.manifest import (
    Manifest,
    RunState,
    delete,
    folder_name,
    point_at_best,
    prune,
    remove,
)
from packhorse.trainer.checkpoint.mirror import Mirror
from packhorse.trainer.config.recipe import CheckpointSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine import sharded_state
from packhorse.trainer.engine.sharded_state import Slice, add_digests
from packhorse.trainer.utils.files import publish_folder, write_synced

if TYPE_CHECKING:  # what reads a run needs no DeepSpeed
    from packhorse.trainer.engine.engine import Engine

_COPY_SHARE = 0.5  # of the host's free memory, which a copy of the state may take unless asked for


class Saver:
    """Writes checkpoints, in the background if the host's memory holds a copy of the state.

    Every rank has one and calls it at the same steps. Leaving it waits for the last checkpoint to
    be published.

    Args:
        mirror: rank 0's, to which each published checkpoint is offered.
        description: rank 0's, see Manifest.

    Raises:
        BadInput: `asynchronous: true`, and the host's memory does not hold the copy.
    """

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        section: CheckpointSection,
        mirror: Mirror | None = None,
        description: Mapping[str, str] | None = None,
    ) -> None:
        self._root = run_dir / "checkpoints"
        self._engine = engine
        self._keep, self._mirror = section.keep, mirror
        self._description = description or {}
        # Ranks agree in the background while training uses the main group: collectives of two
        # threads on one group could be matched in another order on each rank.
        self._group = dist.new_group()
        # Another start may take over the run folder from ranks that stand still. If these go on
        # one day, they must not write into what the other one saves.
        self._token = dist.broadcast(secrets.token_hex(4))
        self._in_background = _copy_fits(engine.state.bytes(), section.asynchronous)
        self._saved: int | None = None  # the last step, which may be evaluated and saved again
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def __enter__(self) -> Saver:
        failure = self._run_on_rank0(self._remove_leftovers)
        if failure is not None:
            raise BadInput(f"{self._root}: the checkpoints' folder cannot be used: {failure}")
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.wait()
        if error is None:  # else the other ranks would fail in it, as in dist.process_group
            dist.close_group(self._group)

    def save(self, state: RunState, best: int | None = None) -> None:
        """Copy the state and write it in the background, or write it now if no copy fits.

        A step that was saved before is only named as the best, if it is.

        Args:
            best: the step whose checkpoint is spared when older ones are removed, and not counted
                among the kept ones.

        Raises:
            BadInput: the disk has no room, and nothing was written; or the last save failed, which
                is reported here.
        """
        self.wait()
        if state.step == self._saved:
            self._raise_failure(
                state.step, self._run_on_rank0(lambda: point_at_best(self._root, best))
            )
            return
        self._saved = state.step
        _require_room(self._root, self._engine.state.bytes())
        staged = self._root / f".{self._token}-saving-{folder_name(state.step)}"
        self._raise_failure(state.step, self._run_on_rank0(staged.mkdir))
        # Everything but the slices is read here: the background must not touch the engine, which
        # trains on meanwhile.
        own = Manifest(state, self._engine.state.shapes(), {}, self._engine.state.frozen_digests())
        groups = self._engine.state.slices()
        if not self._in_background:
            self._write(staged, own, groups, best)
            return
        copies = [[piece.copy() for piece in group] for group in groups]

        def write() -> None:
            try:
                self._write(staged, own, copies, best)
            except Exception as error:  # raised by `wait`
                dist.log.warning("%s", error)
                self._failure = error

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when the last checkpoint is published, or raise what kept it from being."""
        if self._thread is not None:
            self._thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write(
        self, staged: Path, own: Manifest, groups: Iterable[list[Slice]], best: int | None
    ) -> None:
        """Write this rank's files; once all ranks have, rank 0 publishes. All fail if one does.

        Args:
            own: the manifest of this rank's share, whose files and digests are filled in.
        """
        failure: str | None = None
        try:
            for number, group in enumerate(groups):
                name = f"rank{dist.rank():05d}-{number:03d}.safetensors"
                own.files[name], digests = sharded_state.write(staged / name, group)
                add_digests(own.digests, digests)
        except OSError as error:
            failure = _explain(error)
        # also the barrier: nothing is published before every rank has synced its files
        shares = dist.gather((own.to_json(), failure), self._group)
        failure = next((failure for _, failure in shares if failure), None)
        if failure is None:
            manifest = Manifest(own.state, own.shapes, {}, {}, self._description)
            for share in (Manifest.parse(text) for text, _ in shares):
                manifest.files.update(share.files)
                add_digests(manifest.digests, share.digests)
            failure = self._run_on_rank0(lambda: self._publish(staged, manifest, best))
        if failure is not None and dist.is_main():
            shutil.rmtree(staged, ignore_errors=True)
        self._raise_failure(own.state.step, failure)

    def _run_on_rank0(self, work: Callable[[], None]) -> str | None:
        return dist.run_on_rank0(work, _explain, self._group)

    def _raise_failure(self, step: int, failure: str | None) -> None:
        if failure is not None:
            raise BadInput(
                f"{self._root}: the checkpoint of step {step} could not be written: {failure}"
            )

    def _remove_leftovers(self) -> None:
        """Delete what interrupted saves and removals left; at the start, as no save may follow."""
        self._root.mkdir(parents=True, exist_ok=True)
        for left in self._root.glob(".*-step-*"):
            delete(left)

    def _publish(self, staged: Path, manifest: Manifest, best: int | None) -> None:
        manifest.write(staged)
        final = self._root / folder_name(manifest.state.step)
        # a damaged one, perhaps a link to nowhere: the run would have been resumed from a whole one
        if os.path.lexists(final):
            remove(final)
        publish_folder(staged, final)
        name_and_prune(self._root, manifest.state.step, best, self._keep, self._mirror)
        if self._mirror:
            self._mirror.offer(manifest.state.step)


def name_and_prune(
    root: Path, newest: int, best: int | None, keep: int, mirror: Mirror | None
) -> None:
    """Name the newest checkpoint and the best one, and delete those that are not kept. Rank 0 calls
    it after each save; and at the end, as the last save may have been killed in between."""
    write_synced(root / "latest", folder_name(newest))
    point_at_best(root, best)
    prune(root, newest, best, keep, mirror.in_use() if mirror else ())


def _copy_fits(state_bytes: int, asked: bool | None) -> bool:
    """Decide whether to copy the state to the host's memory: as asked for; unless anything was,
    if the copy leaves half of the free memory. All ranks decide alike.
    """
    here = state_bytes // dist.world_size() * dist.local_world_size()
    hosts = dist.gather([here, psutil.virtual_memory().available])
    here, free = max(hosts, key=lambda host: host[0] / host[1])  # the fullest, if all copy
    if asked and here > free:
        raise BadInput(
            f"checkpoint.asynchronous: the copy of the state takes {here / 2**30:.1f} GiB of a "
            f"host's memory, and {free / 2**30:.1f} GiB are free; remove the key, and training "
            "waits while a checkpoint is written"
        )
    fits = asked if asked is not None else here <= _COPY_SHARE * free
    how = "while training waits"
    if fits:
        how = f"in the background, from a copy of {here / 2**30:.2f} GiB a node"
    dist.log.info("checkpoints of %.2f GiB, written %s", state_bytes / 2**30, how)
    return fits


def _require_room(folder: Path, bytes_needed: int) -> None:
    """Raise BadInput on every rank if rank 0 sees too little room on the disk."""
    free = dist.broadcast(shutil.disk_usage(folder).free if dist.is_main() else None)
    if free < bytes_needed:
        raise BadInput(
            f"{folder}: a checkpoint needs {bytes_needed / 2**30:.2f} GiB and {free / 2**30:.2f} "
            "GiB are free there; make room and start again, or lower checkpoint.keep"
        )


def _explain(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; make room and start again, or lower checkpoint.keep"
    return f"{error}; correct that and start again, the last checkpoint is untouched"
