"""Inspect a model without weights, data or a GPU: its sizes, and the activations that it saves.

In: a recipe's model and adapter. Out: `ModelSizes`, and `Activations` by activation checkpointing.
The model is built on torch's meta device, so that shapes follow from its own code, not from a list
of known models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy

from packhorse.trainer.config.recipe import AdapterSection, ModelSection, OptimSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine.moments import moment_bytes
from packhorse.trainer.engine.optim import parameter_groups
from packhorse.trainer.metrics import ModelFlops, model_flops, used_weights
from packhorse.trainer.model import attention, decoder
from packhorse.trainer.model.activation_checkpointing import save, set_checkpointing
from packhorse.trainer.model.attention_kernels import Arguments, Bounds
from packhorse.trainer.model.checks import plan_failures_explained
from packhorse.trainer.model.expert_lora import expert_parameters, stacked_matrices
from packhorse.trainer.model.expert_weights import packable_experts
from packhorse.trainer.model.feed_forward_tiles import (
    WIDENING,
    feed_forward_blocks,
    set_tiles,
    tile_tokens,
    wants_tiles,
)
from packhorse.trainer.model.linear_modules import linear_modules
from packhorse.trainer.model.load import load_config, model_class, persistent_buffers
from packhorse.trainer.model.lora import add_adapter, not_in_shards
from packhorse.trainer.model.partly_called import partly_called_blocks
from packhorse.trainer.model.quantisation import count_scale_bytes
from packhorse.trainer.model.reach import freeze_named, freeze_unreached
from packhorse.trainer.model.token_rows import ROWS
from packhorse.trainer.utils.lean_import import replaced

MODES = ("none", "selective", "full", "offload")  # the least recomputation first

# -------------------------------------------------------------------------------------------- sizes


class AttentionShape(NamedTuple):
    """What a layer asks of attention; see Arguments in attention_kernels.py."""

    heads: int
    key_heads: int
    size: int  # of a head of queries and keys
    value_size: int
    window: int | None
    softcap: float | None = None
    has_sinks: bool = False
    dropout: float | None = None


@dataclass(frozen=True)
class ModelSizes:
    """What memory and time depend on. Elements, unless a field says bytes."""

    name: str
    groups: tuple[tuple[int, ...], ...]  # each trained parameter, by the optimizer's groups
    kinds: tuple[str, ...]  # what updates each group (optim.parameter_groups)
    group_moments: tuple[int, ...]  # bytes of each group's states, once
    averaged: bool  # whether optim.ema_decay keeps one more number a weight
    frozen: tuple[int, ...]  # each frozen parameter that is not in 4 bits
    quantised: tuple[int, ...]  # each frozen parameter in 4 or 8 bits
    bits: int  # of those
    scales_bytes: int  # beside the bits
    experts: int  # of all these, what experts held as one parameter have
    trains_head: bool
    element: int  # bytes of an element of the weights
    hidden: int
    vocabulary: int
    expanded: int  # of weights made where their module runs, and their gradients: the most at once
    gathered_at_once: int  # the most that ZeRO-3 gathers in one call, a module's or a whole layer's
    reduced_at_once: int  # trained, the most whose gradients ZeRO-3 waits for before it reduces one
    partly_called: bool  # whether ranks hold all gradients at ZeRO-2 (missing_gradients.py)
    buffers: int  # bytes, on every rank and in a checkpoint
    flops: ModelFlops
    # weights whose products the backward repeats, with activation_checkpointing full and selective
    repeated: tuple[float, float]
    product_speed: float = 1.0  # of the layers' products, over those in the weights' type
    attention: tuple[AttentionShape, ...] = ()  # of each layer that attends

    @property
    def trained(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def moment_bytes(self) -> int:
        return sum(self.group_moments) + 4 * self.averaged * self.trained

    @property
    def parameters(self) -> int:
        return self.trained + sum(self.frozen) + sum(self.quantised)


@plan_failures_explained()
def build_empty_model(section: ModelSection, adapter: AdapterSection | None = None) -> Any:
    """Build the transformers model on the meta device, with its adapter and a stand-in for a fused
    attention kernel.

    Raises:
        BadInput: there is no such configuration, it is not a causal model, its class cannot be
            built without data, or it cannot have the adapter.
    """
    from transformers import AttentionInterface

    AttentionInterface.register("packhorse_fused", attention.as_attention_function(_fused))
    config = load_config(section)
    with torch.device("meta"):
        model = model_class(config).from_config(
            config,
            dtype=getattr(torch, section.dtype),
            attn_implementation="packhorse_fused",
            trust_remote_code=section.trust_remote_code,
        )
    model.tie_weights()  # else a tied head would be counted twice
    if adapter:
        add_adapter(model, adapter, seed=0)
    freeze_named(model, section.freeze)
    # a forward that meta tensors cannot run is refused by `trace_activations`, which says why
    with suppress(BadInput):
        freeze_unreached(model, partial(_run_decoder, model, tokens=64), not_in_shards)
    return model.train()


@plan_failures_explained()
def _run_decoder(model: Any, tokens: int) -> torch.Tensor:
    """Return what the model hands to its head of a document on the meta device, (T, H)."""
    from transformers.integrations import moe

    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    bounds = Bounds(torch.zeros(2, dtype=torch.int32, device="meta"), tokens, (tokens,))
    grouped = replaced(moe, "_can_use_grouped_mm", _is_grouped_on_meta)
    with attention.found_by_all(bounds), grouped:
        out = decoder.decoder_of(model)(
            input_ids=ids, position_ids=ids, use_cache=False, document_bounds=bounds
        )
    return out.last_hidden_state[0]


def _is_grouped_on_meta(_: torch.Tensor, weight: torch.Tensor, __: torch.Tensor) -> bool:
    """Return whether torch knows the shape of experts' products without a device; transformers' own
    loop saves the same for the backward, but for the groups' offsets, 4 bytes an expert.
    """
    return weight.dtype == torch.bfloat16


def attention_shapes(model: Any) -> tuple[AttentionShape, ...]:
    """Return ModelSizes.attention of a model that `build_empty_model` made."""
    _attended.clear()
    _run_decoder(model, tokens=64)
    return tuple(_attended)


@plan_failures_explained()
def measure_model(
    model: Any, optim: OptimSection, adapter: AdapterSection | None = None
) -> ModelSizes:
    """Return the sizes of a model, which may lie on the meta device."""
    head = model.get_output_embeddings()
    quantised: dict[int, torch.Tensor] = {}  # by the parameter's id
    if adapter and adapter.base:
        linear = linear_modules(model).values()  # those that are frozen are quantised
        weights = [*(m.weight for m in linear), *packable_experts(model, adapter.base).values()]
        quantised = {id(weight): weight for weight in weights if not weight.requires_grad}
    base = adapter.base if adapter else None
    groups = parameter_groups(model, optim)
    frozen = [p for p in model.parameters() if not p.requires_grad and id(p) not in quantised]
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    made_head = head.weight.numel() * hasattr(head, ROWS)  # with the trained rows in it
    parts = partly_called_blocks(model, partial(_run_decoder, model, tokens=1), not_in_shards)
    whole = [*decoder.whole_layers(model), *decoder.untied(model, parts)]
    trained_in_whole = [sum(p.numel() for p in w.parameters() if p.requires_grad) for w in whole]
    blocks = feed_forward_blocks(model)  # gathered whole if they run in tiles
    sizes = tuple(tuple(p.numel() for p in group["params"]) for group in groups)
    return ModelSizes(
        name=type(model).__name__,
        groups=sizes,
        kinds=tuple(group["kind"] for group in groups),
        group_moments=tuple(moment_bytes([group]) for group in groups),
        averaged=optim.ema_decay is not None,
        frozen=tuple(p.numel() for p in frozen),
        quantised=tuple(p.numel() for p in quantised.values()),
        bits=8 if base == "int8" else 4,
        scales_bytes=sum(count_scale_bytes(p, base) for p in quantised.values()),
        experts=sum(p.numel() for p in expert_parameters(model).values()),
        trains_head=head.weight.requires_grad or made_head > 0,
        element=next(model.parameters()).element_size(),
        hidden=model.config.get_text_config().hidden_size,
        vocabulary=head.weight.shape[0],
        expanded=max(made_head, largest * (2 if stacked_matrices(model) else bool(quantised))),
        gathered_at_once=max([largest, *map(decoder.num_weights, [*whole, *blocks])]),
        reduced_at_once=max([*map(max, sizes), *trained_in_whole]),
        partly_called=bool(parts),
        buffers=sum(buffer.nbytes for _, buffer in persistent_buffers(model)),
        flops=model_flops(model),
        repeated=_count_repeated(model),
    )


def _count_repeated(model: Any) -> tuple[float, float]:
    """Return the weights whose products the backward repeats, with `full` and with `selective`.

    `selective` keeps what a feed-forward block's widening products give. The product that narrows
    again is a layer's last one, and what it gives is needed by no backward: torch repeats it with
    neither. Stacked experts are parameters of such names and no modules, and all is repeated.
    """
    everything = widening = narrowing = 0.0
    blocks = {
        name
        for name, module in model.named_modules()
        if WIDENING & {child for child, _ in module.named_children()}
    }
    for name, parameter, share in used_weights(model):
        number, (*above, _) = parameter.numel() * share, name.split(".")
        everything += number
        if WIDENING & {*above}:
            widening += number
        elif any(".".join(above[:n]) in blocks for n in range(len(above))):
            narrowing += number
    return everything - narrowing, everything - narrowing - widening


# -------------------------------------------------------------------------------------- activations


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd saves of the decoder for one micro-batch."""

    kept: int  # from the forward to the backward
    layer: int  # once more while a layer is recomputed: the largest layer's; 0 without
    host: int = 0  # kept in the host's memory


