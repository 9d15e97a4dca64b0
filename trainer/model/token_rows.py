"""Train the embeddings of a few tokens beside an adapter (peft's `trainable_token_indices`).

In: a model with an adapter, and token ids. Out: the same model, whose embedding has the rows of
these tokens as a parameter of their own, (tokens, H); the whole matrix stays frozen. A head that
shares the matrix shares the rows, too; another head is not trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from packhorse.trainer.datatypes import BadInput

ROWS = "trainable_tokens_delta"  # peft's name; it holds the embeddings themselves


@torch.no_grad()
def add_rows(model: Any, ids: Iterable[int], full: list[str], gathered: Any) -> None:
    """Put trained rows into the model's embedding, which start at its own.

    Args:
        full: the modules that are trained in full.
        gathered: holds parameters whole inside its block (engine.gathered).

    Raises:
        BadInput: an id has no embedding, or the embedding is trained in full or of a class that
            does more than look up.
    """
    key, embedding = "adapter.trainable_token_indices", model.get_input_embeddings()
    head = model.get_output_embeddings()
    rows = sorted(set(ids))
    if rows[-1] >= embedding.num_embeddings or rows[0] < 0:
        raise BadInput(f"{key}: the model has {embedding.num_embeddings} embeddings")
    name = next(n for n, module in model.named_modules() if module is embedding)
    if name in full or type(embedding) is not nn.Embedding:
        why = "is trained in full" if name in full else f"is a {type(embedding).__name__}"
        raise BadInput(f"{key}: `{name}` {why}, and not a frozen nn.Embedding; remove the key")
    device = embedding.weight.device
    ids_K = torch.tensor(rows, device=device)
    with gathered([embedding.weight]):
        own = embedding.weight[ids_K].clone()
    embedding.register_parameter(ROWS, nn.Parameter(own))
    row_of = torch.full((embedding.num_embeddings,), -1, device=device)
    row_of[ids_K] = torch.arange(len(rows), device=device)
    embedding.register_buffer("row_of", row_of, persistent=False)
    embedding.register_forward_hook(_look_up)
    if head.weight is embedding.weight:
        # a parameter of both modules, so that ZeRO-3 gathers it for both
        head.register_parameter(ROWS, getattr(embedding, ROWS))
        head.register_buffer("row_ids", ids_K, persistent=False)
        head.register_forward_hook(_put_logits)


def _look_up(embedding: Any, ids: tuple[torch.Tensor], found: torch.Tensor) -> torch.Tensor:
    row = embedding.row_of[ids[0]]
    trained = F.embedding(row.clamp_min(0), getattr(embedding, ROWS)).to(found.dtype)
    return torch.where((row >= 0).unsqueeze(-1), trained, found)


def _put_logits(head: Any, hidden: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """Put the trained rows' logits into the head's, if it returns those and not a loss."""
    if not out.dim():
        return out
    bias = head.bias[head.row_ids] if head.bias is not None else None
    own = F.linear(hidden[0], getattr(head, ROWS).to(out.dtype), bias)
    return out.index_copy(-1, head.row_ids, own)


def head_weight(head: Any) -> torch.Tensor:
    """Return the head's weight (V, H), with the trained rows in it if it shares them."""
    rows = getattr(head, ROWS, None)
    if rows is None:
        return head.weight
    return head.weight.index_copy(0, head.row_ids, rows.to(head.weight.dtype))


def with_rows(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the embeddings that have rows of their own, by name."""
    for name, module in model.named_modules():
        if hasattr(module, "row_of"):
            yield name, module


def merged_rows(embedding: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return the embedding's weight with the trained rows in it, (V, H) float32."""
    is_row = embedding.row_of >= 0
    merged = weight.float().clone()
    merged[is_row] = getattr(embedding, ROWS).float()[embedding.row_of[is_row]]
    return merged


def indices(embedding: Any) -> list[int]:
    """Return the ids of the trained rows, in their order."""
    return (embedding.row_of >= 0).nonzero().flatten().tolist()
