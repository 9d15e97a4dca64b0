"""Attend over packed sequences: each document of a sequence sees itself only (C4).

In: the kernel that the recipe asks for. Out: the name of an attention function that transformers
calls in every layer, and the keyword arguments that carry a batch's document boundaries to it.

Three backends (attention_kernels.py) are registered with transformers' AttentionInterface as
`packhorse_<backend>`.
transformers makes no mask for functions that it does not know, so that no backend ever gets one:
boundaries, causality and windows are the backend's own. What a backend cannot honour is refused,
never ignored.

Shapes: T tokens, Hq query heads, Hk key and value heads, E head size, L tokens of one document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from packhorse.trainer.datatypes import BadInput, Batch, slice_pieces
from packhorse.trainer.model import attention_kernels, flash_versions
from packhorse.trainer.model.attention_kernels import Arguments, Bounds, Slices, visible
from packhorse.trainer.model.decoder import uncompiled
from packhorse.trainer.model.sequence_exchange import attend_in_slices

BACKENDS = ("flash_attn", "torch_varlen", "reference")

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


# ------------------------------------------------------------------------------------------- choice


def choose(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Return the backend for `model.attention`, and the reason for it.

    Raises:
        BadInput: the recipe names a backend that cannot run here.
    """
    fused_missing = _fused_missing(device, dtype)
    missing = {"flash_attn": fused_missing, "torch_varlen": fused_missing, "reference": None}
    version = ""
    if not fused_missing:
        try:
            version = f"flash-attn {flash_versions.load_for(device).version}"
        except ImportError as error:
            missing["flash_attn"] = str(error)
    if name != "auto":
        if missing[name]:
            raise BadInput(
                f"model.attention: {name} cannot be used: {missing[name]}; use `auto` or "
                "`reference`"
            )
        why = "as asked for"
        return name, f"{version}, {why}" if name == "flash_attn" else why
    chosen = next(backend for backend in BACKENDS if not missing[backend])
    reasons = [f"no {backend}: {why}" for backend, why in missing.items() if why]
    return chosen, "; ".join(reasons) or version


