"""Build a folder in one process while all others wait for it, on one node or on many (C7).

No process group is needed: a lease (utils/lease.py) says who builds.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import xxhash

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.dist import local_rank, log
from packhorse.trainer.utils.files import publish_folder, read_object, write_json
from packhorse.trainer.utils.lease import Lease, Rival, take
from packhorse.trainer.utils.text import error_line

POLL_S = 0.2
PATIENCE_S = 3.0  # how long other local ranks leave the build to local rank 0, which shows progress
SAVE_EVERY_S = 5.0  # between points from which a build can be resumed
PROGRESS = "progress.json"  # in a staging folder: the state of ResumableFiles

Build = Callable[[Path, list[Path], Callable[[], None]], None]
"""build(staging, leftovers, check): make and fill the folder `staging`, perhaps from `leftovers` of
interrupted builds. It calls `check` between pieces of work, which raises when another process has
taken over.
"""


class Stopped(RuntimeError):
    """The build was asked to stop. What is done is kept for the next start."""


def build_once(
    folder: Path,
    build: Build,
    what: str,
    stopping: Callable[[], bool] = lambda: False,
    setting: str = "data.cache",
) -> None:
    """Return once `folder` exists and is whole, built by this process or by another one.

    A build that is killed, or raises Stopped, leaves its staging folder to the next start. One that
    fails otherwise leaves nothing.

    Args:
        what: what the build does, for messages, as "preparing the training data".
        stopping: asked while this process waits for another one.
        setting: says where the folder lies, for messages.

    Raises:
        BadInput: the disk is full, or the folder cannot be made.
        Stopped: `stopping()` became true while waiting.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        while not folder.is_dir():
            lock = _acquire(folder, what, stopping)
            if lock is not None:
                with lock:
                    _build(folder, build, lock)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BadInput(
                f"{folder.parent}: the disk is full while {what}; free some room, or set "
                f"{setting} to another folder"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise BadInput(
                f"{folder.parent}: cannot be written ({error.strerror}); set {setting} to a "
                "folder that can"
            ) from error
        raise


def _build(folder: Path, build: Build, lock: Lease) -> None:
    if folder.is_dir():  # published between the last check and the lock
        return
    leftovers = sorted(folder.parent.glob(f"{folder.name}.build-*"))
    staging = folder.with_name(f"{folder.name}.build-{uuid.uuid4().hex[:12]}")
    try:
        build(staging, leftovers, lock.check)
        lock.check()
        publish_folder(staging, folder)
    except Stopped:
        raise
    except Exception:
        shutil.rmtree(staging, ignore_errors=True)
        if lock.is_ours():
            raise
        # another process took this one for dead; what failed here may be its doing
        log.info("another process took over %s; waiting for it", folder)
        return
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)


def _acquire(folder: Path, what: str, stopping: Callable[[], bool]) -> Lease | None:
    """Return the lock, or None if the folder was published meanwhile.

    Waits for an owner as long as that is alive.
    """
    lock = folder.with_name(f"{folder.name}.lock")
    rival, is_announced = Rival(lock), False
    started = time.monotonic()
    while not folder.is_dir():
        if stopping():
            raise Stopped(f"stopped while waiting for another process that is {what}")
        state = rival.look()
        may_begin = local_rank() == 0 or time.monotonic() - started > PATIENCE_S
        if state == "dead" or (state == "none" and may_begin):
            lease = take(lock, rival.number + 1)
            if lease is not None:
                if state == "dead":
                    log.info("taking over from a process that died while %s", what)
                return lease
        elif state != "none" and not is_announced:
            is_announced = True
            log.info("waiting for %s, which is %s", rival.name, what)
        time.sleep(POLL_S)
    return None


class ResumableFiles:
    """Append to the files of a staging folder so that a later start can resume the build.

    `state` counts what is done. It is JSON; its `rows` is the number of input rows. `save` brings
    the state and the files to the disk together. A resumed build copies the leftover with the most
    rows, up to the sizes that were saved, and takes over its state.
    """

    def __init__(
        self, staging: Path, leftovers: list[Path], names: list[str], state: dict[str, Any]
    ) -> None:
        staging.mkdir()
        self.folder, self.state = staging, state
        self._copy_leftover(leftovers, names)
        self._files = {name: (staging / name).open("ab") for name in names}
        self._saved_at = time.monotonic()

    def append(self, name: str, content: bytes) -> None:
        self._files[name].write(content)

    def append_lines(self, name: str, records: Iterable[Any]) -> None:
        """Append JSON lines."""
        self._files[name].writelines(
            json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records
        )

    def save_if_due(self) -> None:
        """Save, unless the last save was less than SAVE_EVERY_S ago."""
        if time.monotonic() - self._saved_at > SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        # The files come first: a saved state must never count bytes that a power cut can take away.
        state = {**self.state, "sizes": self.sync()}
        write_json(self.folder / PROGRESS, {**state, "xxh3": _checksum(state)})
        self._saved_at = time.monotonic()

    def flush(self) -> None:
        """Hand all that was appended to the operating system, where other readers see it."""
        for file in self._files.values():
            file.flush()

    def sync(self) -> dict[str, int]:
        """Bring all that was appended to the disk; return each file's size in bytes."""
        self.flush()
        for file in self._files.values():
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._files.items()}

    def replace(self, aside: dict[str, Path]) -> None:
        """Replace each named file by the one written aside. Nothing can be resumed from then on."""
        self.forget()  # before the first is replaced, as the saved sizes are of the old files
        for name, path in aside.items():
            self._files[name].close()
            path.replace(self.folder / name)
            self._files[name] = (self.folder / name).open("ab")

    def forget(self) -> None:
        """Delete the saved state: the build is complete, or its files are about to change."""
        (self.folder / PROGRESS).unlink(missing_ok=True)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _copy_leftover(self, leftovers: list[Path], names: list[str]) -> None:
        found = [each for folder in leftovers if (each := _read_leftover(folder, names))]
        if not found:
            return
        self.state, sizes, folder = max(found, key=lambda each: each[0]["rows"])
        # A copy, not a rename: the process that was taken for dead may still write.
        for name, size in sizes.items():
            with (folder / name).open("rb") as old, (self.folder / name).open("wb") as new:
                while size and (block := old.read(min(size, 1 << 24))):
                    new.write(block)
                    size -= len(block)
                assert not size, f"{folder / name} became shorter while it was copied"
        log.info("resuming after the %d rows that an earlier start finished", self.state["rows"])


def _read_leftover(
    folder: Path, names: list[str]
) -> tuple[dict[str, Any], dict[str, int], Path] | None:
    """Return what a leftover has saved: its state, its files' sizes, and its folder; None for one
    that has saved nothing, or something else than was saved: rows would be left out in silence."""
    path = folder / PROGRESS
    if not path.is_file():
        return None
    try:
        state = read_object(path.read_bytes()) or {}
        if state.pop("xxh3") != _checksum(state):
            raise ValueError("its checksum does not match")
        sizes = state.pop("sizes")
        if sizes.keys() != set(names):  # another name may lead out of the folder
            raise ValueError("it names other files")
        for name, size in sizes.items():
            if not 0 <= size <= (folder / name).stat().st_size:
                raise ValueError(f"{name} is shorter than it was")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        log.warning("%s: damaged (%s), so that its rows are done again", path, error_line(error))
        return None
    return state, sizes, folder


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())
