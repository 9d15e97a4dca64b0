"""Let one process at a time own a folder, on any file system that its machines share.

A lease is a numbered file beside the work: `thing.lock-000001`. Creating it with O_EXCL decides
between two processes, on network file systems too, where file locks often do not work. Its owner
touches it once a second. Whoever finds it silent for STALE_S, or its owner gone from this machine,
creates the next number and deletes the earlier ones. The number is a fencing token: an owner that
stood still meanwhile (SIGSTOP, a hung mount) finds its own file gone, and must not write any more.

A run folder is owned by rank 0 of the training there. Every writer of files.py and json_lines.py
asks first (`require_owned`), so that of two trainings in one folder only one can write.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.dist import log

BEAT_S = 1.0  # between two touches of a lease
# An owner that is silent for so long is dead. Measured on the waiter's own clock, because the
# clocks of nodes differ.
STALE_S = 15.0
POLL_S = 0.2
_MOST_BYTES = 1 << 16  # of a lease, which has a few hundred
SILENT_S = 60.0  # for `is_alive`, which compares with this machine's clock: clocks differ a bit

State = Literal["none", "unsure", "alive", "dead"]


class Lease:
    """An owned lease file and the thread that touches it. Leaving it gives the lease back.

    Args:
        stem: the path of the file without its number.
        text: what the file holds, which no other lease does.
    """

    def __init__(self, stem: Path, number: int, text: str) -> None:
        self._stem, self._number, self._text = stem, number, text
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(OSError):  # an error of the work itself matters more
            # else the file is another owner's
            if _read(self._stem, self._number) == self._text:
                _delete_up_to(self._stem, self._number)

    def is_ours(self) -> bool:
        """Return whether no other process has taken over. Opening the file makes a network file
        system ask for its present state."""
        is_followed = _path(self._stem, self._number + 1).exists()
        return not is_followed and _read(self._stem, self._number) == self._text

    def check(self) -> None:
        """Raise if another process has taken over, because this one stood still for too long."""
        if not self.is_ours():
            raise RuntimeError(f"{self._stem}: another process has taken over the work")

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                os.utime(_path(self._stem, self._number))
            except FileNotFoundError:
                return  # another process has taken over: `check` tells the owner
            except OSError:  # the file system is away for a moment, which must not end the work
                continue


def take(stem: Path, number: int) -> Lease | None:
    """Return the lease of that number, or None if another process was faster."""
    text = f"{socket.gethostname()} (process {os.getpid()})\n{_identity(os.getpid())}\n"
    text += secrets.token_hex(8)
    try:
        descriptor = os.open(_path(stem, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return None
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    _delete_up_to(stem, number - 1)
    return Lease(stem, number, text)


class Rival:
    """The owner of a lease, as seen by a process that would like to have it."""

    def __init__(self, stem: Path) -> None:
        self._stem = stem
        self.number = 0  # of the lease that was last looked at
        self._seen: tuple[int, int] | None = None
        self._seen_at = 0.0
        self._has_beaten = False

    def look(self) -> State:
        """Return whether there is an owner, and what is known of it since the first look."""
        self.number = _newest(self._stem)
        if not self.number:
            return "none"
        beat, now = (self.number, _last_beat(self._stem, self.number)), time.monotonic()
        if beat != self._seen:
            self._has_beaten = self._seen is not None
            self._seen, self._seen_at = beat, now
        elif now - self._seen_at > STALE_S:
            return "dead"
        if _is_gone(_read(self._stem, self.number)):
            return "dead"
        return "alive" if self._has_beaten else "unsure"

    @property
    def name(self) -> str:
        """The host and the number of the process."""
        return _read(self._stem, self.number).partition("\n")[0] or "another process"


# ----------------------------------------------------------------------------------------- the file


def _path(stem: Path, number: int) -> Path:
    return stem.with_name(f"{stem.name}-{number:06d}")


def _newest(stem: Path) -> int:
    """Return the highest number of a lease, or 0 if there is none."""
    numbers = (path.name[-6:] for path in stem.parent.glob(f"{stem.name}-" + "[0-9]" * 6))
    return max(map(int, numbers), default=0)


def _delete_up_to(stem: Path, number: int) -> None:
    for path in stem.parent.glob(f"{stem.name}-" + "[0-9]" * 6):
        if int(path.name[-6:]) <= number:
            path.unlink(missing_ok=True)


def _last_beat(stem: Path, number: int) -> int:
    """Return the lease's modification time in ns, or 0 if it is gone."""
    try:
        # opening the file makes a network file system ask for its attributes anew
        with _open(_path(stem, number)) as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _read(stem: Path, number: int) -> str:
    try:
        with _open(_path(stem, number)) as file:
            return (file.read(_MOST_BYTES) or b"").decode(errors="replace")
    except FileNotFoundError:
        return ""


