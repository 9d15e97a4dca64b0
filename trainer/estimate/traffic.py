"""Compute the bytes that a DeepSpeed template moves in a step, and the time that this may take.

In: a model's sizes, a filled template, a cluster's shape. Out: bytes of a GPU between GPUs, to the
host's memory and to NVMe, and seconds at assumed speeds. The counts are those of ring collectives:
an all-reduce sends each byte twice, a gather or a reduce once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packhorse.trainer.engine.ds_config import (
    count_sharing,
    offload_device,
    stage_of,
    streams_optimizer,
)
from packhorse.trainer.estimate.memory import Cluster
from packhorse.trainer.estimate.model import ModelSizes
from packhorse.trainer.estimate.state import count_state_bytes, sum_bytes

# Bytes a second that are assumed, as a plan measures nothing.
IN_NODE = 300e9  # of a GPU, over NVLink
BETWEEN_NODES = 42e9  # of a GPU, over InfiniBand: 340 GB/s for a node of 8
TO_HOST = 25e9  # of a GPU, over PCIe 4
TO_NVME = 6e9  # of a node
ASSUMED = (
    f"{IN_NODE / 1e9:.0f} GB/s a GPU inside a node, {BETWEEN_NODES / 1e9:.0f} between nodes, "
    f"{TO_HOST / 1e9:.0f} to the host, and {TO_NVME / 1e9:.0f} a node to NVMe"
)
SECONDS = (
    "s a step: at most, with what is recomputed, if no communication hides behind the computation, "
    f"at an assumed {ASSUMED}; at least, the time to compute above"
)


@dataclass(frozen=True)
class Traffic:
    """Bytes of a GPU in a step."""

    between_gpus: float
    host: float
    nvme: float
    in_group: float = 0.0  # between GPUs of a node that share a sequence, or weights (hpZ)

    @property
    def total(self) -> float:
        return self.between_gpus + self.in_group + self.host + self.nvme

    def seconds(self, cluster: Cluster) -> float:
        """Return the seconds of a step if nothing overlaps."""
        speed = IN_NODE if cluster.gpus <= cluster.per_node else BETWEEN_NODES
        on_node = min(cluster.gpus, cluster.per_node)
        sent = self.between_gpus / speed + self.in_group / IN_NODE
        return sent + self.host / TO_HOST + self.nvme * on_node / TO_NVME


def step_traffic(
    model: ModelSizes, config: Mapping[str, Any], world: int, micro_batches: float
) -> Traffic:
    """Return what a step moves under a filled DeepSpeed template.

    Args:
        micro_batches: of a step, on one rank.
    """
    stage = stage_of(config)
    others = (world - 1) / world
    gradients = model.trained * sum_bytes(config)
    weights, trained_weights = model.element * model.parameters, model.element * model.trained
    sharing, in_group = count_sharing(config, world), 0.0
    if stage == 3 and sharing > 1:
        # a step's first forward gathers from all; those who share a copy gather the rest from it
        sent = trained_weights + micro_batches * gradients
        again = micro_batches * 2 * weights - trained_weights
        in_group = again * (sharing - 1) / sharing
    elif stage == 3:
        # each micro-batch gathers the weights in forward and backward, and reduces its gradients
        sent = micro_batches * (2 * weights + gradients)
    elif stage == 2:
        sent = micro_batches * gradients + trained_weights
    elif stage == 1:
        sent = 2 * gradients + trained_weights
    else:
        sent = 2 * gradients
    moved = {"cpu": 0.0, "nvme": 0.0}
    device = offload_device(config, "optimizer")
    if device != "none":  # sums of gradients go out, weights come back
        moved["cpu"] += (micro_batches * gradients + trained_weights) / world
    if device == "nvme":  # master weights and two moments, read and written
        moved["nvme"] += 2 * 12 * model.trained / world
    if streams_optimizer(config):  # master weights and two moments, in and out
        state = count_state_bytes(model, config, world)
        moved["cpu"] += 2 * (state.masters + state.moments)
    device = offload_device(config, "param")
    if device != "none":  # read in forward and backward
        moved[device] += micro_batches * 2 * weights / world
    return Traffic(others * sent, moved["cpu"], moved["nvme"], in_group)
