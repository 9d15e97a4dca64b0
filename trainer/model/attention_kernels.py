"""Attend within the documents of a packed sequence: two fused kernels and a readable reference.

In: queries (1, Hq, T, E), keys and values (1, Hk, T, E) of a packed sequence, and what the layer
asks for. Out: (1, T, Hq, E). Each kernel refuses what it lacks.

Shapes: T tokens, Hq query heads, Hk key and value heads, E head size, L tokens of one document, D
documents.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from packhorse.trainer.datatypes import BadInput, Ranges
from packhorse.trainer.model import flash_versions

PRODUCTS_TOKENS = 512  # of a document: beyond, holding all L x L scores costs more than it gains
MAX_HEAD_SIZE = 256  # of every FlashAttention, torch's own build of it included


class Slices(NamedTuple):
    """Where the slices of a packed sequence lie that several ranks share (C13)."""

    pieces: tuple[Ranges, ...]  # the tokens of each rank
    index: int  # of this rank
    group: Any  # the ranks' process group
    kind: str | None  # how they exchange: parallel.sequence_kind

    @property
    def number(self) -> int:
        return len(self.pieces)

    @property
    def tokens(self) -> list[int]:
        """The number of tokens of each rank."""
        return [sum(stop - start for start, stop in of_rank) for of_rank in self.pieces]


@dataclass(eq=False)
class Bounds:
    """Where the documents of a packed sequence lie.

    It is no tuple: a compiled layer would be compiled anew for each number of documents.
    """

    cu_seqlens: torch.Tensor  # (D + 1,) int32, each document's first token, and the end
    max_seqlen: int
    lengths: tuple[int, ...]  # the same on the host, where reading them costs no synchronization
    slices: Slices | None = None  # None: the sequence lies on this rank alone

    @property
    def own_tokens(self) -> int:
        """The number of tokens on this rank."""
        if self.slices is None:
            return sum(self.lengths)
        return self.slices.tokens[self.slices.index]

    def chunked(self, size: int) -> Bounds:
        """Return the bounds of chunks: each document is cut every `size` tokens from its start."""
        lengths = [min(size, n - start) for n in self.lengths for start in range(0, n, size)]
        return self._of(lengths)

    def of_pieces(self, pieces: Ranges, firsts: Sequence[int]) -> tuple[Bounds, Bounds]:
        """Return the bounds of a rank's queries, and of the keys from `firsts` on that they see.

        Args:
            firsts: of each piece of the rank's, the first key that it attends to.
        """
        ends = list(accumulate(self.lengths))
        cut = [
            (max(end - n, first), max(end - n, start), min(end, stop))
            for (start, stop), first in zip(pieces, firsts, strict=True)
            for end, n in zip(ends, self.lengths)
            if end - n < stop and end > start
        ]
        inside = self._of([end - start for _, start, end in cut])
        return inside, self._of([end - begin for begin, _, end in cut])

    @property
    def own_parts(self) -> list[tuple[int, int]]:
        """The parts of documents on this rank: the tokens of each, and its whole document's."""
        pieces = self.slices.pieces[self.slices.index] if self.slices else ((0, sum(self.lengths)),)
        return [
            (min(end, stop) - max(end - length, start), length)
            for start, stop in pieces
            for end, length in zip(accumulate(self.lengths), self.lengths)
            if end - length < stop and end > start
        ]

    def _of(self, lengths: list[int]) -> Bounds:
        ends = document_ends(tuple(lengths), self.cu_seqlens.device)
        return Bounds(ends, max(lengths), tuple(lengths), self.slices)


