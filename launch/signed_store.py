"""Sign what launchers write into a store of torch, and read nothing that is not signed.

In: a store and the secret in the run folder. Out: a store with the same methods. The protocol of
TCPStore knows no password, and torch's rendezvous unpickles what it finds there: without signatures
whoever reaches the port runs code in the launcher.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed.elastic.rendezvous.api import RendezvousError

from packhorse.trainer.datatypes import BadInput

SECRET = ".rendezvous-secret"  # noqa: S105 -- its file in the run folder
_SECRET_BYTES = 32
_WHOLE_S = 10.0  # to wait for the node that writes it
_ANSWER_S = 30.0  # to wait for an answer, beside what the store itself may wait for a value
_READ_S = 5.0  # launchers look at the rendezvous every second


class Forged(RendezvousError):
    """A value in the store is not signed with this run's secret."""


def read_secret(run_dir: Path) -> bytes:
    """Return the run's secret from the run folder. The first node to come makes it.

    Raises:
        BadInput: the file cannot be made or read, is not whole, or others may read it.
    """
    path = run_dir / SECRET
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _make_secret(path)
        end = time.monotonic() + _WHOLE_S
        while True:
            mode, text = stat.S_IMODE(path.stat().st_mode), b""
            # A pipe would be waited for without end, and a device may never end. Not opened by
            # O_NONBLOCK: that fails where a file server holds a lease of the kernel on the file.
            if path.is_file():
                with path.open("rb") as file:
                    mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                    text = file.read(2 * _SECRET_BYTES + 1)
            is_whole = len(text) == 2 * _SECRET_BYTES
            # another node may be writing it at this moment
            if is_whole or time.monotonic() > end:
                break
            time.sleep(0.05)
    except OSError as error:
        raise BadInput(f"run.dir: {path} cannot be used ({error})") from None
    if mode & 0o077 or not is_whole:
        raise BadInput(
            f"run.dir: {path} must be whole, and its owner's alone (mode 0600, not {mode:04o}); "
            f"delete it, or move run.dir to a file system with modes"
        )
    return text


def _make_secret(path: Path) -> None:
    """Write a new secret unless the file is there."""
    try:
        # O_EXCL is what decides between two nodes, on network file systems too
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(_SECRET_BYTES))
        file.flush()
        os.fsync(file.fileno())


class SignedStore:
    """A store of torch whose values are signed, as far as launchers use it.

    The signature covers the name and the value: neither a value of one's own nor one of another
    name is taken. `add`, `wait` and `check` carry no values: somebody who reaches the port can
    disturb barriers by them, and end the run.
    """

    def __init__(self, store: Any, secret: bytes, prefix: str = "") -> None:
        self._store, self._secret, self._prefix = store, secret, prefix
        self.set_timeout = store.set_timeout

    def under(self, prefix: str) -> SignedStore:
        """Return the same store for names that begin with the prefix."""
        return SignedStore(self._store, self._secret, f"{self._prefix}{prefix}/")

    def clone(self) -> SignedStore:
        """Return the same store over a connection of its own."""
        return SignedStore(self._store.clone(), self._secret, self._prefix)

    @property
    def timeout(self) -> timedelta:
        return self._store.timeout

    def set(self, name: str, value: str | bytes) -> None:
        self._call("set", self._prefix + name, self._sign(name, value))

    def multi_set(self, names: Sequence[str], values: Sequence[str | bytes]) -> None:
        for name, value in zip(names, values):
            self.set(name, value)

    def get(self, name: str) -> bytes:
        return self._verify(name, self._call("get", self._prefix + name))

    def multi_get(self, names: Sequence[str]) -> list[bytes]:
        found = self._call("multi_get", [self._prefix + name for name in names])
        return [self._verify(name, signed) for name, signed in zip(names, found)]

    def compare_set(self, name: str, expected: str, desired: str) -> bytes:
        before = self._sign(name, expected) if expected else ""  # "": there is no value
        after = self._sign(name, desired)
        found = self._call("compare_set", self._prefix + name, before, after)
        return self._verify(name, found)

    def add(self, name: str, number: int) -> int:
        return self._call("add", self._prefix + name, number)

    def wait(self, names: Sequence[str], *timeout: timedelta) -> None:
        self._call("wait", [self._prefix + name for name in names], *timeout)

    def check(self, names: Sequence[str]) -> bool:
        return self._call("check", [self._prefix + name for name in names])

    def _call(self, method: str, *arguments: Any) -> Any:
        """Return what the store answers.

        It is asked in a thread: torch waits for a host that is frozen or cut off without end, and
        no signal is served meanwhile.

        Raises:
            RuntimeError: no answer, as torch's own where the connection is lost.
        """
        found: list[tuple[Any, BaseException | None]] = []

        def ask() -> None:
            try:
                found.append((getattr(self._store, method)(*arguments), None))
            except BaseException as error:
                found.append((None, error))

        waits = next((a for a in arguments if isinstance(a, timedelta)), self._store.timeout)
        limit_s = waits.total_seconds() + _ANSWER_S
        thread = threading.Thread(target=ask, name="rendezvous", daemon=True)
        thread.start()
        thread.join(limit_s)
        if not found:
            raise RuntimeError(f"the rendezvous host has not answered for {limit_s:.0f} s")
        answer, error = found[0]
        if isinstance(error, MemoryError):  # torch makes room for whatever length it is told
            raise Forged(
                "what answers at the rendezvous host is longer than memory allows: it is no "
                "launcher of this run, or somebody else writes to the port"
            ) from None
        if error is not None:
            raise error
        return answer

    def _sign(self, name: str, value: str | bytes) -> str:
        text = value.decode() if isinstance(value, bytes) else value
        full = self._prefix + name
        message = f"{len(full)} {full} {text}".encode()
        return f"{hmac.digest(self._secret, message, 'sha256').hex()} {text}"

    def _verify(self, name: str, signed: bytes) -> bytes:
        _, _, value = signed.partition(b" ")
        try:
            is_ours = hmac.compare_digest(self._sign(name, value).encode(), signed)
        except UnicodeDecodeError:
            is_ours = False
        if is_ours:
            return value
        # The nodes that meet here read it as well, while the host's store is there: none of them
        # waits in vain for this one.
        self._call("set", self._prefix + name, "forged")
        time.sleep(_READ_S)
        raise Forged(
            f"what another process wrote at the rendezvous host is not signed with the {SECRET} "
            f"that {socket.gethostname()} sees, and is not read: run.dir is not the same folder on "
            f"all nodes, or somebody else writes to the port"
        )
