"""A rank is bound to its NUMA node, unless somebody has bound it already."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from packhorse.trainer.utils import numa


@pytest.fixture
def bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Show a machine of two nodes with four cores each, and what its threads are bound to."""
    nodes = {"node0": "0-1,4-5", "node1": "2-3,6-7", "node2": "", "node10": ""}
    for name, cores in nodes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpulist").write_text(cores + "\n")
    given: dict[int, set[int]] = {}
    monkeypatch.setattr(numa, "NODES", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: set(range(8)))
    monkeypatch.setattr(os, "sched_setaffinity", given.__setitem__)
    for name in numa._USERS:
        monkeypatch.delenv(name, raising=False)
    return given


def test_ranks_share_the_nodes_in_their_order(bound: dict[int, set[int]]) -> None:
    for rank, cores in enumerate([{0, 1, 4, 5}] * 2 + [{2, 3, 6, 7}] * 2):
        bound.clear()
        said = numa.bind_to_numa_node(rank, 4)
        assert said == f"NUMA node {rank // 2} of 2, 4 cores"
        assert bound[os.getpid()] == cores
        assert set(map(int, os.listdir("/proc/self/task"))) <= bound.keys()


@pytest.mark.parametrize(
    "why", ["one rank", "one node", "an affinity", "OMP_PLACES", "CUDA_VISIBLE_DEVICES"]
)
def test_it_leaves_a_process_as_it_is(
    why: str, bound: dict[int, set[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "one node":
        (tmp_path / "node1" / "cpulist").write_text("\n")
    if why == "an affinity":
        monkeypatch.setattr(os, "sched_getaffinity", lambda thread: {0, 1})
    if why in numa._USERS:
        monkeypatch.setenv(why, "4,5")
    assert numa.bind_to_numa_node(0, 1 if why == "one rank" else 2) == ""
    assert not bound
