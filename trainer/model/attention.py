"""Documents of a packed row -> an attention kernel's arguments (C4).

In: the kernel the recipe asks for. Out: the name of an attention function that transformers calls
    in every
layer, and the keyword arguments that carry a batch's document boundaries to it.

Three backends, registered with transformers' AttentionInterface as `packhorse_<backend>`.
transformers makes no mask for functions it does not know, so none of them ever sees one:
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
# in it.
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
    """Where a row's documents lie, as attention backends read it."""

    cu_seqlens: torch.Tensor  # (D + 1,) int32
    max_seqlen: int
    lengths: tuple[int, ...]  # the same on the host


class Arguments(NamedTuple):
    """What a layer asks of a backend, beside queries, keys and values."""

    scale: float | None
    window: int | None  # a token sees itself and window - 1 before it
    softcap: float | None
    sinks: (
        torch.Tensor | None
    )  # (Hq,) a logit per head that takes part in the softmax and has no value
    dropout: float | None
    bounds: Bounds


def choose(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that `model.attention` asks for, and why that one.

    Raises:
        BadInput: a named backend cannot run here.
    """
    missing = {
        "flash_attn": _flash_attn_missing(device, dtype),
        "torch_varlen": _fused_missing(device, dtype),
        "reference": None,
    }
    if name != "auto":
        if missing[name]:
            raise BadInput(
                f"model.attention: {name} cannot be used: {missing[name]}; use `auto` or "
                f"`reference`"
            )
        return name, "named in the recipe"
    chosen = next(backend for backend in BACKENDS if not missing[backend])
    skipped_steps = [f"no {backend}: {why}" for backend, why in missing.items() if why]
    return chosen, "; ".join(skipped_steps) or "the first choice"


def _fused_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "it needs a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return "it knows 16-bit types only, and model.dtype is float32"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    return None


def _flash_attn_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    return _fused_missing(device, dtype)


def implementation(backend: str) -> str:
    """The backend's name for transformers' `attn_implementation`, after registering it there."""
    from transformers import AttentionInterface

    name = f"packhorse_{backend}"
    AttentionInterface.register(name, _FUNCTIONS[backend])
    return name


def keyword_arguments(batch: Batch) -> dict[str, Any]:
    """Arguments of model.forward that carry the batch's document boundaries to every layer.

    `document_bounds` is ours. A row of several documents has them under transformers' own names
    too, for recurrent and convolutional layers: one document needs no boundaries, and such layers
    refuse them where they lack a kernel.
    """
    bounds = batch.cu_seqlens
    ours = {"document_bounds": Bounds(bounds, batch.max_seqlen, batch.lengths)}
    if bounds.shape[0] == 2:
        return ours
    document = (
        torch.zeros_like(batch.input_ids, dtype=torch.int32)
        .index_fill_(0, bounds[1:-1].long(), 1)
        .cumsum(0)
    )
    return ours | {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
        "seq_idx": document.int().unsqueeze(0),
    }


@contextmanager
def other_attention(model: Any, name: str) -> Iterator[None]:
    """Inside, the model attends by transformers' own `name`, as generation with a cache and the
    probe need it.

    A model that has no sdpa (some have soft caps or sinks, which sdpa lacks) attends eagerly
    instead.
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
    """Inside, transformers makes the mask of every layer, and the attention function compares it
    with what its backend sees: a window or a chunk that reaches a layer in its mask alone would be
    lost on the way.
    """
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def whole_mask(**arguments: Any) -> Any:
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
        AttentionMaskInterface._global_mapping.pop(name)


_CHECKED: set[str] = set()  # attention functions whose masks are being compared


def _compare_mask(
    layer: str, mask: torch.Tensor, window: int | None, cu_seqlens: torch.Tensor
) -> None:
    """Raise where the layer's own mask (1, 1, T, T), True where seen, is not causal, by document
    and window.
    """
    total = mask.shape[-1]
    starts = cu_seqlens[1:-1].long()
    document = (
        torch.zeros(total, dtype=torch.long, device=mask.device).index_fill_(0, starts, 1).cumsum(0)
    )
    same = (
        document[:, None] == document[None, :]
    )  # a mask made without position_ids knows no documents
    ours = _visible(total, window, mask.device) & same
    if not torch.equal(ours.expand(mask.shape), mask & same):
        raise BadInput(
            f"{layer} masks its attention by more than causality, documents and a window of "
            f"{window}, "
            "which packed attention cannot honour; take another model"
        )


# ------------------------------------------------------------------------------------- the function


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
    """transformers' attention function: (1, Hq, T, E) queries, (1, Hk, T, E) keys and values -> (1,
    T, Hq, E).

    Raises:
        BadInput: the layer asks for what packed causal attention, or this backend, does not do.
    """
    layer = type(module).__name__
    if document_bounds is None:
        raise BadInput(
            f"{layer} does not hand the document boundaries on to its attention; this model cannot "
            f"be packed"
        )
    if (
        attention_mask is not None
        and getattr(module.config, "_attn_implementation", None) in _CHECKED
    ):
        _compare_mask(layer, attention_mask, sliding_window, document_bounds.cu_seqlens)
    elif attention_mask is not None:
        raise BadInput(
            f"{layer} makes an attention mask of its own, which packed attention cannot honour"
        )
    if is_causal is False or not getattr(module, "is_causal", True):
        raise BadInput(f"{layer} is not causal attention")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise BadInput(f"{layer} attends to other positions than its own row's")
    unknown = [
        k
        for k, v in others.items()
        if v is not None and v is not False and k not in _NOT_FOR_ATTENTION
    ]
    if unknown:
        raise BadInput(
            f"{layer} asks attention for `{'`, `'.join(unknown)}`, which no backend of packhorse "
            f"knows"
        )
    arguments = Arguments(scaling, sliding_window, softcap, s_aux, dropout or None, document_bounds)
    return backend(layer, query, key, value, arguments), None


def _refuse(layer: str, backend: str, arguments: Arguments, lacks: tuple[str, ...]) -> None:
    """Stop where the layer asks for something that the backend lacks."""
    asked = [what for what in lacks if getattr(arguments, what) is not None]
    if asked:
        raise BadInput(
            f"{layer} needs attention with {' and '.join(asked)}, which {backend} lacks; use "
            f"model.attention=reference"
        )


# ------------------------------------------------------------------------------------ fused kernels


def _flash_attn(
    layer: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: Arguments
) -> torch.Tensor:
    """flash-attn's varlen kernel (Dao, 2023): windows, soft caps and dropout; no sinks."""
    from flash_attn import flash_attn_varlen_func

    _refuse(layer, "flash_attn", arguments, ("sinks",))
    q, k, v, scale, size = _as_rows(layer, "flash_attn", query, key, value, arguments.scale)
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        arguments.bounds.cu_seqlens,
        arguments.bounds.cu_seqlens,
        arguments.bounds.max_seqlen,
        arguments.bounds.max_seqlen,
        dropout_p=arguments.dropout or 0.0,
        softmax_scale=scale,
        causal=True,
        window_size=(arguments.window - 1, 0) if arguments.window else (-1, -1),
        softcap=arguments.softcap or 0.0,
    )
    return out[..., :size].unsqueeze(0)


