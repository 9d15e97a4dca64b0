"""Tell whether the other launchers of a run are alive, by heartbeats through the rendezvous store.

A killed process resets its connections, so that the other nodes' workers fail at once. A host that
dies, or loses its network, resets nothing: workers would wait for it in a collective until NCCL's
or gloo's timeout.
"""

from __future__ import annotations

import fcntl
import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from packhorse.launch.signed_store import Forged

BEAT_S = 2.0  # between heartbeats
# A launcher without a heartbeat for this long is lost. The listener's own clock counts, because the
# clocks of nodes differ.
SILENT_S = 20.0
CHECK_S = 1.0
_NOT_YET = "0"  # the beat of a launcher that has not written one


class Heartbeat:
    """Send this launcher's heartbeat and watch those of the others, for one round.

    Args:
        store: the round's store. No other thread may use this connection.
        node: this launcher's number among `nodes`.
        on_lost: called once, with the hosts whose heartbeats stopped.
        on_cut_off: called once, with the reason why this launcher is the one that must give up.
    """

    def __init__(
        self,
        store: Any,
        node: int,
        nodes: int,
        on_lost: Callable[[str], None],
        on_cut_off: Callable[[str], None],
    ) -> None:
        self._store, self._node, self._on_lost, self._on_cut_off = store, node, on_lost, on_cut_off
        now = time.monotonic()
        self._answered_at = now  # the store's last answer
        self._beats = [_NOT_YET.encode()] * nodes
        self._heard_at = [now] * nodes
        self._closed = threading.Event()
        # Two threads, because a call to a store whose host is gone may never return.
        for work in (self._beat, self._check):
            threading.Thread(target=work, name=f"heartbeat-{work.__name__}", daemon=True).start()

    def close(self) -> None:
        """Stop sending and watching."""
        self._closed.set()

    def _beat(self) -> None:
        keys = [f"packhorse/beat/{node}" for node in range(len(self._beats))]
        for number in itertools.count(1):
            try:
                self._store.set(keys[self._node], f"{number} {socket.gethostname()}")
                if number == 1:
                    for key in keys:  # reading a missing key would wait for it
                        self._store.compare_set(key, "", _NOT_YET)
                beats = self._store.multi_get(keys)
            except Forged as error:
                self._on_cut_off(str(error))
                return
            except RuntimeError:  # no connection; `_check` counts the seconds
                beats = None
            if beats is not None:
                now = self._answered_at = time.monotonic()
                for node, beat in enumerate(beats):
                    if beat != self._beats[node]:
                        self._beats[node], self._heard_at[node] = beat, now
            if self._closed.wait(BEAT_S):
                return

    def _check(self) -> None:
        while not self._closed.wait(CHECK_S):
            now = time.monotonic()
            silent = [node for node, at in enumerate(self._heard_at) if now - at > SILENT_S]
            unanswered_s = now - self._answered_at
            if unanswered_s > SILENT_S:
                self._on_cut_off(f"the rendezvous host has not answered for {SILENT_S:.0f} s")
            elif not silent or unanswered_s > SILENT_S / 4:
                # without the rendezvous host no heartbeat arrives, so that silence proves nothing
                continue
            elif not link_is_up():
                self._on_cut_off("the network of this host is down")
            else:
                self._on_lost(", ".join(map(self._host_of, silent)))
            return

    def _host_of(self, node: int) -> str:
        return self._beats[node].decode().partition(" ")[2] or f"node {node}"


def link_is_up() -> bool:
    """Return whether a network interface other than the loopback has a carrier.

    A rendezvous host whose own link is cut hears nobody, just as if all others had died. It must
    not take itself for the only one left.
    """
    get_flags = 0x8913  # SIOCGIFFLAGS
    loopback, up_and_running = 0x8, 0x41  # IFF_LOOPBACK, IFF_UP | IFF_RUNNING
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            answer = fcntl.ioctl(probe, get_flags, struct.pack("40s", name.encode()))
            (flags,) = struct.unpack_from("H", answer, 16)
            if not flags & loopback and flags & up_and_running == up_and_running:
                return True
    return False