@lru_cache(maxsize=64)  # all layers ask for the same
def document_ends(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return 0 and the end of each document, (D + 1,) int32. The host does not wait for the copy to
    a GPU, which comes from pinned memory.
    """
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    ends = ends.pin_memory() if device.type == "cuda" else ends
    return ends.to(device, non_blocking=True)


class Arguments(NamedTuple):
    """What a layer asks of a backend, beside queries, keys and values."""

    scale: float | None  # None: 1 / sqrt(E)
    window: int | None  # a token sees itself and window - 1 before it
    softcap: float | None
    sinks: torch.Tensor | None  # (Hq,) a logit per head that takes part in the softmax only
    dropout: float | None
    bounds: Bounds
    # Of the queries, if they are fewer than the keys: the last ones of each document.
    queries: Bounds | None = None


# ------------------------------------------------------------------------------------ fused kernels


def flash_attn(
    layer: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: Arguments
) -> torch.Tensor:
    """Attend by the varlen kernel of flash-attn 2, 3 or 4 (Dao, 2023, arXiv:2307.08691)."""
    flash = flash_versions.load_for(query.device)
    q, k, v, scale = for_varlen(layer, "flash_attn", flash.lacks, query, key, value, arguments)
    if flash.version == 4 and q.shape[-1] > 128:
        # between 128 and 256 it takes DeepSeek's sizes alone
        q, k, v = (F.pad(x, (0, MAX_HEAD_SIZE - x.shape[-1])) for x in (q, k, v))
    ends_q, ends_k, longest_q, longest_k = _varlen_bounds(arguments)
    out = flash.attend(
        *(q, k, v),
        cu_seqlens_q=ends_q,
        cu_seqlens_k=ends_k,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        softmax_scale=scale,
        causal=True,
        window_size=(arguments.window - 1, 0) if arguments.window else (-1, -1),
        softcap=arguments.softcap or 0.0,
        # its backward adds atomically else, in an order that differs from run to run
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **({"dropout_p": arguments.dropout} if arguments.dropout else {}),
    )
    # 4, and early builds of 3, return the logarithm of the softmax's sum beside the output
    out = out if isinstance(out, torch.Tensor) else out[0]
    return out[..., : value.shape[-1]].unsqueeze(0)


def torch_varlen(
    layer: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: Arguments
) -> torch.Tensor:
    """Attend by torch's own FlashAttention 2 (torch.nn.attention.varlen, torch 2.11 to 2.13).

    It lacks soft caps, sinks and dropout.
    """
    from torch.nn.attention.varlen import varlen_attn

    lacks = ("softcap", "sinks", "dropout")
    q, k, v, scale = for_varlen(layer, "torch_varlen", lacks, query, key, value, arguments)
    grouped: dict[str, Any] = {}
    if k.shape[1] != q.shape[1]:
        if _takes_groups(varlen_attn):
            grouped = {"enable_gqa": True}
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    # by default a token would see all that follow it: a window without any to the right is causal
    window = (arguments.window - 1 if arguments.window else -1, 0)
    ends = _varlen_bounds(arguments)
    out = varlen_attn(q, k, v, *ends, scale=scale, window_size=window, **grouped)
    assert isinstance(out, torch.Tensor)
    return out[..., : value.shape[-1]].unsqueeze(0)


def _varlen_bounds(arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Return the ends of queries and keys, and the longest of each. Where a document has fewer
    queries, the kernels take them for its last tokens (bottom-right, since FlashAttention 2.1).
    """
    keys, queries = arguments.bounds, arguments.queries or arguments.bounds
    return queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen


@cache
def _takes_groups(varlen_attn: Any) -> bool:
    # torch 2.11 lacks the argument; the signature is slow to read in every layer
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def for_varlen(
    layer: str,
    backend: str,
    lacks: tuple[str, ...],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    arguments: Arguments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Return queries, keys and values as the varlen kernels want them, (T, H, E), and the scale.

    The kernels want one head size for all three, a multiple of 8 and at most 256. Heads are padded
    with zeros, which change no product; the scale is that of the size before, and the caller cuts
    the output to the value's size.

    Raises:
        BadInput: the layer asks for what the backend `lacks`, or for heads or a type that it does
            not take.
    """
    asked = [what for what in lacks if getattr(arguments, what) is not None]
    if asked:
        raise BadInput(
            f"{layer} needs attention with {' and '.join(asked)}, which {backend} lacks; use "
            "model.attention=reference"
        )
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
    return q, k, v, arguments.scale if arguments.scale is not None else size**-0.5


# ---------------------------------------------------------------------------------------- reference


def reference(
    layer: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: Arguments
) -> torch.Tensor:
    """Attend one document after the other by torch's own attention.

    This is what the fused kernels are tested against, and what a CPU uses.
    """
    lengths = arguments.bounds.lengths
    queries = (arguments.queries or arguments.bounds).lengths
    plain = arguments.softcap is None and arguments.sinks is None
    attend = _one_document if plain else _one_document_in_full
    parts = zip(query.split(queries, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2))
    outputs = [attend(q, k, v, arguments).transpose(1, 2) for q, k, v in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _one_document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arguments: Arguments
) -> torch.Tensor:
    """Return causal attention within one document, (1, Hq, L, E)."""
    # a mask costs torch its fast kernels, so that there is one only where the window cuts, or
    # where queries begin later than keys
    length = k.shape[2]
    windowed = arguments.window is not None and length > arguments.window
    masked = windowed or q.shape[2] != length
    on_cpu_in_bf16 = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if on_cpu_in_bf16 and length <= PRODUCTS_TOKENS and not masked and not arguments.dropout:
        return _by_products(q, k, v, arguments.scale)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=visible(length, arguments.window, q.device, q.shape[2]) if masked else None,
        is_causal=not masked,
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

    All L x L scores are held in fp32, as the models' own eager attention computes the softmax, or
    in fp64.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scale = arguments.scale if arguments.scale is not None else q.shape[-1] ** -0.5
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(wide) * scale
    if arguments.softcap is not None:
        scores = torch.tanh(scores / arguments.softcap) * arguments.softcap
    seen = visible(k.shape[2], arguments.window, q.device, q.shape[2])
    scores = scores.masked_fill(~seen, -torch.inf)
    if arguments.sinks is not None:
        sinks = arguments.sinks.to(wide).reshape(1, -1, 1, 1).expand(1, q.shape[1], q.shape[2], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    # a sink takes its share of the softmax and has no value
    shares = scores.softmax(dim=-1)[..., : k.shape[2]]
    if arguments.dropout:
        shares = F.dropout(shares, arguments.dropout)
    return shares.to(v.dtype) @ v


def visible(
    length: int, window: int | None, device: torch.device, queries: int | None = None
) -> torch.Tensor:
    """Return (L, L), True where query i sees key j: 0 <= i - j < window.

    Args:
        queries: how many of the last rows are wanted; None for all.
    """
    position = torch.arange(length, device=device)
    distance = position[length - (queries or length) :, None] - position[None, :]
    return (distance >= 0) & (distance < (window or length))
