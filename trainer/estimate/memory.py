"""Compute the memory, disk and time of a run from the sizes of its model alone.

In: a model's sizes and activations (estimate/model.py), filled templates (engine/ds_config.py), a
cluster. Out: bytes by part, and whether they fit.

    exact       weights, gradients, master weights, moments (estimate/state.py)
    traced      activations: what autograd saves in one forward over meta tensors
    estimated   gathered parameters, communication, the loss's workspace, the reserve: upper bounds
                from the sources of DeepSpeed and Liger

P parameters, W ranks, T tokens and N trained tokens of a micro-batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.data.ranks import filler_share
from packhorse.trainer.engine.ds_config import require_whole_groups, stage_of, streams_optimizer
from packhorse.trainer.engine.streamed_adamw import room_for_chunks
from packhorse.trainer.estimate.model import Activations, ModelSizes
from packhorse.trainer.estimate.state import (
    StateBytes,
    count_state_bytes,
    masters_of_groups,
    sums_whole_gradients,
)
from packhorse.trainer.model.liger_loss import chunk_positions
from packhorse.trainer.model.loss import BLOCK_HIDDEN

GIB = 2**30
# Neither is measured: blocks that the allocator holds and cannot use, as a share of what is
# allocated; and CUDA's context, NCCL's buffers and cuBLAS's workspaces.
SHARE_RESERVED = 0.05
RESERVED = int(1.5 * GIB)

# -------------------------------------------------------------------------------- one rank's memory


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the peak of a step, of its node's host, and of the node's NVMe."""

    gpu: dict[str, int]  # by part
    host: dict[str, int]  # by part
    nvme: int

    @property
    def gpu_total(self) -> int:
        return sum(self.gpu.values())

    @property
    def host_total(self) -> int:
        # loading is over when training begins
        training = sum(size for part, size in self.host.items() if part != "load")
        return max(self.host["load"], training)


def peak_memory(
    model: ModelSizes,
    config: Mapping[str, Any],
    world: int,
    per_node: int,
    trained: int,
    kernel: str,
    activations: Activations,
) -> Memory:
    """Return the memory of a step on `world` ranks, `per_node` of them on a node, under a filled
    DeepSpeed template.

    Args:
        trained: trained tokens of the fullest micro-batch.
        kernel: of the loss: liger, chunked, or torch's own.

    Raises:
        BadInput: the template combines what is not planned.
    """
    zero = config["zero_optimization"]
    require_whole_groups(config, world, per_node)
    state, stage = count_state_bytes(model, config, world), stage_of(config)
    local = min(world, per_node)
    gathered, communication = _count_communication(model, config, state)
    on_gpu, is_streamed = state.optimizer_on == "gpu", streams_optimizer(config)
    weights = state.weights if state.weights_on == "gpu" else 0
    optimizer = state.masters + state.moments
    gpu = {
        "weights": state.persistent + weights + state.shared + model.buffers,
        "gradients": state.gradients if on_gpu else 0,
        "optimizer": optimizer if on_gpu else 0,
        "gathered": gathered,
        "communication": communication,
        "activations": activations.kept + activations.layer,
        "loss": loss_workspace(model, trained, kernel),
    }
    if is_streamed:
        # DeepSpeed makes the master weights on the GPU, when there are no activations yet
        later = sum(gpu[part] for part in ("gathered", "communication", "activations", "loss"))
        room = room_for_chunks(masters_of_groups(model, stage, world))
        gpu["optimizer"] = max(room, state.masters - later)
    gpu["reserve"] = RESERVED + int(SHARE_RESERVED * sum(gpu.values()))
    whole = model.element * model.parameters
    host = {
        # at stage 3 rank 0 reads for all; before, each rank reads the whole model
        "load": whole if stage == 3 else whole * local,
        "weights": local * state.weights if state.weights_on == "cpu" else 0,
        "gradients": 0 if on_gpu else local * state.gradients,
        "optimizer": local * optimizer if state.optimizer_on == "cpu" or is_streamed else 0,
        "activations": local * activations.host,
        "swapping": local * _count_swap_buffers(model, zero, state),
    }
    nvme = (optimizer if state.optimizer_on == "nvme" else 0) + (
        state.weights if state.weights_on == "nvme" else 0
    )
    return Memory(gpu, host, local * nvme)