def _torch_varlen(
    layer: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: Arguments
) -> torch.Tensor:
    """torch's own FlashAttention 2 (torch.nn.attention.varlen, 2.11 to 2.13): windows; no soft cap,
    sinks, dropout.
    """
    from torch.nn.attention.varlen import varlen_attn

    _refuse(layer, "torch_varlen", arguments, ("softcap", "sinks", "dropout"))
    q, k, v, scale, size = _as_rows(layer, "torch_varlen", query, key, value, arguments.scale)
    grouped: dict[str, Any] = {}
    if k.shape[1] != q.shape[1]:
        if _takes_groups(varlen_attn):
            grouped = {"enable_gqa": True}
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = varlen_attn(
        q,
        k,
        v,
        arguments.bounds.cu_seqlens,
        arguments.bounds.cu_seqlens,
        arguments.bounds.max_seqlen,
        arguments.bounds.max_seqlen,
        scale=scale,
        window_size=(
            arguments.window - 1 if arguments.window else -1,
            0,
        ),  # its default is not causal
        **grouped,
    )
    assert isinstance(out, torch.Tensor)
    return out[..., :size].unsqueeze(0)


@cache
def _takes_groups(varlen_attn: Any) -> bool:
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _as_rows(
    layer: str,
    backend: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, int]:
    """(1, H, T, E) -> (T, H, E), with the head size filled up by zeros to what the kernels take.

    They want one head size for all three, a multiple of 8 and at most 256; zeros change no product.
    Returns the rows, the scale of the size before filling, and the value's size, to which the
    output is cut.
    """
    size, value_size = query.shape[-1], value.shape[-1]
    widest = -(-max(size, value_size) // 8) * 8
    if widest > MAX_HEAD_SIZE:
        raise BadInput(
            f"{layer} has heads of {widest}, and {backend} takes {MAX_HEAD_SIZE} at most; use "
            f"model.attention=reference"
        )
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise BadInput(f"{layer} attends in {query.dtype}, and {backend} knows 16-bit types only")
    rows = [
        (x[0] if x.shape[-1] == widest else F.pad(x[0], (0, widest - x.shape[-1]))).transpose(0, 1)
        for x in (query, key, value)
    ]
    return rows[0], rows[1], rows[2], scale if scale is not None else size**-0.5, value_size


# ---------------------------------------------------------------------------------------- reference


def _reference(
    layer: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: Arguments
) -> torch.Tensor:
    """One document after the other through torch's own attention: what the fused kernels are tested
    against.
    """
    lengths = arguments.bounds.lengths
    one = (
        _one_document
        if arguments.softcap is None and arguments.sinks is None
        else _one_document_in_full
    )
    parts = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2))
    outputs = [one(q, k, v, arguments).transpose(1, 2) for q, k, v in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _one_document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arguments: Arguments
) -> torch.Tensor:
    """(1, Hq, L, E) causal attention; a mask only where the document is longer than the window."""
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
    """The same by plain matrix products, the heads that share a key stacked as rows of one of them.

    For short documents in bf16 three times as fast as torch's kernel for CPUs, forward and
    backward.
    """
    heads, groups, length = k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
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
    """The same with soft caps (Gemma 2) and sinks (gpt-oss), which torch's kernels lack; all L x L
    scores in fp32.
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
        shares = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        shares = scores.softmax(dim=-1)
    shares = F.dropout(shares, arguments.dropout) if arguments.dropout else shares
    return shares.to(v.dtype) @ v


def _visible(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(L, L), True where query i sees key j: 0 <= i - j < window."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < (window or length))


def _bound(backend: Any) -> Any:
    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return _attend(backend, module, *args, **kwargs)

    return attend


_FUNCTIONS = {
    "flash_attn": _bound(_flash_attn),
    "torch_varlen": _bound(_torch_varlen),
    "reference": _bound(_reference),
}