def _open(path: Path) -> IO[bytes]:
    """Open a lease's file to read. What else has its name is no lease, and not waited for.

    Raises:
        FileNotFoundError: there is no such file.
    """
    # Not opened by O_NONBLOCK: that fails where a file server holds a lease of the kernel on it.
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    return path.open("rb")


def _identity(pid: int) -> str:
    """Return what tells a living process from all others: of which kernel and namespace, and when
    it started; an empty text if there is none, or the system does not say."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
        # after the name, which may hold anything: state (field 3), ..., start time (field 22)
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{kernel} {space} {pid} {fields[19]}"


def _is_gone(text: str) -> bool:
    """Return whether the lease's owner ran on this machine and has ended: nobody must wait."""
    identity = text.partition("\n")[2].partition("\n")[0].split()
    mine = _identity(os.getpid()).split()
    if len(identity) != 4 or identity[:2] != mine[:2] or not identity[2].isdigit():
        return False
    return _identity(int(identity[2])).split() != identity


# -------------------------------------------------------------------------------------- run folders

_RUN = ".lease"  # in a run folder, before the number
_fence: tuple[Path, Lease] | None = None  # the run folder that this process owns


@contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """Own a run folder while the block runs: no other process may train there.

    Raises:
        BadInput: another process trains there, or the folder cannot be written.
    """
    global _fence
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lease = _take_run_folder(run_dir)
    except OSError as error:
        raise BadInput(f"run.dir: {run_dir} cannot be written ({error})") from None
    with lease:
        _fence = (Path(os.path.abspath(run_dir)), lease)
        try:
            yield
        finally:
            _fence = None


def _take_run_folder(run_dir: Path) -> Lease:
    rival, is_announced = Rival(run_dir / _RUN), False
    while True:
        state = rival.look()
        if state == "alive":
            raise BadInput(
                f"run.dir: {rival.name} is training in {run_dir}; wait for its end or stop it, or "
                "give another run.dir"
            )
        if state in ("none", "dead"):
            lease = take(run_dir / _RUN, rival.number + 1)
            if lease is not None:
                return lease
        elif not is_announced:
            is_announced = True
            log.info(
                "%s was training in %s: waiting for a sign of life, %.0f s at most",
                *(rival.name, run_dir, STALE_S),
            )
        time.sleep(POLL_S)


def require_owned(path: Path) -> None:
    """Check, before something below this process's run folder is written, that it is still its own.

    Raises:
        BadInput: another training has taken over, because this process stood still for too long.
    """
    if _fence is None or not Path(os.path.abspath(path)).is_relative_to(_fence[0]):
        return
    run_dir, lease = _fence
    if not lease.is_ours():
        raise BadInput(
            f"run.dir: this process stood still, and another one has taken over {run_dir}; this "
            "one writes nothing more"
        )


def is_alive(run_dir: Path) -> bool:
    """Return whether a process trains in the folder: one that is not known to have ended has beaten
    within the last SILENT_S."""
    number = _newest(run_dir / _RUN)
    age_s = time.time() - _last_beat(run_dir / _RUN, number) / 1e9
    return number > 0 and age_s < SILENT_S and not _is_gone(_read(run_dir / _RUN, number))


def last_sign(run_dir: Path) -> float:
    """Return when a process that trains there, or was killed, last beat: s since 1970, or 0."""
    number = _newest(run_dir / _RUN)
    return _last_beat(run_dir / _RUN, number) / 1e9 if number else 0.0