def loss_workspace(model: ModelSizes, trained: int, kernel: str) -> int:
    """Return the bytes of the loss at its peak, with the head's gradient if that is trained (C5).

    Args:
        trained: trained tokens of the micro-batch, N.
    """
    element = model.element
    hidden, head = trained * model.hidden, model.vocabulary * model.hidden * model.trains_head
    if kernel == "liger":
        # gradients are made in the forward: the head's in fp32, and once more in its own dtype
        logits = chunk_positions(trained, model.hidden, model.vocabulary) * model.vocabulary
        return 2 * hidden * element + head * (4 + element) + logits * element
    if kernel == "chunked":
        block = trained * min(model.vocabulary, BLOCK_HIDDEN * model.hidden)
        logits = block * (4 + element) if element < 4 else block * 4
        return hidden * (2 * element + 4) + head * element + logits
    logits = trained * model.vocabulary * (element + 3 * 4)
    return logits + hidden * element + head * element


def _count_communication(
    model: ModelSizes, config: Mapping[str, Any], state: StateBytes
) -> tuple[int, int]:
    """Return the bytes of parameters gathered at once, and of gradients being reduced."""
    zero, stage, element = config["zero_optimization"], stage_of(config), model.element
    bucket = min(int(zero.get("reduce_bucket_size", 5e8)), model.trained)
    expanded = element * model.expanded
    if stage == 0 or sums_whole_gradients(model, config):
        return expanded, 4 * bucket
    waiting = waiting_gradients(model, config)
    if stage < 3:
        # two buffers, and the fp32 copy that is sent
        return expanded, bucket * (2 * element + 4) + waiting
    needed = model.gathered_at_once + int(zero.get("stage3_prefetch_bucket_size", 5e7))
    live = min(model.parameters, max(needed, int(zero.get("stage3_max_live_parameters", 1e9))))
    gathered = max(0, element * live - state.persistent)
    # the bucket, which stays, and the largest gradient as it is sent
    return gathered + expanded, 4 * bucket + waiting + 4 * max(map(max, model.groups))


def waiting_gradients(model: ModelSizes, config: Mapping[str, Any]) -> int:
    """Return the bytes of the gradients that are in no bucket yet, at ZeRO 1 to 3."""
    stage = stage_of(config)
    if stage == 3:
        return model.element * model.reduced_at_once
    if stage == 2 and not model.partly_called:
        return 2 * model.element * max(map(max, model.groups))
    return model.element * model.trained


def _count_swap_buffers(model: ModelSizes, zero: Mapping[str, Any], state: StateBytes) -> int:
    """Return the bytes of a rank's host buffers between GPU and NVMe.

    DeepSpeed's own defaults stand in for what the template does not set.
    """
    total = 0
    if state.weights_on == "nvme":
        offload = zero["offload_param"]
        elements = int(offload.get("buffer_count", 5)) * int(offload.get("buffer_size", 1e8))
        total += elements * model.element
    if state.optimizer_on == "nvme":
        largest = min(state.masters, 4 * int(zero.get("sub_group_size", 1e9)))
        total += int(zero["offload_optimizer"].get("buffer_count", 4)) * largest
    return total


# ------------------------------------------------------------------------------------ disk and time


@dataclass(frozen=True)
class Disk:
    """Bytes on the disk that all nodes share."""

    checkpoint: int  # fp32 weights and moments of what is trained, and buffers; universal form, too
    checkpoints: int  # those kept, and one being written
    export: int  # while it is written, the weights are there twice


def count_checkpoints(recipe: Recipe) -> int:
    """Return how many checkpoints a run keeps: the best one is beside those of checkpoint.keep."""
    return recipe.checkpoint.keep + (recipe.eval.best is not None)


def disk_needed(model: ModelSizes, keep: int) -> Disk:
    one = 4 * model.trained + model.moment_bytes + model.buffers
    return Disk(one, (keep + 1) * one, 2 * model.element * model.parameters)


