"""One process builds a folder, all others wait for it: on one node or many, without a process group
(C10).

The lock is a file beside the folder, touched every second by a thread of its owner. Locks are
numbered, and whoever creates the next number owns it, so two that find the same owner dead cannot
both take over. No lock of the file system is needed: they do not work on every shared one.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from trainer.datatypes import BadInput
from trainer.dist import local_rank, log

BEAT_S = 1.0  # between touches
STALE_S = (
    15.0  # an owner silent for so long is dead; by the waiter's own clock, as nodes' clocks differ
)
POLL_S = 0.2
PATIENCE_S = 3.0  # for which other local ranks leave the work to local rank 0, which shows progress

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


def local_folder(name: str, option: str) -> Path | None:
    """Return the folder that a model's name means, or None if it is a name on the hub.

    Args:
        option: what the user gave the name as, for the message.

    Raises:
        BadInput: the name can only be a path, and there is no such folder.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    # a name on the hub is `owner/model` or `model`
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BadInput(f"{option}: there is no folder {folder}; give another or a hub name")
    return None
