"""Launchers notice lost nodes, and the one that is cut off notices that."""

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import HashStore

from packhorse.launch import heartbeat
from packhorse.launch.heartbeat import Heartbeat


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.05)
    monkeypatch.setattr(heartbeat, "SILENT_S", 1.0)
    monkeypatch.setattr(heartbeat, "CHECK_S", 0.1)
    monkeypatch.setattr(heartbeat, "link_is_up", lambda: True)


@pytest.fixture
def store() -> HashStore:
    store = HashStore()
    store.set_timeout(timedelta(seconds=1))
    return store


def build(store: Any, node: int, said: list[str]) -> Heartbeat:
    return Heartbeat(
        store,
        node,
        2,
        lambda names: said.append(f"lost {names}"),
        lambda why: said.append(f"cut off: {why}"),
    )


def wait_until_said(said: list[str]) -> None:
    end = time.monotonic() + 20
    while not said:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_who_beats_is_not_missed_and_who_falls_silent_is_named_once(store):
    said: list[list[str]] = [[], []]
    both = [build(store, node, said[node]) for node in (0, 1)]
    time.sleep(2.0)
    assert said == [[], []]
    both[1].close()
    wait_until_said(said[0])
    time.sleep(0.5)
    assert said == [["lost " + heartbeat.socket.gethostname()], []]


def test_who_never_came_has_a_number(store):
    said: list[str] = []
    build(store, 0, said)
    wait_until_said(said)
    assert said == ["lost node 1"]


def test_without_a_store_or_a_link_it_is_this_node_that_gives_up(store, monkeypatch):
    class Broken:
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("connection reset")

    said: list[str] = []
    build(Broken(), 0, said)
    wait_until_said(said)
    assert said == ["cut off: the rendezvous host has not answered for 1 s"]

    monkeypatch.setattr(heartbeat, "link_is_up", lambda: False)
    said.clear()
    build(store, 0, said)
    wait_until_said(said)
    assert said == ["cut off: the network of this host is down"]


def test_where_the_rendezvous_is_gone_nobody_else_is_missed(store):
    """The other host fell silent a little earlier, because its last answer did not arrive."""
    gone = threading.Event()

    class Dying:
        compare_set, multi_get = store.compare_set, store.multi_get

        def set(self, key: str, value: str) -> None:
            if gone.is_set():
                threading.Event().wait()  # an answer that never comes
            store.set(key, value)

    said: list[str] = []
    build(Dying(), 0, said)
    other = build(store, 1, [])
    time.sleep(0.3)
    other.close()
    time.sleep(0.4)
    gone.set()
    wait_until_said(said)
    assert said == ["cut off: the rendezvous host has not answered for 1 s"]


def test_closed_it_says_nothing(store):
    said: list[str] = []
    build(store, 0, said).close()
    time.sleep(1.5)
    assert said == []
