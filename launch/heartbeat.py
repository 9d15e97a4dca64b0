"""Whether the other launchers of a run are there: heartbeats through the store of the rendezvous.

A killed process resets its connections, and its peers' workers fail at once. A host that dies, or
whose link is cut, resets nothing: workers wait for it in a collective for as long as NCCL's and
gloo's patience lasts.
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

BEAT_S = 2.0  # between heartbeats
# a launcher silent for so long is gone; by the listener's own clock, as nodes' clocks differ
SILENT_S = 20.0
JUDGE_S = 1.0
_NOT_YET = "0"


class Peers:
    """One round's launchers, this one's heartbeat among them.

    Args:
        store: of the round, and of this object alone: a store serves one thread at a time.
        node: this launcher's number among `nodes`.
        lost: called once with the silent launchers' names.
        cut_off: called once with the reason why this launcher is the one to give up.
    """

    def __init__(
        self,
        store: Any,
        node: int,
        nodes: int,
        lost: Callable[[str], None],
        cut_off: Callable[[str], None],
    ) -> None:
        self._store, self._node, self._lost, self._cut_off = store, node, lost, cut_off
        now = time.monotonic()
        self._answered_at = now  # the store's last answer
        self._beats = [_NOT_YET.encode()] * nodes
        self._heard_at = [now] * nodes
        self._closed = threading.Event()
        # two threads: an answer from a host that is gone may be waited for without end
        for work in (self._beat, self._judge):
            threading.Thread(target=work, name=f"peers-{work.__name__}", daemon=True).start()

    def close(self) -> None:
        """From here on nobody is missed."""
        self._closed.set()

    def _beat(self) -> None:
        keys = [f"packhorse/beat/{node}" for node in range(len(self._beats))]
        for number in itertools.count(1):
            try:
                self._store.set(keys[self._node], f"{number} {socket.gethostname()}")
                if number == 1:
                    for key in keys:  # reading a key that is not there would wait for it
                        self._store.compare_set(key, "", _NOT_YET)
                beats = self._store.multi_get(keys)
            except RuntimeError:  # no store: the judge counts the seconds
                beats = None
            if beats is not None:
                now = self._answered_at = time.monotonic()
                for node, beat in enumerate(beats):
                    if beat != self._beats[node]:
                        self._beats[node], self._heard_at[node] = beat, now
            if self._closed.wait(BEAT_S):
                return

    def _judge(self) -> None:
        while not self._closed.wait(JUDGE_S):
            now = time.monotonic()
            silent = [
                node for node, heard_at in enumerate(self._heard_at) if now - heard_at > SILENT_S
            ]
            unanswered_s = now - self._answered_at
            if unanswered_s > SILENT_S:
                self._cut_off(f"the rendezvous has not answered for {SILENT_S:.0f} s")
            elif (
                not silent or unanswered_s > SILENT_S / 4
            ):  # without the rendezvous nobody is heard
                continue
            elif not link_is_up():
                self._cut_off("this host's network is down")
            else:
                self._lost(", ".join(map(self._name, silent)))
            return

    def _name(self, node: int) -> str:
        return self._beats[node].decode().partition(" ")[2] or f"node {node}"


def link_is_up() -> bool:
    """Whether any network interface but the loopback has a carrier. The host of the rendezvous
    hears nobody when its own link is cut, too, and must not take itself for the only one left."""
    get_flags, loopback, up_and_running = (
        0x8913,
        0x8,
        0x41,
    )  # SIOCGIFFLAGS, IFF_LOOPBACK, IFF_UP | IFF_RUNNING
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            answer = fcntl.ioctl(probe, get_flags, struct.pack("40s", name.encode()))
            (flags,) = struct.unpack_from("H", answer, 16)
            if not flags & loopback and flags & up_and_running == up_and_running:
                return True
    return False
