"""Ranks of two hosts listen on the network that they share, and on no other.

Each host has a second network, as one for storage or management, which must see no port. If
selected, these tests run: without root or iproute2 they fail.
"""

import json
import os
import sys
import time
from collections.abc import Iterator

import pytest

from tests.cluster import network
from tests.cluster.hosts import Hosts, hosts
from tests.sockets import listening
from tests.unit.test_rendezvous import LAUNCHER, RANK

pytestmark = pytest.mark.cluster

NET, OTHER, TAG = "10.81.0", "10.82.0", "sock"
OWN = [f"{NET}.{10 + number}" for number in range(2)]  # what the hosts' names are
SECOND = [f"{OTHER}.{10 + number}" for number in range(2)]


@pytest.fixture
def two(tmp_path) -> Iterator[Hosts]:
    with hosts(tmp_path, ["host0", "host1"], TAG, NET) as made:
        spaces = [f"{TAG}-{number}" for number in range(2)]
        ends = [("name", "eth1", "netns", space) for space in spaces]
        network.ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for space, address in zip(spaces, SECOND, strict=True):
            network.ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth1")
            network.ip("-n", space, "link", "set", "eth1", "up")
        yield made


@pytest.mark.parametrize(("chosen", "of_ranks"), [(None, OWN), ("eth1", SECOND)])
def test_between_hosts_nothing_listens_on_all_addresses(two, tmp_path, chosen, of_ranks):
    options = {"endpoint": "host0:29400", "nodes": (2, 2), "run_id": "x"}
    worker = ["-c", RANK, str(tmp_path)]
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path), "1", repr(options), *worker]
    env = {**os.environ, **({"GLOO_SOCKET_IFNAME": chosen} if chosen else {})}
    launchers = [two.start(name, command, env=env) for name in ("host0", "host1")]
    end = time.monotonic() + 120
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
        for launcher in launchers:
            assert launcher.poll() is None, launcher.communicate()[1]
        assert time.monotonic() < end, "the ranks do not meet"
        time.sleep(0.1)
    found = [listening(int(network.inside(launcher)[0])) for launcher in launchers]
    where = json.loads((tmp_path / "where").read_text())
    (tmp_path / "go").touch()
    for launcher in launchers:
        _, err = launcher.communicate(timeout=120)
        assert launcher.returncode == 0, err
    stores = {(OWN[0], 29400), (OWN[0], int(where["MASTER_PORT"]))}
    assert stores <= found[0], "the launchers' store and the ranks', at the first host's name"
    for node, sockets in enumerate(found):
        of_gloo = sockets - stores
        assert of_gloo, "gloo listens for the other rank"
        assert {address for address, _ in of_gloo} == {of_ranks[node]}
    assert where["NCCL_SOCKET_IFNAME"] == chosen, "NCCL takes gloo's, where that is chosen"
