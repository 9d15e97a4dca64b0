"""Attend over a packed sequence that lies on several ranks, by any attention kernel (C13).

In: a rank's slice of a layer's queries, keys and values, and where the slices lie. Out: the same
slice of what attention over the whole sequence gives.

    ulysses   all-to-all: a rank gets all tokens of its share of the heads, and gives back its
              tokens of all heads (Jacobs et al., 2023, arXiv:2309.14509). Slices may be uneven.
    gather    a rank gets the keys and values that its own queries see, of its documents and, in a
              layer with a window, of that
    ring      keys and values go round, so that a rank holds a step's and the next's only
              (ring_attention.py). The slices are balanced: see datatypes.slice_pieces. A layer with
              a window gathers

Gradients take the same way back. DeepSpeed is not told: each rank's loss is of its own tokens, and
gradients sum over all ranks as ever (C2).

Shapes: n ranks, t tokens of this rank's slice, T of all; Hq query heads, Hk key and value heads, E
head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
import torch.distributed as td
from torch.autograd.function import once_differentiable

from packhorse.trainer.datatypes import BadInput, Ranges, first_key
from packhorse.trainer.model.attention_kernels import Arguments, Slices
from packhorse.trainer.model.ring_attention import attend_in_ring

Kernel = Callable[..., torch.Tensor]
Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""A layer's queries, keys and values."""


def attend_in_slices(
    kernel: Kernel,
    layer: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    arguments: Arguments,
) -> torch.Tensor:
    """Return (1, t, Hq, E) for queries (1, Hq, t, E), keys and values (1, Hk, t, E).

    Every rank of the group calls it.

    Raises:
        BadInput: `ulysses` is asked for, and the query heads do not divide among the ranks.
    """
    slices, heads, window = arguments.bounds.slices, query.shape[1], arguments.window
    assert slices is not None, "the sequence lies on one rank"
    qkv = query, key, value
    if goes_round(slices.kind, arguments.bounds.lengths, window):
        return attend_in_ring(kernel, layer, qkv, arguments)
    by_heads = takes_heads(slices.kind, heads, slices.number, window, sum(slices.tokens))
    if by_heads and heads % slices.number:
        raise BadInput(
            f"parallel.sequence_kind: {layer} has {heads} query heads, which do not "
            f"divide among {slices.number} ranks; use `gather`, or another parallel.sequence"
        )
    attend = _attend_by_heads if by_heads else _attend_by_queries
    return attend(kernel, layer, qkv, arguments, slices)


