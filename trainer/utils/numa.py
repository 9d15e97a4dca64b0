"""Bind a rank to the cores of one NUMA node, whose memory and GPUs are the nearest to them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

NODES = Path("/sys/devices/system/node")  # the kernel's list, with each node's cores
# Who sets one of these places threads by himself, or has chosen GPUs, of whatever nodes.
_USERS = (
    "OMP_PLACES",
    "OMP_PROC_BIND",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "CUDA_VISIBLE_DEVICES",
)

# What this process was given, before it is bound as a rank: workers of its data use all of it.
GIVEN = frozenset(os.sched_getaffinity(0))


def bind_to_numa_node(local_rank: int, num_ranks: int) -> str:
    """Bind this process to a NUMA node's cores; return what was done, or nothing.

    Ranks share the nodes in their order, as GPUs have their numbers by the bus. Fewer ranks than
    nodes use all cores. Where Slurm, a container or the user has bound the process, it stays so.

    Args:
        num_ranks: on this machine.
    """
    allowed = os.sched_getaffinity(0)
    bound = len(allowed) < (os.cpu_count() or 1) or any(name in os.environ for name in _USERS)
    nodes = [_cores(path.read_text()) for path in NODES.glob("node[0-9]*/cpulist")]
    # a node may have memory alone; cores are numbered by their nodes
    nodes = sorted((cores & allowed for cores in nodes if cores & allowed), key=min)
    if bound or not 1 < len(nodes) <= num_ranks:
        return ""
    number = local_rank * len(nodes) // num_ranks
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has ended since, or a container forbids it
            os.sched_setaffinity(int(thread), nodes[number])
    return f"NUMA node {number} of {len(nodes)}, {len(nodes[number])} cores"


def _cores(text: str) -> set[int]:
    """Return the numbers of `0-3,8-11`."""
    ranges = [part.split("-") for part in text.strip().split(",") if part]
    return {core for ends in ranges for core in range(int(ends[0]), int(ends[-1]) + 1)}
