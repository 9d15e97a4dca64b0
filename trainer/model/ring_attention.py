"""Attend over a packed sequence whose keys and values go round the ranks that share it (C13).

In: a rank's slice of a layer's queries, keys and values. Out: the same slice of what attention over
the whole sequence gives, and in the backward its gradients (Liu et al., 2023, arXiv:2310.01889).

In step s a rank attends to the keys of the rank s before it, while those of the next step are under
way. Keys that no query sees stay where they are. Each step gives a softmax over its own keys, and
the log of its sum, by which steps are joined. The backward fetches the keys once more, and sends
their gradients back.

Shapes: n ranks, t tokens of this rank's slice, m keys of a step; Hq query heads, Hk key and value
heads, E head size, F that of values.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as td
from torch.autograd.function import once_differentiable

from packhorse.trainer.datatypes import Ranges
from packhorse.trainer.model.attention_kernels import Arguments, Slices
from packhorse.trainer.model.ring_blocks import BlockKernel, BlockLengths, choose_block_kernel


def attend_in_ring(
    kernel: Callable[..., torch.Tensor],
    layer: str,
    qkv: tuple[torch.Tensor, ...],
    arguments: Arguments,
) -> torch.Tensor:
    """Return (1, t, Hq, F) for queries (1, Hq, t, E), keys (1, Hk, t, E), values (1, Hk, t, F).

    Every rank of the group calls it. The layer has no window.
    """
    assert not arguments.dropout, "refused at the start"
    blocks = choose_block_kernel(kernel, layer, arguments.softcap)
    return _Ring.apply(*(x[0] for x in qkv), arguments.sinks, blocks, arguments)[None]


# ------------------------------------------------------------------------------------ who sees what


class Seen(NamedTuple):
    """What a rank's queries see of a rank's keys, as places on these ranks.

    Each of these queries sees all of these keys of its document; of the rank's own ones, those that
    are not after it.
    """

    queries: Ranges
    keys: Ranges
    documents: BlockLengths  # lengths of both

    @property
    def tokens(self) -> int:
        """The number of keys."""
        return sum(self.documents.keys)


@lru_cache(maxsize=16)  # all layers of a batch ask for the same
def seen_in_ring(
    lengths: tuple[int, ...], pieces: tuple[Ranges, ...]
) -> tuple[tuple[Seen, ...], ...]:
    """Return what each rank's queries (first index) see of each other rank's keys (second).

    Args:
        lengths: of the documents.
        pieces: the tokens of each rank.
    """
    ranks = [_pieces_by_document(lengths, of_rank) for of_rank in pieces]
    return tuple(tuple(_seen_of(queries, keys) for keys in ranks) for queries in ranks)


_Pieces = dict[int, list[tuple[int, int, int]]]  # by document: first token, end, place on the rank


def _pieces_by_document(lengths: Sequence[int], pieces: Ranges) -> _Pieces:
    found: _Pieces = defaultdict(list)
    ends, place = list(accumulate(lengths)), 0
    for start, stop in pieces:
        document = bisect_right(ends, start)
        while start < stop:
            end = min(stop, ends[document])
            found[document].append((start, end, place))
            start, document, place = end, document + 1, place + end - start
    return found


def _seen_of(queries: _Pieces, keys: _Pieces) -> Seen:
    """Return what a rank's queries see of a rank's keys.

    A zigzag's pieces lie so that a rank's early and late queries see the same keys of another rank,
    if both see any. So there is one range of each.
    """
    ranges_q, ranges_k, is_own = [], [], queries is keys
    for document, of_query in queries.items():
        of_key = keys.get(document, [])
        numbers = [sum(b - a for a, b, _ in of_key if b <= start) for start, *_ in of_query]
        if is_own:
            numbers = [sum(b - a for a, b, _ in of_key)] * len(of_query)
        if not numbers[-1]:
            continue
        assert {*numbers} <= {0, numbers[-1]}, "a rank's queries see different keys of another"
        first, (start, stop, last) = of_query[numbers.index(numbers[-1])][2], of_query[-1]
        ranges_q.append((first, last + stop - start))
        ranges_k.append((of_key[0][2], of_key[0][2] + numbers[-1]))
    lengths_q, lengths_k = (tuple(b - a for a, b in x) for x in (ranges_q, ranges_k))
    return Seen(_merged(ranges_q), _merged(ranges_k), BlockLengths(lengths_q, lengths_k, is_own))


def _merged(ranges: Sequence[tuple[int, int]]) -> Ranges:
    """Return ranges in which neighbours are one: of hundreds of documents, few are left."""
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


# ------------------------------------------------------------------------------------- the exchange


class _Transfer(NamedTuple):
    """What is under way to another rank and from one."""

    work: Any
    received: torch.Tensor
    sent: torch.Tensor  # kept until it has left

    def wait(self) -> torch.Tensor:
        self.work.wait()
        return self.received


class _Round:
    """What goes round the ranks that share a sequence.

    Args:
        pairs: the own keys and values beside each other, (Hk, t, E + F).
    """

    def __init__(self, arguments: Arguments, pairs: torch.Tensor) -> None:
        assert arguments.bounds.slices is not None
        self._slices: Slices = arguments.bounds.slices
        self.pairs = pairs
        self._seen = seen_in_ring(arguments.bounds.lengths, self._slices.pieces)

    def steps(self) -> Iterator[tuple[int, Seen, torch.Tensor]]:
        """Yield each step's number, what it shows, and the keys and values, (Hk, m, E + F).

        Step 0 shows the own ones. The next step's are under way in the meantime.
        """
        own, ranks = self._slices.index, range(self._slices.number)
        # a step in which no rank sees anything is left out
        steps = [s for s in ranks if any(self._seen[rank][rank - s].keys for rank in ranks)]
        came = self.pairs
        for step, following in zip_longest(steps, steps[1:]):
            under_way = self._fetch(following) if following else None
            yield step, self._seen[own][own - step], came
            if under_way:
                came = under_way.wait()

    def send_back(self, gradients: torch.Tensor, step: int) -> _Transfer:
        """Begin to send the gradients of a step's keys and values to the rank that has them."""
        return self._pass_on(gradients, -step, self._shown(step).tokens)

    def add_returned(self, transfer: _Transfer, step: int, total: torch.Tensor) -> None:
        """Add what another rank has sent back in a step to the gradients of the own ones."""
        _add(total, self._shown(step).keys, transfer.wait())

    def _fetch(self, step: int) -> _Transfer:
        """Begin to fetch the keys and values of the rank `step` before this one."""
        own = self._slices.index
        sent = _take(self.pairs, self._shown(step).keys)
        return self._pass_on(sent, step, self._seen[own][own - step].tokens)

    def _shown(self, step: int) -> Seen:
        """Return what the rank `step` after this one sees of the own keys."""
        own, number = self._slices.index, self._slices.number
        return self._seen[(own + step) % number][own]

    def _pass_on(self, sent: torch.Tensor, step: int, tokens: int) -> _Transfer:
        """Begin to send to the rank `step` after this one, and to receive from the one before."""
        own, number, (heads, _, size) = self._slices.index, self._slices.number, sent.shape
        elements_in, elements_out = [0] * number, [0] * number
        elements_in[(own - step) % number] = heads * tokens * size
        elements_out[(own + step) % number] = sent.numel()
        sent, received = sent.reshape(-1), sent.new_empty(heads, tokens, size)
        work = td.all_to_all_single(
            *(received.view(-1), sent, elements_in, elements_out),
            group=self._slices.group,
            async_op=True,
        )
        return _Transfer(work, received, sent)


