"""Memory, disk and time of a run from the model's configuration alone: no weights, no data, no GPU.

In: a recipe, filled templates (ds_template.deepspeed_config), a cluster. Out: bytes by part and
    whether they fit.
The model is built on torch's meta device, so that shapes follow from how it is made, not from a
list of known models.

exact       weights, gradients, masters and moments: DeepSpeed's own buffers, byte for byte (tests/numerics)
traced      activations: what autograd saves in one forward over meta tensors, a fused attention kernel put in
estimated   gathered parameters, communication, the loss's workspace, the reserve: upper bounds, from their sources

P parameters, W ranks, T tokens and N trained tokens of a micro-batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.config.recipe import AdapterSection, ModelSection, OptimSection, Recipe
from trainer.data.batch_plan import filler_share
from trainer.datatypes import BadInput
from trainer.engine.optim import parameter_groups
from trainer.metrics import ModelFlops, model_flops
from trainer.model import attention
from trainer.model.attention_kernels import Arguments, Bounds
from trainer.model.load import load_config
from trainer.model.lora import add_adapter
from trainer.model.loss import BLOCK_HIDDEN, LIGER_HIDDEN
from trainer.model.packing_check import decoder_layers
from trainer.utils.text import one_line

GIB = 2**30
SHARE_RESERVED = (
    0.05  # of what is allocated: blocks that the allocator holds and cannot use (not measured here)
)
RESERVED = int(1.5 * GIB)  # CUDA's context, NCCL's buffers, cuBLAS's workspaces (not measured here)

# ---------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Model:
    """What memory and time depend on."""

    name: str
    groups: tuple[
        tuple[int, ...], ...
    ]  # elements of each trained parameter, by the optimizer's groups
    frozen: tuple[int, ...]  # elements of each of the others, but for those in 4 bits
    quantised: int  # elements of those
    quantised_bytes: int
    trains_head: bool
    element: int  # bytes of an element of the weights
    hidden: int
    vocabulary: int
    largest_module: int  # most elements that one module's own parameters have
    buffers: int  # bytes, on every rank and in a checkpoint's
    flops: ModelFlops

    @property
    def trained(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def parameters(self) -> int:
        return self.trained + sum(self.frozen) + self.quantised


def empty_model(section: ModelSection, adapter: AdapterSection | None = None) -> Any:
    """The transformers model on the meta device, with its adapter, attending by a stand-in for a
    fused kernel.

    Raises:
        BadInput: no such configuration, not a causal model, one whose class cannot be built without
            data, or that cannot have the adapter.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register("packhorse_fused", attention.as_attention_function(_fused))
    config = load_config(section)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, section.dtype),
            attn_implementation="packhorse_fused",
            trust_remote_code=section.trust_remote_code,
        )
    model.tie_weights()
    if adapter:
        add_adapter(model, adapter, seed=0)
    return model.train()


def describe(model: Any, optim: OptimSection, adapter: AdapterSection | None = None) -> Model:
    """The facts of a model, which may lie on the meta device."""
    head = model.get_output_embeddings()
    in_4_bits: dict[int, int] = {}  # elements
    if adapter and adapter.base:  # all linear modules that are frozen, but the head
        linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        in_4_bits = {id(m.weight): m.weight.numel() for m in linear if not m.weight.requires_grad}
    double = adapter is not None and adapter.base == "nf4_double_quant"
    groups = [tuple(p.numel() for p in group["params"]) for group in parameter_groups(model, optim)]
    config = model.config.get_text_config()
    persistent = model.state_dict(keep_vars=True).keys()
    return Model(
        name=type(model).__name__,
        groups=tuple(groups),
        frozen=tuple(
            p.numel() for p in model.parameters() if not p.requires_grad and id(p) not in in_4_bits
        ),
        quantised=sum(in_4_bits.values()),
        quantised_bytes=sum(_bytes_in_4_bits(elements, double) for elements in in_4_bits.values()),
        trains_head=head.weight.requires_grad,
        element=next(model.parameters()).element_size(),
        hidden=config.hidden_size,
        vocabulary=head.weight.shape[0],
        largest_module=max(
            sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()
        ),
        buffers=sum(
            b.numel() * b.element_size() for name, b in model.named_buffers() if name in persistent
        ),
        flops=model_flops(model),
    )


