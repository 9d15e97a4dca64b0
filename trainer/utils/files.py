"""Files and folders that are there whole or not at all, and JSON files and JSON lines (C7, C10).

`build_once` lets one process build a folder while all others wait for it, on one node or on many,
without a process group, by a lease (utils/lease.py).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import xxhash

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.dist import local_rank, log
from packhorse.trainer.utils.lease import Lease, Rival, require_owned, take

POLL_S = 0.2
PATIENCE_S = 3.0  # how long other local ranks leave the build to local rank 0, which shows progress
SAVE_EVERY_S = 5.0  # between points from which a build can be resumed
PROGRESS = "progress.json"  # in a staging folder: the state of ResumableFiles

Build = Callable[[Path, list[Path], Callable[[], None]], None]
"""build(staging, leftovers, check): make and fill the folder `staging`, perhaps from `leftovers` of
interrupted builds. It calls `check` between pieces of work, which raises when another process has
taken over.
"""


Check = Callable[[dict[str, Any]], None]
"""check(line) raises LookupError or TypeError for a damaged line, as in utils/log_lines.py."""


class Stopped(RuntimeError):
    """The build was asked to stop. What is done is kept for the next start."""


# ---------------------------------------------------------------------------------- whole or absent


@contextmanager
def replace_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Give a file, UTF-8 or with `wb` binary, that replaces `path` at once when the block ends
    without an error.

    A process that is killed meanwhile leaves the old file or the new one, also after a power cut.
    """
    require_owned(path)
    aside = path.with_name(f".{path.name}.new")
    # What a kill left there, or a stranger put: a link would be followed, and a pipe waited for.
    aside.unlink(missing_ok=True)
    with aside.open(mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.flush()
        # before the rename: else a power cut could leave the new name with no content
        os.fsync(file.fileno())
    require_owned(path)
    aside.replace(path)


def write_synced(path: Path, text: str) -> None:
    """Replace a small file at once: an interruption leaves the old one or the new one."""
    with replace_file(path) as file:
        file.write(text)


def write_json(path: Path, content: Any) -> None:
    """Replace a file at once with `content` as indented JSON."""
    write_synced(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def append_json_lines(path: Path, contents: Iterable[Any], *, sync: bool = False) -> None:
    """Append lines to a file of JSON lines, which a kill of this process does not take back.

    Args:
        sync: a power cut does not either, once this has returned.
    """
    require_owned(path)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in contents))
        if sync:
            file.flush()
            os.fsync(file.fileno())


def read_json_lines(
    path: Path, *, skip_damaged: bool = False, check: Check = lambda _: None
) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines; an empty list if there is no file.

    Args:
        skip_damaged: leave out lines that are no JSON object, as the last one may be while a run
            writes, or once it was killed, and those that `check` finds damaged.

    Raises:
        ValueError: a line is damaged, and `skip_damaged` is false.
    """
    found = []
    for line in _lines(path):
        fields = _read_object(line)
        try:
            if fields is None:
                raise TypeError("no JSON object")
            check(fields)
        except (LookupError, TypeError) as error:
            if not skip_damaged:
                raise ValueError(f"{path}: {line[:100]!r} is damaged ({error})") from None
        else:
            found.append(fields)
    return found


def read_json_file(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file; an empty one if there is no file.

    Raises:
        BadInput: it holds anything else.
    """
    if not path.is_file():
        return {}
    found = _read_object(path.read_bytes())
    if found is None:
        raise BadInput(f"{path}: damaged, it holds no JSON object; put it back, or remove it")
    return found


def cut_json_lines(
    path: Path, is_kept: Callable[[dict[str, Any]], bool], check: Check = lambda _: None
) -> None:
    """Keep the lines of a file of JSON lines that `is_kept` wants, unchanged.

    Lines that are no JSON object, or that `check` finds damaged, are moved to a file beside it, and
    that is said; a last line without an end, as a killed run leaves it, is dropped. `is_kept` may
    find them damaged, too, as `check` does.
    """
    if not path.is_file():
        return
    kept, damaged = [], []
    for line in _lines(path):
        fields = _read_object(line)
        try:
            if fields is None:
                raise TypeError
            check(fields)
            if is_kept(fields):
                kept.append(line.removesuffix(b"\n") + b"\n")
        except (LookupError, TypeError):
            if line.endswith(b"\n"):
                damaged.append(line)
    if damaged:
        aside = path.with_name(f"{path.name}.damaged")
        if os.path.lexists(aside) and (aside.is_symlink() or not aside.is_file()):
            raise BadInput(f"{aside}: is no plain file, to set damaged lines aside; move it away")
        require_owned(aside)
        with aside.open("ab") as file:
            file.writelines(damaged)
        log.warning("%s: %d damaged lines are set aside in %s", path, len(damaged), aside.name)
    with replace_file(path, "wb") as file:
        file.writelines(kept)


def _lines(path: Path) -> list[bytes]:
    # As bytes end at \n and \r alone: an answer may hold U+2028, at which a text would end, too.
    return path.read_bytes().splitlines(keepends=True) if path.is_file() else []


def _read_object(line: bytes) -> dict[str, Any] | None:
    """Return the object that a line holds, or None if it holds anything else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, or nested too deeply
        return None
    return found if isinstance(found, dict) else None


def checksum(path: Path) -> str:
    """Return a file's checksum (xxh3-128), read at disk speed."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            hasher.update(block)
    return hasher.hexdigest()


def sync_file(path: Path) -> None:
    """Bring a file to the disk, if there is one."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def publish_folder(staged: Path, folder: Path) -> None:
    """Rename `staged` to `folder`, which must not exist; the rename survives a power cut."""
    sync_folder(staged)
    require_owned(folder)
    staged.rename(folder)
    sync_folder(folder.parent)


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
