"""Train the embeddings of a few tokens beside an adapter (peft's `trainable_token_indices`).

In: a model with an adapter, and token ids. Out: the same model, whose embedding has the rows of
these tokens as a parameter of their own, (tokens, H); the whole matrix stays frozen. The head is
not trained: where it shares the matrix, it would have other rows than the embedding.
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
        BadInput: an id has no embedding, or the embedding is trained in full, shared with the head,
            or of a class that does more than look up.
    """
    key, embedding = "adapter.trainable_token_indices", model.get_input_embeddings()
    rows = sorted(set(ids))
    if rows[-1] >= embedding.num_embeddings or rows[0] < 0:
        raise BadInput(f"{key}: the model has {embedding.num_embeddings} embeddings")
    name = next(n for n, module in model.named_modules() if module is embedding)
    if model.get_output_embeddings().weight is embedding.weight:
        raise BadInput(
            f"{key}: the head shares the embeddings' weight, and would need the rows, too; name "
            "both in adapter.modules_to_save, which trains them in full"
        )
    if name in full or type(embedding) is not nn.Embedding:
        why = "is trained in full" if name in full else f"is a {type(embedding).__name__}"
        raise BadInput(f"{key}: `{name}` {why}, and not a frozen nn.Embedding; remove the key")
    device = embedding.weight.device
    with gathered([embedding.weight]):
        own = embedding.weight[torch.tensor(rows, device=device)].clone()
    embedding.register_parameter(ROWS, nn.Parameter(own))
    row_of = torch.full((embedding.num_embeddings,), -1, device=device)
    row_of[torch.tensor(rows, device=device)] = torch.arange(len(rows), device=device)
    embedding.register_buffer("row_of", row_of, persistent=False)
    embedding.register_forward_hook(_look_up)


def _look_up(embedding: Any, ids: tuple[torch.Tensor], found: torch.Tensor) -> torch.Tensor:
    row = embedding.row_of[ids[0]]
    trained = F.embedding(row.clamp_min(0), getattr(embedding, ROWS)).to(found.dtype)
    return torch.where((row >= 0).unsqueeze(-1), trained, found)


def with_rows(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the embeddings that have rows of their own, by name."""
    for name, module in model.named_modules():
        if hasattr(module, ROWS):
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
