"""Files and folders that are there whole or not at all, and JSON files and JSON lines (C7, C10).

`build_once` lets one process build a folder while all others wait for it, on one node or on many,
without a process group. The lock is a file beside the folder, and a thread of its owner touches it
every second. Locks are numbered, and whoever creates the next number owns it, so two processes that
find the same owner dead cannot both take over. File-system locks are not used: they do not work on
every shared file system.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.dist import local_rank, log

BEAT_S = 1.0  # between two touches of a lock
# An owner that is silent for so long is dead. Measured on the waiter's own clock, because the
# clocks of nodes differ.
STALE_S = 15.0
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


# ---------------------------------------------------------------------------------- whole or absent


@contextmanager
def replace_file(path: Path) -> Iterator[TextIO]:
    """Give a text file that replaces `path` at once when the block ends without an error.

    A process that is killed meanwhile leaves the old file or the new one, also after a power cut.
    """
    aside = path.with_name(f".{path.name}.new")
    with aside.open("w", encoding="utf-8") as file:
        yield file
        file.flush()
        # before the rename: else a power cut could leave the new name with no content
        os.fsync(file.fileno())
    aside.replace(path)


def write_synced(path: Path, text: str) -> None:
    """Replace a small file at once: an interruption leaves the old one or the new one."""
    with replace_file(path) as file:
        file.write(text)


def write_json(path: Path, content: Any) -> None:
    """Replace a file at once with `content` as indented JSON."""
    write_synced(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def append_json_line(path: Path, content: Any) -> None:
    """Append a line to a file of JSON lines. It is on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path, *, may_be_torn: bool = False) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines; an empty list if there is no file.

    Args:
        may_be_torn: end at the first incomplete line, as a killed or a running writer leaves it.

    Raises:
        ValueError: a line is not JSON, and `may_be_torn` is false.
    """
    found: list[dict[str, Any]] = []
    if not path.is_file():
        return found
    # A torn line may end inside a character. Not `splitlines`: an answer may hold U+2028, which
    # that takes for the end of a line.
    with path.open(encoding="utf-8", errors="replace" if may_be_torn else "strict") as file:
        for line in file:
            try:
                found.append(json.loads(line))
            except ValueError:
                if may_be_torn:
                    break
                raise
    return found


def publish_folder(staged: Path, folder: Path) -> None:
    """Rename `staged` to `folder`, which must not exist; the rename survives a power cut."""
    sync_folder(staged)
    staged.rename(folder)
    sync_folder(folder.parent)


def apply_umask(folder: Path) -> None:
    """Give the files of a folder the mode of a new file there, as the umask or an ACL says.

    Safetensors writes through temporary files, which only their owner may read.
    """
    probe = folder / f".mode-{uuid.uuid4().hex}"
    probe.touch()  # not os.umask: a process has only one, and reading it means to set it
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        is_file = path.is_file() and not path.is_symlink()
        if is_file and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --------------------------------------------------------------------------------------- build once


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


def _build(folder: Path, build: Build, lock: _Lock) -> None:
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


def _acquire(folder: Path, what: str, stopping: Callable[[], bool]) -> _Lock | None:
    """Return the lock, or None if the folder was published meanwhile.

    Waits for an owner as long as that is alive.
    """
    started = seen_at = time.monotonic()
    seen: tuple[int, int] | None = None
    is_announced = False
    while not folder.is_dir():
        if stopping():
            raise Stopped(f"stopped while waiting for another process that is {what}")
        newest = _newest_lock(folder)
        now = time.monotonic()
        if newest == 0:
            if local_rank() == 0 or now - started > PATIENCE_S:
                lock = _create_lock(folder, 1)
                if lock is not None:
                    return lock
        elif (beat := (newest, _last_beat(folder, newest))) != seen:
            seen, seen_at = beat, now
        elif now - seen_at > STALE_S:
            lock = _create_lock(folder, newest + 1)
            if lock is not None:
                log.info("taking over from a process that died while %s", what)
                return lock
        if newest and not is_announced:
            is_announced = True
            log.info("waiting for %s, which is %s", _read_owner(folder, newest), what)
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
        """Raise if another process has taken over, because this one stood still for too long."""
        if not self.is_ours():
            raise RuntimeError(f"{self._folder}: another process has taken over the work")

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                os.utime(_lock_path(self._folder, self._number))
            except FileNotFoundError:
                # Taken over by a build that has ended meanwhile: `check` tells the owner.
                return


def _create_lock(folder: Path, number: int) -> _Lock | None:
    """Return the lock of that number, or None if another process was faster."""
    try:
        # O_EXCL is what decides between two processes, on network file systems too
        descriptor = os.open(_lock_path(folder, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return None
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{socket.gethostname()} (process {os.getpid()})")
    return _Lock(folder, number)


def _lock_path(folder: Path, number: int) -> Path:
    return folder.with_name(f"{folder.name}.lock-{number:06d}")


def _newest_lock(folder: Path) -> int:
    """Return the highest number of a lock, or 0 if there is none."""
    locks = folder.parent.glob(f"{folder.name}.lock-*")
    return max((int(path.name[-6:]) for path in locks), default=0)


def _last_beat(folder: Path, number: int) -> int:
    """Return the lock's modification time in ns, or 0 if it is gone."""
    try:
        # opening the file makes a network file system ask for its attributes anew
        with _lock_path(folder, number).open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _read_owner(folder: Path, number: int) -> str:
    try:
        return _lock_path(folder, number).read_text() or "another process"
    except FileNotFoundError:
        return "another process"


# ---------------------------------------------------------------------------------------- resuming


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
        write_json(self.folder / PROGRESS, state)
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
