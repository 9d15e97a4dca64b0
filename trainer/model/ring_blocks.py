"""Attend to the keys of one step of a ring, with the log of the softmax's sum (ring_attention.py).

In: queries (Hq, t, E), keys (Hk, m, E) and values (Hk, m, F) of several documents, end to end. Out:
(Hq, t, F) and (Hq, t); or, in the backward, the gradients of these keys' part of the whole softmax,
whose sum is given. A readable reference, and torch's own FlashAttention 2 on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.attention_kernels import (
    Arguments,
    document_ends,
    for_varlen,
    reference,
    visible,
)


class BlockLengths(NamedTuple):
    """The lengths of the documents in a block: what its queries see of its keys."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    is_causal: bool  # as many queries as keys; else each query sees all keys of its document


class BlockKernel(NamedTuple):
    """A way to attend to a block.

    forward(query, key, value, documents, arguments) -> output, log of the softmax's sum
    backward(gradient, query, output, log of the sum, key, value, documents, arguments) -> gradients
    of queries, keys and values
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def choose_block_kernel(
    kernel: Callable[..., torch.Tensor], layer: str, softcap: float | None
) -> BlockKernel:
    """Return the way to attend to a block where the layer attends by `kernel` on one rank; raise
    BadInput if it has a soft cap, which torch's FlashAttention lacks."""
    if kernel is reference:
        return _REFERENCE
    if softcap is not None:
        raise BadInput(
            f"parallel.sequence_kind: {layer} needs attention with a soft cap, which a ring lacks "
            "on a GPU; use `gather`, or model.attention=reference"
        )
    return _FLASH


# ---------------------------------------------------------------------------------------- reference


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: BlockLengths,
    arguments: Arguments,
) -> tuple[torch.Tensor, torch.Tensor]:
    outs, log_sums = [], []
    for q, k, v in _by_document(documents, (query,), (key, value)):
        scores, _ = _scores(q, k, documents.is_causal, arguments)
        log_sum = scores.logsumexp(-1)
        shares = (scores - log_sum[..., None]).exp()
        outs.append((shares @ v.to(shares.dtype).unsqueeze(1)).flatten(0, 1))
        log_sums.append(log_sum.flatten(0, 1))
    return torch.cat(outs, 1), torch.cat(log_sums, 1)


def _reference_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: BlockLengths,
    arguments: Arguments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide, groups = log_sum.dtype, (key.shape[0], -1)
    delta = (grad.to(wide) * out.to(wide)).sum(-1)
    of_queries, of_keys, of_values = [], [], []
    scale = _scale(query, arguments)
    ours, theirs = (grad.to(wide), query, log_sum, delta), (key, value)
    for g, q, total, d, k, v in _by_document(documents, ours, theirs):
        scores, slope = _scores(q, k, documents.is_causal, arguments)
        g, total, d = (x.unflatten(0, groups) for x in (g, total, d))
        shares = (scores - total[..., None]).exp()
        of_scores = shares * (g @ v.to(wide).unsqueeze(1).mT - d[..., None]) * slope * scale
        of_queries.append((of_scores @ k.to(wide).unsqueeze(1)).flatten(0, 1))
        of_keys.append((of_scores.mT @ q.to(wide).unflatten(0, groups)).sum(1))
        of_values.append((shares.mT @ g).sum(1))
    return torch.cat(of_queries, 1), torch.cat(of_keys, 1), torch.cat(of_values, 1)


def _by_document(
    documents: BlockLengths, of_queries: tuple[torch.Tensor, ...], of_keys: tuple[torch.Tensor, ...]
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Return each document's part of tensors (H, t, ...) of queries and of keys."""
    parts = [x.split(documents.queries, 1) for x in of_queries]
    return zip(*parts, *(x.split(documents.keys, 1) for x in of_keys), strict=True)


def _scores(
    q: torch.Tensor, k: torch.Tensor, is_causal: bool, arguments: Arguments
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Return scores (Hk, Hq / Hk, t, m), in fp32 at least, and the slope of their soft cap."""
    wide, slope = torch.promote_types(q.dtype, torch.float32), 1.0
    grouped = q.to(wide).unflatten(0, (k.shape[0], -1))
    scores = grouped @ k.to(wide).unsqueeze(1).mT * _scale(q, arguments)
    if arguments.softcap is not None:
        bent = torch.tanh(scores / arguments.softcap)
        scores, slope = bent * arguments.softcap, 1 - bent * bent
    if is_causal:
        scores = scores.masked_fill(~visible(k.shape[1], None, q.device), -torch.inf)
    return scores, slope


def _scale(q: torch.Tensor, arguments: Arguments) -> float:
    return arguments.scale if arguments.scale is not None else q.shape[-1] ** -0.5


_REFERENCE = BlockKernel(_reference, _reference_backward)

# ----------------------------------------------------------------------------------- FlashAttention


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: BlockLengths,
    arguments: Arguments,
) -> tuple[torch.Tensor, torch.Tensor]:
    *qkv, scale = _padded(query, key, value, arguments)
    out, log_sum, *_ = torch.ops.aten._flash_attention_forward(
        *qkv, *_ends(documents, query.device), 0.0, documents.is_causal, False, scale=scale
    )
    return out[..., : value.shape[-1]].transpose(0, 1), log_sum


def _flash_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: BlockLengths,
    arguments: Arguments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *qkv, scale = _padded(query, key, value, arguments)
    more = qkv[0].shape[-1] - value.shape[-1]
    grad, out = (F.pad(x, (0, more)).transpose(0, 1).contiguous() for x in (grad, out))
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=grad.device), grad.new_empty(0)
    of_query, of_key, of_value = torch.ops.aten._flash_attention_backward(
        *(grad, *qkv, out, log_sum.contiguous(), *_ends(documents, grad.device)),
        *(0.0, documents.is_causal, *no_dropout),
        scale=scale,
    )
    size = query.shape[-1]
    given = (of_query[..., :size], of_key[..., :size], of_value[..., : value.shape[-1]])
    of_query, of_key, of_value = (x.transpose(0, 1) for x in given)
    return of_query, of_key, of_value


def _padded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: Arguments
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    return for_varlen(
        "a layer", "FlashAttention 2", (), query[None], key[None], value[None], arguments
    )


def _ends(documents: BlockLengths, device: Any) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    ends_q, ends_k = (document_ends(lengths, device) for lengths in documents[:2])
    return ends_q, ends_k, max(documents.queries), max(documents.keys)


_FLASH = BlockKernel(_flash, _flash_backward)