def takes_heads(kind: str | None, heads: int, ranks: int, window: int | None, total: int) -> bool:
    """Return whether a layer exchanges tokens for heads, else it gathers keys and values.

    Args:
        kind: parallel.sequence_kind. If it is null, a layer whose window is no longer than a slice
            gathers: it needs little of its neighbour.
        total: tokens of the sequence.
    """
    if kind is not None:
        return kind == "ulysses"
    return heads % ranks == 0 and not (window and window <= total // ranks)


def goes_round(kind: str | None, lengths: Sequence[int], window: int | None) -> bool:
    """Return whether a layer's keys go round: `ring` gathers the few that a window needs."""
    return kind == "ring" and not (window and window < max(lengths))


def seen_keys(lengths: Sequence[int], pieces: Ranges, window: int | None) -> Ranges:
    """Return the keys that a rank's queries see, a range for each of its pieces."""
    return tuple((first_key(lengths, start, window), stop) for start, stop in pieces)


def _attend_by_heads(
    kernel: Kernel, layer: str, qkv: Qkv, arguments: Arguments, slices: Slices
) -> torch.Tensor:
    """Attend with a share of the heads over all tokens."""
    query, key, value = qkv
    heads = query.shape[1] // slices.number
    if arguments.sinks is not None:
        own = arguments.sinks[slices.index * heads : (slices.index + 1) * heads]
        arguments = arguments._replace(sinks=own)
    # Repeated until they divide, key heads stay beside their queries, as both go to the ranks in
    # order. The number divides Hq, as n and Hk do.
    repeats = slices.number // math.gcd(slices.number, key.shape[1])
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    whole = (_Exchange.apply(x, slices, True) for x in (query, key, value))
    out = kernel(layer, *whole, arguments)
    return _Exchange.apply(out.transpose(1, 2), slices, False).transpose(1, 2)


def _attend_by_queries(
    kernel: Kernel, layer: str, qkv: Qkv, arguments: Arguments, slices: Slices
) -> torch.Tensor:
    """Attend with all heads for the own tokens, over the keys that they see."""
    query, *pair = qkv
    bounds, own = arguments.bounds, slices.index
    seen = [seen_keys(bounds.lengths, pieces, arguments.window) for pieces in slices.pieces]
    keys, values = (_Collect.apply(x, slices, seen) for x in pair)
    firsts = [first for first, _ in seen[own]]
    queries, of_keys = bounds.of_pieces(slices.pieces[own], firsts)
    arguments = arguments._replace(bounds=of_keys, queries=queries)
    return kernel(layer, query, keys, values, arguments)


class _Exchange(torch.autograd.Function):
    """Exchange heads for tokens, (1, n h, t, E) -> (1, h, T, E), or back if not `to_tokens`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slices: Slices, to_tokens: bool) -> torch.Tensor:
        ctx.slices, ctx.to_tokens = slices, to_tokens
        return (_heads_to_tokens if to_tokens else _tokens_to_heads)(x, slices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        back = _tokens_to_heads if ctx.to_tokens else _heads_to_tokens
        return back(grad, ctx.slices), None, None


def _heads_to_tokens(x: torch.Tensor, slices: Slices) -> torch.Tensor:
    heads, size = x.shape[1] // slices.number, x.shape[3]
    lengths = slices.tokens
    received = [heads * length * size for length in lengths]
    sent = [received[slices.index]] * slices.number
    parts = _all_to_all(x.reshape(-1), sent, received, slices).split(received)
    shaped = [p.view(heads, length, size) for p, length in zip(parts, lengths, strict=True)]
    return torch.cat(shaped, dim=1).unsqueeze(0)


def _tokens_to_heads(x: torch.Tensor, slices: Slices) -> torch.Tensor:
    heads, size = x.shape[1], x.shape[3]
    lengths = slices.tokens
    sent = [heads * length * size for length in lengths]
    received = [sent[slices.index]] * slices.number
    flat = torch.cat([part.reshape(-1) for part in x[0].split(lengths, dim=1)])
    mine = _all_to_all(flat, sent, received, slices)
    return mine.view(1, slices.number * heads, lengths[slices.index], size)


class _Part(NamedTuple):
    """Tokens that a rank has and another wants."""

    number: int  # of the range that is wanted
    start: int  # in the packed sequence
    place: int  # among the tokens of the rank that has them
    tokens: int


def shared_parts(held: Ranges, wanted: Ranges) -> list[_Part]:
    """Return what a rank's tokens and the ranges that another wants have in common."""
    places = [0, *accumulate(stop - start for start, stop in held)]
    return [
        _Part(number, start, place + start - begin, stop - start)
        for number, (first, last) in enumerate(wanted)
        for (begin, end), place in zip(held, places, strict=False)
        if (start := max(begin, first)) < (stop := min(end, last))
    ]


class _Collect(torch.autograd.Function):
    """Collect the ranges of tokens that each rank wants, (1, h, t, E) -> (1, h, wanted ones, E)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, slices: Slices, wanted: Sequence[Ranges]
    ) -> torch.Tensor:
        heads, size, own = x.shape[1], x.shape[3], slices.index
        sent = [shared_parts(slices.pieces[own], of_rank) for of_rank in wanted]
        received = [shared_parts(pieces, wanted[own]) for pieces in slices.pieces]
        ctx.slices, ctx.sent, ctx.received, ctx.shape = slices, sent, received, x.shape
        flat = [x[0, :, p.place : p.place + p.tokens].reshape(-1) for parts in sent for p in parts]
        out, into = (_elements(ranks, heads * size) for ranks in (sent, received))
        came = _all_to_all(torch.cat(flat), out, into, slices)
        given = list(chain(*received))
        parts = came.split([heads * size * part.tokens for part in given])
        ordered = sorted(zip(given, parts, strict=True), key=lambda pair: pair[0])
        return torch.cat([part.view(heads, -1, size) for _, part in ordered], 1)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        slices, (_, heads, _, size) = ctx.slices, ctx.shape
        ordered = sorted(chain(*ctx.received))
        of_part = dict(zip(ordered, grad[0].split([p.tokens for p in ordered], 1), strict=True))
        flat = torch.cat([of_part[part].reshape(-1) for part in chain(*ctx.received)])
        out, into = (_elements(ranks, heads * size) for ranks in (ctx.received, ctx.sent))
        given = list(chain(*ctx.sent))
        came = _all_to_all(flat, out, into, slices)
        parts = came.split([heads * size * part.tokens for part in given])
        # in fp32, as many ranks may have a part in it
        total = torch.zeros(ctx.shape[1:], dtype=torch.float32, device=grad.device)
        total = total.to(torch.promote_types(total.dtype, grad.dtype))
        for part, received in zip(given, parts, strict=True):
            total[:, part.place : part.place + part.tokens] += received.view(heads, -1, size)
        return total.to(grad.dtype)[None], None, None


def _elements(ranks: list[list[_Part]], width: int) -> list[int]:
    """Return the elements of each rank's parts, of `width` a token."""
    return [width * sum(part.tokens for part in parts) for parts in ranks]


def _all_to_all(
    flat: torch.Tensor, sent: list[int], received: list[int], slices: Slices
) -> torch.Tensor:
    """Send `sent[r]` elements to each rank r of the group; return what comes from each of them."""
    out = flat.new_empty(sum(received))
    td.all_to_all_single(out, flat, received, sent, group=slices.group)
    return out
