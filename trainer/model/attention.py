"""Attend over packed sequences: each document of a sequence sees itself only (C4).

In: the kernel that the recipe asks for. Out: the name of an attention function that transformers
calls in every layer, and the keyword arguments that carry a batch's document boundaries to it.

Three backends are registered with transformers' AttentionInterface as `packhorse_<backend>`.
transformers makes no mask for functions that it does not know, so that no backend ever gets one:
boundaries, causality and windows are the backend's own. What a backend cannot honour is refused,
never ignored.

Shapes: T tokens, Hq query heads, Hk key and value heads, E head size, L tokens of one document.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from trainer.datatypes import BadInput, Batch

BACKENDS = ("flash_attn", "torch_varlen", "reference")
PRODUCTS_TOKENS = 512  # of a document: beyond, holding all L x L scores costs more than it gains
MAX_HEAD_SIZE = 256  # of FlashAttention 2, torch's own build of it included

# Arguments of model.forward that pass through a layer to the attention function and change nothing
# in it. Any other argument that has a value is refused, as a new one may change the result.
_NOT_FOR_ATTENTION = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
    "logits_to_keep",
}


class Bounds(NamedTuple):
    """Where the documents of a packed sequence lie."""

    cu_seqlens: torch.Tensor  # (D + 1,) int32, each document's first token, and the end
    max_seqlen: int
    lengths: tuple[int, ...]  # the same on the host, where reading them costs no synchronization


class Arguments(NamedTuple):
    """What a layer asks of a backend, beside queries, keys and values."""

    scale: float | None  # None: 1 / sqrt(E)
    window: int | None  # a token sees itself and window - 1 before it
    softcap: float | None
    sinks: torch.Tensor | None  # (Hq,) a logit per head that takes part in the softmax only
    dropout: float | None
    bounds: Bounds


# ------------------------------------------------------------------------------------------- choice


def choose(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Return the backend for `model.attention`, and the reason for it.

    Raises:
        BadInput: the recipe names a backend that cannot run here.
    """
    fused_missing = _fused_missing(device, dtype)
    missing = {
        "flash_attn": fused_missing
        if importlib.util.find_spec("flash_attn")
        else "the package flash-attn is not installed",
        "torch_varlen": fused_missing,
        "reference": None,
    }
    if name != "auto":
        if missing[name]:
            raise BadInput(
                f"model.attention: {name} cannot be used: {missing[name]}; use `auto` or "
                "`reference`"
            )
        return name, "named in the recipe"
    chosen = next(backend for backend in BACKENDS if not missing[backend])
    reasons = [f"no {backend}: {why}" for backend, why in missing.items() if why]
    return chosen, "; ".join(reasons) or "the first choice"


def _fused_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what FlashAttention's kernels lack here, or None."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return "it takes 16-bit types only, and model.dtype is float32"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    return None


def implementation(backend: str) -> str:
    """Register the backend with transformers; return its name for `attn_implementation`."""
    from transformers import AttentionInterface

    name = f"packhorse_{backend}"
    AttentionInterface.register(name, _FUNCTIONS[backend])
    return name


def keyword_arguments(batch: Batch) -> dict[str, Any]:
    """Return the arguments of model.forward that carry the batch's document boundaries.

    `document_bounds` is ours. A sequence of several documents gets transformers' own arguments
    too, for recurrent and convolutional layers. A single document needs none, and such layers
    refuse them where they lack a kernel.
    """
    bounds = batch.cu_seqlens
    ours = {"document_bounds": Bounds(bounds, batch.max_seqlen, batch.lengths)}
    if len(batch.lengths) == 1:
        return ours
    return ours | {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
        "seq_idx": _document_index(bounds, batch.input_ids.shape[0]).int().unsqueeze(0),
    }