def _bytes_in_4_bits(elements: int, double: bool) -> int:
    """NF4 by bitsandbytes: two weights a byte, an fp32 scale for 64 of them, and the 16 values in
    fp32; with double quantisation the scales are bytes, an fp32 scale for 256 of those, their 256
    values and their mean in fp32."""
    scales = -(-elements // 64)
    return (
        -(-elements // 2)
        + 64
        + (scales + 4 * -(-scales // 256) + 4 * 256 + 4 if double else 4 * scales)
    )


# -------------------------------------------------------------------------------------- activations


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd saves of the decoder for one micro-batch."""

    kept: int  # from the forward to the backward
    layer: int  # again while a layer is recomputed: the largest layer's; 0 without recomputation


def trace(model: Any, tokens: int) -> dict[str, Activations]:
    """Run the decoder once over `tokens` meta tokens for each value of
    model.activation_checkpointing that the model supports, and count what is saved for the
    backward.

    Raises:
        BadInput: the model's forward depends on values, which meta tensors lack.
    """
    kept, of_layers = _saved(model, tokens)
    found = {"none": Activations(kept, 0)}
    if model.supports_gradient_checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # transformers gives the two another name
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            found["full"] = Activations(_saved(model, tokens)[0], max(of_layers, default=0))
            model.gradient_checkpointing_disable()
    return found


def _saved(model: Any, tokens: int) -> tuple[int, list[int]]:
    """Bytes saved by the decoder's forward, and those of each of its layers."""
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    bounds = Bounds(torch.zeros(2, dtype=torch.int32, device="meta"), tokens, (tokens,))
    of_layers: list[int] = []
    with saved_bytes(model) as saved:

        def begin(*_: Any) -> None:
            of_layers.append(-saved())

        def end(*_: Any) -> None:
            of_layers[-1] += saved()

        layers = decoder_layers(model)
        hooks = [
            h
            for m in layers
            for h in (m.register_forward_pre_hook(begin), m.register_forward_hook(end))
        ]
        try:
            model.get_decoder()(
                input_ids=ids, position_ids=ids, use_cache=False, document_bounds=bounds
            )
        except (RuntimeError, NotImplementedError) as error:
            raise BadInput(
                f"{type(model).__name__} cannot be planned: its forward asks for values, of which "
                f"a plan has none "
                f"({one_line(error, 200)}); measure it with `packhorse train` on one GPU"
            ) from None
        finally:
            for hook in hooks:
                hook.remove()
        return saved(), of_layers


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[Any]:
    """Gives a function: bytes of the storages that autograd saved so far inside, each once, weights
    left out.
    """
    seen = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: list[torch.Tensor] = []  # alive, so that no storage's identity comes twice
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept.append(tensor)
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: total


class _FusedAttention(torch.autograd.Function):
    """What FlashAttention saves: queries, keys, values, the output, and a number for each head and
    position.
    """

    @staticmethod
    # type: ignore[override]
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_empty(*q.shape[:3], v.shape[3])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("a plan runs no backward")


def _fused(
    layer: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arguments: Arguments
) -> torch.Tensor:
    out = _FusedAttention.apply(q, k, v)
    assert isinstance(out, torch.Tensor)
    return out.transpose(1, 2)


def loss_workspace(model: Model, trained: int, kernel: str) -> int:
    """Bytes of the loss at its peak, in its own kernel; the head's gradient, if it is trained, is
    among them (C5).
    """
    hidden, head = trained * model.hidden, model.vocabulary * model.hidden * model.trains_head
    if (
        kernel == "liger"
    ):  # gradients are made in the forward: the head's in fp32, and once more in its own type
        chunks = -(-model.vocabulary // (LIGER_HIDDEN * model.hidden))
        chunk = 2 ** math.ceil(math.log2(max(1, -(-trained // chunks))))
        logits = min(chunk, trained) * model.vocabulary
        return 2 * hidden * model.element + head * (4 + model.element) + logits * model.element
    if kernel == "chunked":
        block = trained * min(model.vocabulary, BLOCK_HIDDEN * model.hidden)
        extra = block * (4 + model.element) if model.element < 4 else block * 4
        return hidden * (2 * model.element + 4) + head * model.element + extra
    return (
        trained * model.vocabulary * (model.element + 3 * 4)
        + hidden * model.element
        + head * model.element
    )


# ----------------------------------------------------------------------------------- training state


@dataclass(frozen=True)
class State:
    """Bytes of one rank (the fullest), after a backward; and where the parts lie."""

    weights: int
    # of the weights, parameters too small to cut, which stage 3 keeps whole on the GPU beside
    whole: int
    gradients: int
    masters: int  # fp32 weights of the optimizer
    moments: int
    weights_on: str = "gpu"  # or cpu, nvme
    optimizer_on: str = "gpu"  # gradients' sums, masters and moments


def state(model: Model, config: Mapping[str, Any], world: int) -> State:
    """The training state under a filled DeepSpeed template (ds_template.deepspeed_config)."""
    zero = config["zero_optimization"]
    summed = 2 if config["data_types"]["grad_accum_dtype"] == "bf16" else 4
    element, stage = model.element, zero.get("stage", 0)
    frozen = element * sum(model.frozen) + model.quantised_bytes
    if stage == 0:  # torch's own AdamW: the weights are the masters
        return State(
            element * model.trained + frozen, 0, element * model.trained, 0, 8 * model.trained
        )
    if stage < 3:
        offload = zero.get("offload_optimizer", {}).get("device", "none")
        flat = [
            -(-sum(group) // (2 * world)) * 2 * world for group in model.groups
        ]  # aligned to 2 elements a rank
        piece = sum(flat) // world
        if offload != "none":
            raise BadInput(
                "offload_optimizer at ZeRO stages 1 and 2 is not planned; plan it at stage 3"
            )
        if (
            stage == 1 and element == 2 and summed == 4
        ):  # DeepSpeed's BF16_Optimizer sums whole gradients in fp32
            gradients = 4 * sum(flat) + element * model.trained
        elif summed != element:
            gradients = summed * piece
        else:
            gradients = element * _touched(model.groups, flat, world)
        return State(element * sum(flat) + frozen, 0, gradients, 4 * piece, 8 * piece)
    if model.quantised:
        raise BadInput("adapter.base: weights of 4 bits are not sharded at ZeRO-3")
    trained_sizes = [n for group in model.groups for n in group]
    piece = sum(-(-n // world) for n in trained_sizes)
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    where = {
        what: zero.get(f"offload_{what}", {}).get("device", "none")
        for what in ("optimizer", "param")
    }
    optimizer_on = "gpu" if where["optimizer"] == "none" else where["optimizer"]
    return State(
        weights=element * (piece + sum(-(-n // world) for n in model.frozen)),
        whole=element * sum(n for n in (*trained_sizes, *model.frozen) if n <= threshold),
        gradients=(summed + 4 * (optimizer_on == "cpu"))
        * piece,  # and the optimizer's own copy on the host
        masters=4 * piece,
        moments=8 * piece,
        weights_on="gpu" if where["param"] == "none" else where["param"],
        optimizer_on=optimizer_on,
    )


def _touched(groups: Sequence[Sequence[int]], flat: Sequence[int], world: int) -> int:
    """Elements of the parameters that lie, wholly or in part, in the fullest rank's piece of each
    group.
    """
    most = [0] * world
    for group, length in zip(groups, flat, strict=True):
        piece, ends = length // world, list(accumulate(group))
        for end, size in zip(ends, group, strict=True):
            for rank in range((end - size) // piece, (end - 1) // piece + 1):
                most[rank] += size
        for rank in range(world):  # beyond the last parameter a rank's piece is filled up
            most[rank] += min(piece, max(0, (rank + 1) * piece - ends[-1]))
    return max(most)


# -------------------------------------------------------------------------------- one rank's memory


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the peak of a step, of its node's host, and of the node's NVMe."""

    gpu: dict[str, int]  # by part
    host: dict[str, int]
    nvme: int

    @property
    def gpu_total(self) -> int:
        return sum(self.gpu.values())

    @property
    def host_total(self) -> int:
        """Loading and training come one after the other."""
        return max(
            self.host["load"], sum(bytes_ for part, bytes_ in self.host.items() if part != "load")
        )


def peak_memory(
    model: Model,
    config: Mapping[str, Any],
    world: int,
    per_node: int,
    trained: int,
    kernel: str,
    activations: Activations,
) -> Memory:
    """What a step takes on `world` ranks, `per_node` of them on a node, under a filled DeepSpeed
    template.
    """
    zero = config["zero_optimization"]
    of_state, stage = state(model, config, world), zero.get("stage", 0)
    local = min(world, per_node)
    gathered, sent = _communication(model, zero, of_state, world)
    on_gpu = of_state.optimizer_on == "gpu"
    gpu = {
        "weights": of_state.whole
        + (of_state.weights if of_state.weights_on == "gpu" else 0)
        + model.buffers,
        "gradients": of_state.gradients if on_gpu else 0,
        "optimizer": of_state.masters + of_state.moments if on_gpu else 0,
        "gathered": gathered,
        "communication": sent,
        "activations": activations.kept + activations.layer,
        "loss": loss_workspace(model, trained, kernel),
    }
    gpu["reserve"] = RESERVED + int(SHARE_RESERVED * sum(gpu.values()))
    whole = model.element * model.parameters
    kept_off = of_state.masters + of_state.moments
    host = {
        "load": whole
        if stage == 3
        else whole * local,  # at stage 3 the node of rank 0 reads for all
        "weights": local * of_state.weights if of_state.weights_on == "cpu" else 0,
        "gradients": 0 if on_gpu else local * of_state.gradients,
        "optimizer": local * kept_off if of_state.optimizer_on == "cpu" else 0,
        "swapping": local * _swap_buffers(model, zero, of_state),
    }
    nvme = local * (
        (kept_off if of_state.optimizer_on == "nvme" else 0)
        + (of_state.weights if of_state.weights_on == "nvme" else 0)
    )
    return Memory(gpu, host, nvme)


def _communication(
    model: Model, zero: Mapping[str, Any], of_state: State, world: int
) -> tuple[int, int]:
    """Bytes of parameters gathered at once, and of gradients on their way."""
    stage, element = zero.get("stage", 0), model.element
    largest = max(map(max, model.groups))
    bucket = min(int(zero.get("reduce_bucket_size", 5e8)), model.trained)
    at_once = (
        element * model.largest_module if model.quantised else 0
    )  # of 4 bits, where its module runs
    if stage == 0:
        return at_once, 4 * bucket
    if stage == 1 and element == 2:
        return at_once, 4 * bucket
    if stage < 3:  # two buffers and the fp32 copy that is sent; what is not in a bucket yet
        in_flight = element * model.trained if stage == 1 else 2 * element * largest
        return at_once, bucket * (2 * element + 4) + in_flight
    wanted = model.largest_module + int(zero.get("stage3_prefetch_bucket_size", 5e7))
    live = min(model.parameters, max(wanted, int(zero.get("stage3_max_live_parameters", 1e9))))
    # the bucket, which stays, and the largest gradient in the weights' type and as it is sent
    return max(0, element * live - of_state.whole), 4 * bucket + (element + 4) * largest


def _swap_buffers(model: Model, zero: Mapping[str, Any], of_state: State) -> int:
    """Bytes of the host's buffers between GPU and NVMe, DeepSpeed's own defaults where the template
    is silent.
    """
    total = 0
    if of_state.weights_on == "nvme":
        offload = zero["offload_param"]
        total += (
            int(offload.get("buffer_count", 5))
            * int(offload.get("buffer_size", 1e8))
            * model.element
        )
    if of_state.optimizer_on == "nvme":
        largest = min(of_state.masters, 4 * int(zero.get("sub_group_size", 1e9)))
        total += int(zero["offload_optimizer"].get("buffer_count", 4)) * largest
    return total


# ------------------------------------------------------------------------------------ disk and time


@dataclass(frozen=True)
class Disk:
    """Bytes. A checkpoint is fp32 weights and two moments of what is trained; one is written beside
    those kept.
    """

    checkpoint: int
    checkpoints: int
    universal: int
    export: int  # while it is made the weights are there twice


def disk_needed(model: Model, keep: int) -> Disk:
    one = 12 * model.trained + model.buffers
    return Disk(one, (keep + 1) * one, one, 2 * model.element * model.parameters)


@dataclass(frozen=True)
class StepStats:
    """What a run's steps are made of, on average, and its fullest micro-batch."""

    micro_batches: np.ndarray  # (steps,), or (1,) where one stands for all
    steps: int | None  # None where only the data could tell
    tokens: float  # of a step
    trained: float  # of them
    pairs: float  # a document's length squared, summed over a step
    fullest_tokens: int
    fullest_trained: int


def work_of(recipe: Recipe) -> StepStats:
    """Without a look at the data: every row is full, and one document whose tokens are all trained."""
    batch = recipe.batch
    tokens = batch.global_batch_size * batch.seq_len
    fullest = min(batch.micro_batch_size, batch.global_batch_size) * batch.seq_len
    return StepStats(
        micro_batches=np.array([-(-batch.global_batch_size // batch.micro_batch_size)]),
        steps=recipe.train.steps,
        tokens=tokens,
        trained=tokens,
        pairs=tokens * batch.seq_len,
        fullest_tokens=fullest,
        fullest_trained=fullest,
    )


def step_seconds(model: Model, work: StepStats, gpus: int, flops: float) -> float:
    """Seconds of a step, where a GPU at work makes so many of the model's own FLOP/s: its peak x
    the MFU. Fillers make nobody faster."""
    of = model.flops
    needed = 6 * (
        of.body_weights * work.tokens
        + of.head_weights * work.trained
        + of.attention_channels * work.pairs
    )
    return needed / (gpus * flops * (1 - filler_share(work.micro_batches, gpus)))


# ------------------------------------------------------------------------------------------- worlds


@dataclass(frozen=True)
class Cluster:
    """GPUs and what each of them, its node and the shared disk hold, in bytes; None where it is not
    asked.
    """

    gpus: int
    per_node: int
    gpu: float
    host: float | None = None
    disk: float | None = None
    nvme: float | None = None

    def lacks(self, memory: Memory, disk: Disk) -> list[str]:
        """Where it does not fit."""
        asked = {
            "GPU": (memory.gpu_total, self.gpu),
            "host": (memory.host_total, self.host),
            "NVMe": (memory.nvme, self.nvme),
            "disk": (disk.checkpoints, self.disk),
        }
        return [
            what for what, (needed, there) in asked.items() if there is not None and needed > there
        ]


def worlds(most: int, per_node: int) -> Iterator[int]:
    """Numbers of ranks to try: parts of a node, then whole nodes."""
    yield from (world for world in (1, 2, 4) if world < min(per_node, most + 1))
    yield from range(per_node, most + 1, per_node)