def _take(x: torch.Tensor, places: Ranges) -> torch.Tensor:
    """Return the tokens at some places, (H, t, ...) -> (H, m, ...)."""
    if len(places) == 1:
        return x[:, slice(*places[0])]
    return torch.cat([x[:, start:stop] for start, stop in places] or [x[:, :0]], 1)


def _add(total: torch.Tensor, places: Ranges, part: torch.Tensor) -> None:
    """Add (H, m, ...) to the tokens at some places of a total, (H, t, ...)."""
    parts = part.split([stop - start for start, stop in places], 1)
    for (start, stop), of_range in zip(places, parts, strict=True):
        total[:, start:stop] += of_range


# ------------------------------------------------------------------------------------ the attention


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        kernel: BlockKernel,
        arguments: Arguments,
    ) -> torch.Tensor:
        """Return (t, Hq, F) for queries (Hq, t, E), keys (Hk, t, E) and values (Hk, t, F)."""
        size = key.shape[-1]
        wide = torch.promote_types(torch.float32, query.dtype)
        out = query.new_zeros(*query.shape[:2], value.shape[-1], dtype=wide)
        log_sum = query.new_full(query.shape[:2], -torch.inf, dtype=wide)
        for _, seen, pairs in _Round(arguments, torch.cat([key, value], -1)).steps():
            if seen.tokens:
                given = (_take(query, seen.queries), pairs[..., :size], pairs[..., size:])
                part = kernel.forward(*given, seen.documents, arguments)
                _join(out, log_sum, seen.queries, *part)
        if sinks is not None:  # of the softmax's sum, and without a value
            before, log_sum = log_sum, torch.logaddexp(log_sum, sinks.to(wide)[:, None])
            out *= (before - log_sum).exp()[..., None]
        # as the layer reads it on, so that it keeps no copy
        out = out.to(query.dtype).transpose(0, 1).contiguous()
        ctx.save_for_backward(query, key, value, sinks, out, log_sum)
        ctx.kernel, ctx.arguments = kernel, arguments
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, sinks, out, log_sum = ctx.saved_tensors
        grad, out, size = grad.transpose(0, 1), out.transpose(0, 1), key.shape[-1]
        way = _Round(ctx.arguments, torch.cat([key, value], -1))
        # many ranks have a part in the gradients of a key
        of_query = torch.zeros_like(query, dtype=log_sum.dtype)
        of_pairs = torch.zeros_like(way.pairs, dtype=log_sum.dtype)
        returning: tuple[_Transfer, int] | None = None  # of the step before
        for step, seen, pairs in way.steps():
            gradients = pairs[:, :0]
            if seen.tokens:
                given = [_take(x, seen.queries) for x in (grad, query, out, log_sum)]
                given += pairs[..., :size], pairs[..., size:]
                more, *rest = ctx.kernel.backward(*given, seen.documents, ctx.arguments)
                _add(of_query, seen.queries, more)
                gradients = torch.cat(rest, -1).to(pairs.dtype)
            if step == 0:
                _add(of_pairs, seen.keys, gradients)
                continue
            if returning:
                way.add_returned(*returning, of_pairs)
            returning = way.send_back(gradients, step), step
        if returning:
            way.add_returned(*returning, of_pairs)
        of_key, of_value = of_pairs.to(key.dtype).split([size, value.shape[-1]], -1)
        of_sinks = None
        if sinks is not None:
            shares = (sinks.to(log_sum.dtype)[:, None] - log_sum).exp()
            delta = (grad.to(log_sum.dtype) * out).sum(-1)
            of_sinks = -(shares * delta).sum(1).to(sinks.dtype)
        return of_query.to(query.dtype), of_key, of_value, of_sinks, None, None


def _join(
    out: torch.Tensor, log_sum: torch.Tensor, places: Ranges, part: torch.Tensor, its: torch.Tensor
) -> None:
    """Join a softmax over more keys with that of before, at some places, in place.

    Args:
        part: (Hq, m, F), what attention over these keys alone gives.
        its: (Hq, m), the log of the sum of its softmax.
    """
    lengths = [stop - start for start, stop in places]
    ranges = zip(places, part.split(lengths, 1), its.split(lengths, 1), strict=True)
    for (start, stop), more, log_more in ranges:
        before, total = log_sum[:, start:stop], out[:, start:stop]
        both = torch.logaddexp(before, log_more)
        total *= (before - both).exp()[..., None]
        total += more * (log_more - both).exp()[..., None]
        before.copy_(both)