def fused_kernels(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the fused kernels that can be imported here, the preferred first, as `flash_attn 3`
    and `torch_varlen`.
    """
    if _fused_missing(device, dtype):
        return []
    try:
        found = flash_versions.load(torch.cuda.get_device_capability(device)[0])
    except ImportError:
        found = ()
    return [*(f"flash_attn {flash.version}" for flash in found), "torch_varlen"]


def pin(kernel: str) -> str:
    """Let `flash_attn` be the version of a kernel of `fused_kernels`; return its backend."""
    backend, _, version = kernel.partition(" ")
    flash_versions.pin(int(version) if version else None)
    return backend


def _fused_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what FlashAttention's kernels lack here, or None."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return "it takes 16-bit types only, and model.dtype is float32"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    return None


def implementation(backend: str, wrap: Callable[[Any], Any] = lambda function: function) -> str:
    """Register the backend with transformers; return its name for `attn_implementation`.

    Args:
        wrap: gets the backend's attention function and returns the one to register.
    """
    from transformers import AttentionInterface

    name = f"packhorse_{backend}"
    AttentionInterface.register(name, wrap(_FUNCTIONS[backend]))
    return name


def is_ours(model: Any) -> bool:
    """Return whether the model attends through a backend of packhorse."""
    return (model.config._attn_implementation or "").startswith("packhorse_")


class SequenceGroup(NamedTuple):
    """The ranks that share each packed sequence (C13), and their exchange in attention."""

    process_group: Any
    kind: str | None  # parallel.sequence_kind


def keyword_arguments(batch: Batch, group: SequenceGroup | None = None) -> dict[str, Any]:
    """Return the arguments of model.forward that carry the batch's document boundaries.

    `document_bounds` is ours. A sequence of several documents gets transformers' own arguments
    too, for recurrent and convolutional layers. A single document needs none, and such layers
    refuse them where they lack a kernel. A slice of a sequence has none, either: there, such layers
    are refused (sequence_check.py).
    """
    bounds, (index, number) = batch.cu_seqlens, batch.slice
    slices = None
    if number > 1:
        assert group is not None, "a slice, and no ranks that have the others"
        pieces = slice_pieces(batch.lengths, number, batch.zigzag)
        slices = Slices(pieces, index, *group)
    ours = {"document_bounds": Bounds(bounds, batch.max_seqlen, batch.lengths, slices)}
    if len(batch.lengths) == 1 or slices:
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


_current: Bounds | None = None  # of the batch in the forward, for layers that hand none on


def current_bounds(tokens: int) -> Bounds | None:
    """Return the boundaries of the batch in the forward, if it has as many tokens on this rank."""
    # a batch of other tokens than the layer's is not the layer's: BLT attends between patches
    return _current if _current and _current.own_tokens == tokens else None


@contextmanager
def found_by_all(bounds: Bounds | None) -> Iterator[None]:
    """Let attention find a batch's boundaries in the block where a layer does not hand them on.

    Some layers (StableLM's, Nemotron's) call their attention without the arguments that they got.
    With gradients the boundaries stay until the next forward: a backward may recompute layers.
    """
    global _current
    _current = bounds
    try:
        yield
    finally:
        if not torch.is_grad_enabled():
            _current = None


# ------------------------------------------------------------------- transformers' own ways, masks


@contextmanager
def other_attention(model: Any, name: str) -> Iterator[None]:
    """Let the model attend by transformers' own `name` inside the block.

    Generation with a cache and the packing check need it; compiled layers run uncompiled. A model
    without sdpa (some have soft caps or sinks, which sdpa lacks) attends eagerly instead.
    """
    before = model.config._attn_implementation
    if name == "sdpa" and not getattr(model, "_supports_sdpa", True):
        name = "eager"
    set_implementation(model, name)
    try:
        with uncompiled(model), found_by_all(None):
            yield
    finally:
        set_implementation(model, before)


def set_implementation(model: Any, name: str) -> None:
    """Let the model attend by a function of transformers' table, and make the masks that it needs.

    A model with attention of its own alone (BLOOM) refuses the function; its masks must follow.
    """
    model.set_attn_implementation(name)
    model.config._attn_implementation = name


@contextmanager
def checked_masks(model: Any) -> Iterator[set[nn.Module]]:
    """Compare the mask that each layer would have with what its backend sees, inside the block.

    Gives the modules that have attended through the backend so far.

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

    if not is_ours(model):  # its own masks are right
        yield set()
        return
    name = model.config._attn_implementation
    AttentionMaskInterface.register(name, whole_mask)
    attended = _CHECKED[name] = set()
    try:
        yield attended
    finally:
        del _CHECKED[name]
        # or every step would make T x T masks
        AttentionMaskInterface._global_mapping.pop(name)


# attention functions that compare masks now, and the modules that they attended for
_CHECKED: dict[str, set[nn.Module]] = {}


def _compare_mask(
    layer: str, mask: torch.Tensor, window: int | None, documents: Bounds, seen: Bounds
) -> None:
    """Refuse a mask (1, 1, T, T), True where seen, that asks for more than the backends do.

    Args:
        seen: what a backend attends within: the documents, or chunks of each.
    """
    total = mask.shape[-1]
    same = _same_piece(documents, total)
    ours = visible(total, window, mask.device) & _same_piece(seen, total)
    # a mask that was made without position_ids knows no documents, which is no difference
    if mask.shape[-2] != total or not torch.equal(ours.expand(mask.shape), mask & same):
        raise BadInput(
            f"{layer} masks its attention by more than causality, documents and a window of "
            f"{window}, which packed attention cannot honour; take another model"
        )


def _same_piece(bounds: Bounds, total: int) -> torch.Tensor:
    """Return (T, T), True where two tokens lie in the same document, or chunk of one."""
    number = _document_index(bounds.cu_seqlens, total)
    return number[:, None] == number[None, :]


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
    document_bounds = document_bounds or current_bounds(query.shape[2])
    if document_bounds is None:
        raise BadInput(
            f"{layer} does not hand the document boundaries on to its attention; this model cannot "
            "be packed"
        )
    attended = _CHECKED.get(getattr(module.config, "_attn_implementation", ""))
    if attended is not None:
        attended.add(module)
    chunk = _chunk_size(module)
    bounds = document_bounds.chunked(chunk) if chunk else document_bounds
    if attention_mask is not None:
        if attended is None:
            raise BadInput(
                f"{layer} makes an attention mask of its own, which packed attention cannot honour"
            )
        _compare_mask(layer, attention_mask, sliding_window, document_bounds, bounds)
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
    arguments = Arguments(scaling, sliding_window, softcap, s_aux, dropout or None, bounds)
    if bounds.slices:
        return attend_in_slices(backend, layer, query, key, value, arguments), None
    return backend(layer, query, key, value, arguments), None


def _chunk_size(module: nn.Module) -> int | None:
    """Return the tokens of a chunk that a layer attends within (Llama 4), or None.

    transformers hands it to the layer in its mask alone; the configuration says which layers it is.
    """
    config: Any = module.config
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if not kinds or layer is None or kinds[layer] != "chunked_attention":
        return None
    return config.attention_chunk_size


_FUNCTIONS = {
    "flash_attn": as_attention_function(attention_kernels.flash_attn),
    "torch_varlen": as_attention_function(attention_kernels.torch_varlen),
    "reference": as_attention_function(attention_kernels.reference),
}
