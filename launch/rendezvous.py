"""Let the launchers of a run meet, so that nobody else gets a word in.

In: where to meet, and for several nodes the secret in the run folder. Out: torch's rendezvous
handler. One node asks nobody: its ranks meet at 127.0.0.1. Several nodes meet in a store of torch
(TCPStore) at the rendezvous host, where every value is signed (launch/signed_store.py). What is
protected, and what is not, is in docs/security.md.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import HashStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)
from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname

from packhorse.launch.signed_store import SignedStore, read_secret
from packhorse.trainer.datatypes import BadInput

_LOOPBACK = "127.0.0.1"
_LAST_CALL_S = 15  # to wait for further nodes after the least number has come
_STORE_S = 30  # to wait for an answer of the rendezvous host


def meet(
    endpoint: str,
    nodes: tuple[int, int],
    is_host: bool | None,
    run_id: str,
    join_s: int,
    run_dir: Path,
    log: Callable[[str], None],
) -> RendezvousHandler:
    """Return the rendezvous; of several nodes the host starts its store, others connect to it.

    Args:
        nodes: the least and the most that meet.
        is_host: whether this node is the rendezvous host. None: torch compares the endpoint's name
            with this host's.
        join_s: seconds to wait for the host, and then for the least number of nodes.
        run_dir: holds the secret; all nodes share it.

    Raises:
        BadInput: nobody answers at the endpoint, or the secret cannot be used.
        Forged: the store holds a value that another secret, or none, has signed.
    """
    if nodes[1] == 1:
        return _OneNode(run_id, int(endpoint.rpartition(":")[2]))
    secret = read_secret(run_dir)
    store = SignedStore(_open_store(endpoint, is_host, time.monotonic() + join_s, log), secret)
    backend: Any = C10dRendezvousBackend(store, run_id)  # pyright: ignore[reportArgumentType]
    timeout = RendezvousTimeout(
        join=timedelta(seconds=join_s), last_call=timedelta(seconds=_LAST_CALL_S)
    )
    return _SeveralNodes.from_backend(run_id, store, backend, *nodes, timeout=timeout)  # pyright: ignore[reportArgumentType]


class _SeveralNodes(DynamicRendezvousHandler):
    """torch's rendezvous over a SignedStore."""

    def next_rendezvous(self) -> RendezvousInfo:
        # torch 2.13 keeps the workers' store from round to round, with addresses of processes that
        # have ended; nodes other than the first also keep the address of the store's host.
        self._bootstrap_store_info = self._shared_tcp_store_server = None
        return super().next_rendezvous()

    def _wrap_store(self, store: Any) -> Any:
        return store.under(f"{self._settings.run_id}.{self._state_holder.state.round}")

    def _create_tcp_store_server(self, master_addr: str, master_port: int) -> TCPStore:
        return _serve(master_addr, master_port)


class _OneNode(RendezvousHandler):
    """The rendezvous of a single node: the launcher's store is no port, the workers' one is local.

    Args:
        port: of 127.0.0.1, where the ranks meet. 0 takes a free one.
    """

    def __init__(self, run_id: str, port: int) -> None:
        self._run_id, self._port = run_id, port
        self._server: TCPStore | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        self._server = None  # closes the last round's, with addresses of processes that have ended
        self._server = _serve(_LOOPBACK, self._port)
        where = RendezvousStoreInfo(_LOOPBACK, self._server.port)
        return RendezvousInfo(HashStore(), 0, 1, where)

    def get_backend(self) -> str:
        return "none"

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_run_id(self) -> str:
        return self._run_id

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        self._server = None
        return True


# ------------------------------------------------------------------------------------------- store


def _open_store(
    endpoint: str, is_host: bool | None, end: float, log: Callable[[str], None]
) -> TCPStore:
    """Start the store at the endpoint if this is the host, else connect to it."""
    host, _, port = endpoint.rpartition(":")
    if is_host is not False and (is_host or _matches_machine_hostname(host)):
        while True:
            try:
                return _serve(host, int(port), timedelta(seconds=_STORE_S), log)
            except OSError as error:
                if is_host is None and error.errno == errno.EADDRINUSE:
                    break  # another launcher of this machine is the host
                if time.monotonic() > end:
                    raise BadInput(f"{endpoint}: the port cannot be used ({error})") from None
            time.sleep(1)
    _wait_for_host(endpoint, end, log)
    opened: list[TCPStore] = []

    def connect() -> None:
        limit = timedelta(seconds=_STORE_S)
        with suppress(RuntimeError, ValueError):
            opened.append(TCPStore(host, int(port), is_master=False, timeout=limit))

    # torch waits without end for one that takes the connection and never answers
    thread = threading.Thread(target=connect, name="rendezvous", daemon=True)
    thread.start()
    thread.join(2 * _STORE_S)
    if not opened:
        raise BadInput(_nobody_answers(endpoint))
    return opened[0]


def _serve(
    host: str,
    port: int,
    timeout: timedelta = timedelta(minutes=5),
    log: Callable[[str], None] = lambda _: None,
) -> TCPStore:
    """Start a store that listens on the one address that `host` is; torch's own takes them all."""
    found: Any = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # of a name that has both kinds, all nodes can reach the older one
    family, *_, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    is_local = ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
    if is_local and host != "localhost" and not host.startswith("127."):
        # as /etc/hosts of Debian says of a machine's own name; other nodes know another address
        listening = _listen_everywhere(port, log, f"{host} is {address[0]} on this node")
    else:
        try:
            listening = socket.create_server(address[:2], family=family, backlog=4096)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            why = f"{address[0]}, which {host} is, is no address of this node"
            listening = _listen_everywhere(port, log, why)
    with listening:
        port = listening.getsockname()[1]
        return TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timeout,
            master_listen_fd=os.dup(listening.fileno()),
        )


def _listen_everywhere(port: int, log: Callable[[str], None], why: str) -> socket.socket:
    log(f"the rendezvous listens on all addresses of this node: {why}")
    return socket.create_server(("", port), backlog=4096)


def _wait_for_host(endpoint: str, end: float, log: Callable[[str], None]) -> None:
    """Wait until the rendezvous host listens. Torch's store would wait, too, but fills the log."""
    host, _, port = endpoint.rpartition(":")
    is_logged = False
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=_STORE_S).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise BadInput(_nobody_answers(endpoint)) from None
            if not is_logged:
                log(f"waiting for the rendezvous host at {endpoint} ({error})")
            is_logged = True
            time.sleep(1)


def _nobody_answers(endpoint: str) -> str:
    return f"nobody answers at {endpoint}: is it a node of this run, and can this node reach it?"