def _document_index(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """Return the number of each token's document, (T,) int64, without a copy to the host."""
    starts = torch.zeros(total, dtype=torch.long, device=cu_seqlens.device)
    return starts.index_fill_(0, cu_seqlens[1:-1].long(), 1).cumsum(0)


# ------------------------------------------------------------------- transformers' own ways, masks


@contextmanager
def other_attention(model: Any, name: str) -> Iterator[None]:
    """Let the model attend by transformers' own `name` inside the block.

    Generation with a cache and the packing check need it. A model without sdpa (some have soft caps
    or sinks, which sdpa lacks) attends eagerly instead.
    """
    before = model.config._attn_implementation
    if name == "sdpa" and not getattr(model, "_supports_sdpa", True):
        name = "eager"
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def checked_masks(model: Any) -> Iterator[None]:
    """Compare the mask that each layer would have with what its backend sees, inside the block.

    A window or chunk that reaches a layer in its mask alone would otherwise be lost, as
    transformers makes no masks for our attention functions.
    """
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def whole_mask(**arguments: Any) -> Any:
        # transformers would leave out a mask that sdpa's own flags can express
        return sdpa_mask(
            **{**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        )

    name = model.config._attn_implementation
    AttentionMaskInterface.register(name, whole_mask)
    _CHECKED.add(name)
    try:
        yield
    finally:
        _CHECKED.discard(name)
        # or every step would make T x T masks
        AttentionMaskInterface._global_mapping.pop(name)


_CHECKED: set[str] = set()  # attention functions that compare masks now


def _compare_mask(
    layer: str, mask: torch.Tensor, window: int | None, cu_seqlens: torch.Tensor
) -> None:
    """Refuse a mask (1, 1, T, T), True where seen, that asks for more than the backends do."""
    total = mask.shape[-1]
    document = _document_index(cu_seqlens, total)
    same = document[:, None] == document[None, :]
    ours = _visible(total, window, mask.device) & same
    # a mask that was made without position_ids knows no documents, which is no difference
    if not torch.equal(ours.expand(mask.shape), mask & same):
        raise BadInput(
            f"{layer} masks its attention by more than causality, documents and a window of "
            f"{window}, which packed attention cannot honour; take another model"
        )


# ------------------------------------------------------------------------------------- the function


def as_attention_function(backend: Any) -> Any:
    """Return a function that transformers can call as a layer's attention, with the checks."""

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return _attend(backend, module, *args, **kwargs)

    return attend


def _attend(
    backend: Any,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    document_bounds: Bounds | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by a backend: queries (1, Hq, T, E), keys and values (1, Hk, T, E) -> (1, T, Hq, E).

    Raises:
        BadInput: the layer asks for what packed causal attention, or this backend, does not do.
    """
    layer = type(module).__name__
    if document_bounds is None:
        raise BadInput(
            f"{layer} does not hand the document boundaries on to its attention; this model cannot "
            "be packed"
        )
    if attention_mask is not None:
        if getattr(module.config, "_attn_implementation", None) not in _CHECKED:
            raise BadInput(
                f"{layer} makes an attention mask of its own, which packed attention cannot honour"
            )
        _compare_mask(layer, attention_mask, sliding_window, document_bounds.cu_seqlens)
    # a layer that says nothing about causality is causal
    if is_causal is False or not getattr(module, "is_causal", True):
        raise BadInput(f"{layer} is not causal attention")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise BadInput(f"{layer} attends to other positions than its own sequence's")
    unknown = [
        name
        for name, given in others.items()
        if given is not None and given is not False and name not in _NOT_FOR_ATTENTION
    ]
    if unknown:
        raise BadInput(
            f"{layer} asks attention for `{'`, `'.join(unknown)}`, which no backend of packhorse "
            "knows"
        )
    arguments = Arguments(scaling, sliding_window, softcap, s_aux, dropout or None, document_bounds)
    return backend(layer, query, key, value, arguments), None


# ------------------------------------------------------------------------------------ fused kernels


def _flash_attn(
    layer: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: Arguments
) -> torch.Tensor:
    """Attend by flash-attn's varlen kernel (Dao, 2023, arXiv:2307.08691); it lacks sinks."""
    from flash_attn import flash_attn_varlen_func

    _refuse(layer, "flash_attn", arguments, ("sinks",))
    q, k, v, scale = _for_varlen(layer, "flash_attn", query, key, value, arguments.scale)
    ends, longest = arguments.bounds.cu_seqlens, arguments.bounds.max_seqlen
    out = flash_attn_varlen_func(
        *(q, k, v, ends, ends, longest, longest),
        dropout_p=arguments.dropout or 0.0,
        softmax_scale=scale,
        causal=True,
        window_size=(arguments.window - 1, 0) if arguments.window else (-1, -1),
        softcap=arguments.softcap or 0.0,
    )
    return out[..., : value.shape[-1]].unsqueeze(0)


def _torch_varlen(
    layer: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: Arguments
) -> torch.Tensor:
    """Attend by torch's own FlashAttention 2 (torch.nn.attention.varlen, torch 2.11 to 2.13).

    It lacks soft caps, sinks and dropout.
    """
    from torch.nn.attention.varlen import varlen_attn

    _refuse(layer, "torch_varlen", arguments, ("softcap", "sinks", "dropout"))
    q, k, v, scale = _for_varlen(layer, "torch_varlen", query, key, value, arguments.scale)
    ends, longest = arguments.bounds.cu_seqlens, arguments.bounds.max_seqlen
    grouped: dict[str, Any] = {}
    if k.shape[1] != q.shape[1]:
        if _takes_groups(varlen_attn):
            grouped = {"enable_gqa": True}
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    # by default a token would see all that follow it: a window without any to the right is causal
    window = (arguments.window - 1 if arguments.window else -1, 0)
    out = varlen_attn(
        q, k, v, ends, ends, longest, longest, scale=scale, window_size=window, **grouped
    )
    assert isinstance(out, torch.Tensor)
    return out[..., : value.shape[-1]].unsqueeze(0)


@cache
def _takes_groups(varlen_attn: Any) -> bool:
    # torch 2.11 lacks the argument; the signature is slow to read in every layer
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _refuse(layer: str, backend: str, arguments: Arguments, lacks: tuple[str, ...]) -> None:
    asked = [what for what in lacks if getattr(arguments, what) is not None]
    if asked:
        raise BadInput(
            f"{layer} needs attention with {' and '.join(asked)}, which {backend} lacks; use "
            "model.attention=reference"
        )


def _for_varlen(
    layer: str,
    backend: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Return queries, keys and values as the varlen kernels want them, (T, H, E), and the scale.

    The kernels want one head size for all three, a multiple of 8 and at most 256. Heads are padded
    with zeros, which change no product; the scale is that of the size before, and the caller cuts
    the output to the value's size.
    """
    size = query.shape[-1]
    padded = -(-max(size, value.shape[-1]) // 8) * 8
    if padded > MAX_HEAD_SIZE:
        raise BadInput(
            f"{layer} has heads of {padded}, and {backend} takes {MAX_HEAD_SIZE} at most; use "
            "model.attention=reference"
        )
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise BadInput(f"{layer} attends in {query.dtype}, and {backend} takes 16-bit types only")
    q, k, v = (
        (x[0] if x.shape[-1] == padded else F.pad(x[0], (0, padded - x.shape[-1]))).transpose(0, 1)
        for x in (query, key, value)
    )
    return q, k, v, scale if scale is not None else size**-0.5


# ---------------------------------------------------------------------------------------- reference


def _reference(
    layer: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: Arguments
) -> torch.Tensor:
    """Attend one document after the other by torch's own attention.

    This is what the fused kernels are tested against, and what a CPU uses.
    """
    lengths = arguments.bounds.lengths
    plain = arguments.softcap is None and arguments.sinks is None
    attend = _one_document if plain else _one_document_in_full
    parts = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2))
    outputs = [attend(q, k, v, arguments).transpose(1, 2) for q, k, v in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _one_document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arguments: Arguments
) -> torch.Tensor:
    """Return causal attention within one document, (1, Hq, L, E)."""
    # a mask costs torch its fast kernels, so that there is one only where the window cuts
    windowed = arguments.window is not None and q.shape[2] > arguments.window
    on_cpu_in_bf16 = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if on_cpu_in_bf16 and q.shape[2] <= PRODUCTS_TOKENS and not windowed and not arguments.dropout:
        return _by_products(q, k, v, arguments.scale)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=_visible(q.shape[2], arguments.window, q.device) if windowed else None,
        is_causal=not windowed,
        dropout_p=arguments.dropout or 0.0,
        scale=arguments.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _by_products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Return the same by plain matrix products, (1, Hq, L, E).

    For short documents in bf16 it is three times as fast as torch's kernel for CPUs, forward and
    backward.
    """
    heads, groups, length = k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
    # query heads that share a key head are stacked into one matrix, so that the key is not repeated
    stacked = (q * (scale if scale is not None else q.shape[-1] ** -0.5)).reshape(
        heads, groups * length, -1
    )
    later = torch.full((length, length), -torch.inf, dtype=q.dtype).triu_(1)
    scores = torch.bmm(stacked, k[0].transpose(1, 2)).view(heads, groups, length, length) + later
    return torch.bmm(scores.softmax(-1).view(heads, groups * length, length), v[0]).view(
        *q.shape[:3], v.shape[-1]
    )


def _one_document_in_full(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arguments: Arguments
) -> torch.Tensor:
    """Return the same with soft caps (Gemma 2) and sinks (gpt-oss), which torch's kernels lack.

    All L x L scores are held in fp32, as the models' own eager attention computes the softmax.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scale = arguments.scale if arguments.scale is not None else q.shape[-1] ** -0.5
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if arguments.softcap is not None:
        scores = torch.tanh(scores / arguments.softcap) * arguments.softcap
    scores = scores.masked_fill(~_visible(q.shape[2], arguments.window, q.device), -torch.inf)
    if arguments.sinks is not None:
        sinks = arguments.sinks.float().reshape(1, -1, 1, 1).expand(1, q.shape[1], q.shape[2], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    # a sink takes its share of the softmax and has no value
    shares = scores.softmax(dim=-1)[..., : k.shape[2]]
    if arguments.dropout:
        shares = F.dropout(shares, arguments.dropout)
    return shares.to(v.dtype) @ v


def _visible(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return (L, L), True where query i sees key j: 0 <= i - j < window."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < (window or length))


_FUNCTIONS = {
    "flash_attn": as_attention_function(_flash_attn),
    "torch_varlen": as_attention_function(_torch_varlen),
    "reference": as_attention_function(_reference),
}