@dataclass(frozen=True)
class StepStats:
    """What a run's steps are made of on average, and its fullest micro-batch."""

    micro_batches: np.ndarray  # (steps,), or (1,) if all steps have as many
    steps: int | None  # None if only the data could tell
    tokens: float  # of a step
    trained: float  # trained tokens of a step
    pairs: float  # a document's length squared, summed over a step
    fullest_tokens: int
    fullest_trained: int
    sequence: int = 1  # ranks that share a micro-batch

    @property
    def rank_tokens(self) -> int:
        """Tokens of the fullest micro-batch on one rank."""
        return -(-self.fullest_tokens // self.sequence)

    @property
    def rank_trained(self) -> int:
        """The most of them that may be trained."""
        return min(self.fullest_trained, self.rank_tokens)


def full_step_stats(recipe: Recipe) -> StepStats:
    """Return the stats without the data: each sequence is one full document, trained whole."""
    batch = recipe.batch
    tokens = batch.global_batch_size * batch.seq_len
    fullest = min(batch.micro, batch.global_batch_size) * batch.seq_len
    return StepStats(
        micro_batches=np.array([-(-batch.global_batch_size // batch.micro)]),
        steps=recipe.train.steps,
        tokens=tokens,
        trained=tokens,
        pairs=tokens * batch.seq_len,
        fullest_tokens=fullest,
        fullest_trained=fullest,
        sequence=recipe.parallel.ranks_a_sequence,
    )


def step_seconds(
    model: ModelSizes, stats: StepStats, gpus: int, flops: float, checkpointing: str = "none"
) -> float:
    """Return the seconds of a step.

    Args:
        flops: the model's own FLOP/s that a busy GPU achieves where it recomputes nothing: its
            peak x the MFU.
        checkpointing: model.activation_checkpointing.
    """
    # the products of the layers alone go by the tokens
    tokens = stats.tokens / model.product_speed
    needed = model.flops.count(tokens, stats.trained, stats.pairs)
    needed += _repeated_flops(model, checkpointing, tokens, stats.pairs)
    # a GPU that runs a filler does nothing for the step
    idle = filler_share(stats.micro_batches, gpus // stats.sequence)
    return needed / (gpus * flops * (1 - idle))


def _repeated_flops(model: ModelSizes, mode: str, tokens: float, pairs: float) -> float:
    """Return the FLOPs of the forward that the backward repeats: 2 a weight, channel and pair."""
    full, selective = model.repeated
    if mode == "none":
        return 0.0
    if mode == "selective":  # attention is kept
        return 2.0 * selective * tokens
    return 2.0 * (full * tokens + model.flops.attention_channels * pairs)


def attention_share(model: ModelSizes, stats: StepStats) -> float:
    """Return the share of a step's FLOPs that grows with the documents' lengths."""
    without = model.flops.count(stats.tokens, stats.trained, 0)
    return 1 - without / model.flops.count(stats.tokens, stats.trained, stats.pairs)


# ------------------------------------------------------------------------------------------ cluster


@dataclass(frozen=True)
class Cluster:
    """GPUs, and the bytes of each GPU, node and the shared disk; None if that is not limited."""

    gpus: int
    per_node: int
    gpu: float
    host: float | None = None
    disk: float | None = None
    nvme: float | None = None

    def find_shortages(self, memory: Memory, disk: Disk) -> list[str]:
        """Return the names of what is too small."""
        limits = {
            "GPU": (memory.gpu_total, self.gpu),
            "host": (memory.host_total, self.host),
            "NVMe": (memory.nvme, self.nvme),
            "disk": (disk.checkpoints, self.disk),
        }
        return [
            name for name, (needed, limit) in limits.items() if limit is not None and needed > limit
        ]


def candidate_worlds(most: int, per_node: int) -> Iterator[int]:
    """Give the numbers of ranks to try, up to `most`: parts of a node, then whole nodes."""
    yield from (world for world in (1, 2, 4) if world < min(per_node, most + 1))
    yield from range(per_node, most + 1, per_node)