@plan_failures_explained()
def trace_activations(
    model: Any, tokens: int, *, tiles: bool = True, modes: Collection[str] = MODES
) -> dict[str, Activations]:
    """Count what a forward over `tokens` meta tokens saves for the backward.

    Args:
        tiles: feed-forward blocks of recomputed layers may run in tiles.
        modes: values of model.activation_checkpointing.

    Returns:
        Activations by those of `modes` that the model supports.

    Raises:
        BadInput: the model's forward fails on meta tensors, as it depends on values.
    """
    modes = modes if model.supports_gradient_checkpointing else {"none"}
    kept, whole_layers = _trace_forward(model, tokens, "none")
    found = {"none": Activations(kept, 0)}
    if "selective" in modes:
        kept, of_layers = _trace_forward(model, tokens, "selective")
        found["selective"] = Activations(kept, _largest_again(whole_layers, of_layers))
    if {"full", "offload"} & set(modes):
        workspace = _count_tile_bytes(model, tokens) if tiles else 0
        if workspace:
            _, whole_layers = _trace_forward(model, tokens, "none", tiles=True)
        kept, of_layers = _trace_forward(model, tokens, "full", tiles=workspace > 0)
        again = _largest_again(whole_layers, of_layers) + workspace
        found["full"] = Activations(kept, again)
        # a layer's input and the next one's
        ahead = 2 * max(of_layers, default=0)
        found["offload"] = Activations(ahead, again, host=kept)
    return {mode: activations for mode, activations in found.items() if mode in modes}


