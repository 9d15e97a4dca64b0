"""One process builds a folder, all others wait for it: on one node or many, without a process group
(C10).

The lock is a file beside the folder, touched every second by a thread of its owner. Locks are
numbered, and whoever creates the next number owns it, so two that find the same owner dead cannot
both take over. No lock of the file system is needed: they do not work on every shared one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trainer.datatypes import BadInput
from trainer.dist import local_rank, log

BEAT_S = 1.0  # between touches
STALE_S = (
    15.0  # an owner silent for so long is dead; by the waiter's own clock, as nodes' clocks differ
)
POLL_S = 0.2
PATIENCE_S = 3.0  # for which other local ranks leave the work to local rank 0, which shows progress
SAVE_EVERY_S = 5.0  # between points from which a build can be resumed
PROGRESS = "progress.json"  # in a staging folder: the state of ResumableFiles

Build = Callable[[Path, list[Path], Callable[[], None]], None]
"""build(staging, leftovers, check): makes and fills the folder `staging`, perhaps from what killed
builds left; calls `check` between pieces of work, which raises when another process has taken over.
"""


class Stopped(RuntimeError):
    """The build was asked to stop. What is done is kept for the next start."""


def build_once(
    folder: Path, build: Build, what: str, stopping: Callable[[], bool] = lambda: False
) -> None:
    """Return when `folder` is there and whole: built here, or by another process that this one
    waits for.

    A build that is killed, or raises Stopped, leaves its staging folder to the next start; one that
    fails otherwise leaves nothing.

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
                f"data.cache to another folder"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise BadInput(
                f"{folder.parent}: cannot be written ({error.strerror}); set data.cache to a "
                f"folder that can"
            ) from error
        raise


def _build(folder: Path, build: Build, lock: _Lock) -> None:
    if folder.is_dir():  # published between our look and our lock
        return
    leftovers = sorted(folder.parent.glob(f"{folder.name}.build-*"))
    staging = folder.with_name(f"{folder.name}.build-{uuid.uuid4().hex[:12]}")
    try:
        build(staging, leftovers, lock.check)
        lock.check()
        sync_folder(staging)
        staging.rename(folder)
        sync_folder(folder.parent)
    except Stopped:
        raise
    except Exception:
        shutil.rmtree(staging, ignore_errors=True)
        if lock.is_ours():
            raise
        log.info(
            "another process took over %s; waiting for it", folder
        )  # as this one was taken for dead
        return
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)


def _acquire(folder: Path, what: str, stopping: Callable[[], bool]) -> _Lock | None:
    """The lock; or None, when the folder was published meanwhile. Waits for an owner as long as it
    is alive.
    """
    started = seen_at = time.monotonic()
    seen: tuple[int, int] | None = None
    told = False
    while not folder.is_dir():
        if stopping():
            raise Stopped(f"stopped while waiting for another process that is {what}")
        newest = _newest_lock(folder)
        now = time.monotonic()
        if newest == 0:
            if local_rank() == 0 or now - started > PATIENCE_S:
                lock = _create(folder, 1)
                if lock is not None:
                    return lock
        elif (beat := (newest, _last_beat(folder, newest))) != seen:
            seen, seen_at = beat, now
        elif now - seen_at > STALE_S:
            lock = _create(folder, newest + 1)
            if lock is not None:
                log.info("taking over from a process that died while %s", what)
                return lock
        if newest and not told:
            told = True
            log.info("waiting for %s, which is %s", _owner(folder, newest), what)
        time.sleep(POLL_S)
    return None


class _Lock:
    """An owned lock file and the thread that touches it."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock-heartbeat", daemon=True)
        self._thread.start()

    def __enter__(self) -> _Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for number in range(1, self._number + 1):
            _lock_path(self._folder, number).unlink(missing_ok=True)

    def is_ours(self) -> bool:
        return _newest_lock(self._folder) == self._number

    def check(self) -> None:
        """Raise when another process has taken over, because this one stood still for too long."""
        if not self.is_ours():
            raise RuntimeError(f"{self._folder}: another process has taken over the work")

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                os.utime(_lock_path(self._folder, self._number))
            except (
                FileNotFoundError
            ):  # taken over, and that build has ended: `check` tells the owner
                return


def _create(folder: Path, number: int) -> _Lock | None:
    """The lock of that number, or None where another process was faster."""
    try:
        descriptor = os.open(_lock_path(folder, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return None
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{socket.gethostname()} (process {os.getpid()})")
    return _Lock(folder, number)


def _lock_path(folder: Path, number: int) -> Path:
    return folder.with_name(f"{folder.name}.lock-{number:06d}")


def _newest_lock(folder: Path) -> int:
    """The highest number there is, or 0."""
    return max(
        (int(path.name[-6:]) for path in folder.parent.glob(f"{folder.name}.lock-*")), default=0
    )


def _last_beat(folder: Path, number: int) -> int:
    """Modification time in ns; opening the file makes a network file system look it up anew. 0
    where it is gone.
    """
    try:
        with _lock_path(folder, number).open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _owner(folder: Path, number: int) -> str:
    try:
        return _lock_path(folder, number).read_text() or "another process"
    except FileNotFoundError:
        return "another process"


def write_synced(path: Path, text: str) -> None:
    """Replace a small file at once: whoever is killed meanwhile leaves the old one or the new one."""
    aside = path.with_name(f".{path.name}.new")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        self._copy_leftover(leftovers)
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
        write_synced(self.folder / PROGRESS, json.dumps(state, ensure_ascii=False))
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

    def _copy_leftover(self, leftovers: list[Path]) -> None:
        paths = [path for folder in leftovers if (path := folder / PROGRESS).is_file()]
        states = [(json.loads(path.read_text(encoding="utf-8")), path.parent) for path in paths]
        if not states:
            return
        self.state, folder = max(states, key=lambda found: found[0]["rows"])
        # A copy, not a rename: the process that was taken for dead may still write.
        for name, size in self.state.pop("sizes").items():
            with (folder / name).open("rb") as old, (self.folder / name).open("wb") as new:
                while size and (block := old.read(min(size, 1 << 24))):
                    new.write(block)
                    size -= len(block)
                assert not size, f"{folder / name} is shorter than it was when it was saved"
        log.info("resuming after the %d rows that an earlier start finished", self.state["rows"])