def _largest_again(whole: list[int], kept: list[int]) -> int:
    """Return the most bytes that a layer saves whole beside those that it has kept."""
    return max((all_ - part for all_, part in zip(whole, kept, strict=True)), default=0)


def _count_tile_bytes(model: Any, tokens: int) -> int:
    """Return the bytes that the largest feed-forward block's backward takes if it runs in tiles: a
    tile's activations, and the weights' gradients, rounded and in fp32. 0 if it runs whole.
    """
    hidden, largest = model.config.get_text_config().hidden_size, 0
    if not wants_tiles("full", tokens, hidden):
        return 0
    for block in feed_forward_blocks(model):
        weight = next(block.parameters())
        x = torch.empty(1, tile_tokens(hidden), hidden, dtype=weight.dtype, device="meta")
        with _counting_saved_bytes(block) as (saved, _):
            block(x.requires_grad_())
        trained = sum(p.numel() for p in block.parameters() if p.requires_grad)
        largest = max(largest, saved() + (4 + weight.element_size()) * trained)
    return largest


def _trace_forward(
    model: Any, tokens: int, mode: str, tiles: bool = False
) -> tuple[int, list[int]]:
    """Return the bytes saved by the decoder's forward, and those of each of its layers.

    Args:
        mode: of model.activation_checkpointing.
    """
    of_layers: list[int] = []
    with _counting_saved_bytes(model) as (saved, count):

        def count_and_save(context: Any, *_: Any, **__: Any) -> CheckpointPolicy:
            tree_map_only(torch.Tensor, count, context.op_output)
            return save()

        def begin(*_: Any) -> None:
            of_layers.append(-saved())

        def end(*_: Any) -> None:
            of_layers[-1] += saved()

        hooks = []
        for layer in decoder.decoder_layers(model):
            hooks += [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]
        set_checkpointing(model, mode, count_and_save)
        set_tiles(model, tiles)
        try:
            _run_decoder(model, tokens)
        finally:
            for hook in hooks:
                hook.remove()
            set_checkpointing(model, "none")
            set_tiles(model, False)
        return saved(), of_layers


@contextmanager
def _counting_saved_bytes(
    model: nn.Module,
) -> Iterator[tuple[Callable[[], int], Callable[[torch.Tensor], torch.Tensor]]]:
    """Give a function that returns the bytes that autograd has saved inside so far, and one that
    counts a tensor among them.

    Each storage counts once, and the weights do not count.
    """
    seen = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: list[torch.Tensor] = []  # alive, or a later storage could get a freed one's identity
    total = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept.append(tensor)
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield (lambda: total), count


@torch.library.custom_op("packhorse::planned_attention", mutates_args=())
def _planned_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand in for FlashAttention: return the output, which `sinks` have a part in, and the
    log-sum-exp of the scores, one number for each head and position.
    """
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def _save_as_fused(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _no_backward(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError("a plan runs no backward")


_planned_attention.register_fake(_planned_attention._init_fn)
_planned_attention.register_autograd(_no_backward, setup_context=_save_as_fused)


_attended: list[AttentionShape] = []  # that the stand-in has seen


def _fused(
    layer: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arguments: Arguments
) -> torch.Tensor:
    asked = (arguments.window, arguments.softcap, arguments.sinks is not None, arguments.dropout)
    _attended.append(AttentionShape(q.shape[1], k.shape[1], k.shape[3], v.shape[3], *asked))
    return _planned_attention(q, k, v, arguments.sinks)[0].transpose(1, 2)
