"""Make the documents of the packing check: random ones, longer than what a configuration names.

In: a model's configuration and the run's sequence length. Out: three documents, and the same ones
packed into a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import torch

from packhorse.trainer import dist
from packhorse.trainer.datatypes import Batch
from packhorse.trainer.model import rotary

SHORT = (24, 17)  # tokens of the first and the last document
PAST_LIMIT = 24  # tokens of the middle one beyond the longest window or chunk
COMPARED_FIRST, COMPARED_LAST = 16, 48  # tokens at a document's ends that are compared


def random_documents(config: Any, seq_len: int, seed: int) -> list[torch.Tensor]:
    """Return three documents of random tokens, (L,) int64 each."""
    limits = length_limits(config.to_dict())
    longest = getattr(config, "max_position_embeddings", None) or 0
    if rotary.stretches(config):
        limits, longest = {*limits, longest}, 0
    middle = max([33, *(limit + PAST_LIMIT for limit in limits if limit < seq_len)])
    shortened = min(middle, longest) if longest > 0 else middle  # XLNet says -1: no end
    generator = torch.Generator().manual_seed(dist.seed_from(seed, "probe"))
    return [
        torch.randint(config.vocab_size, (n,), generator=generator).to(dist.device())
        for n in (SHORT[0], shortened, SHORT[1])
    ]


def longest_document(config: Any, seq_len: int, seed: int) -> Batch:
    """Return the check's longest document alone, which reaches past the windows of all layers."""
    return pack_documents(random_documents(config, seq_len, seed)[1:2])


# What the keys of lengths are called beyond which a model acts otherwise: windows and chunks of
# attention, the length that its positions were first trained for, the tokens that sparse attention
# chooses, the position from which it scales queries.
LIMIT_WORDS = ("window", "chunk", "local", "block", "original_max", "topk", "budget", "floor")


def length_limits(config: dict[str, Any]) -> set[int]:
    """Return the lengths in a model's configuration beyond which a document is treated otherwise.

    They are found by the words in their keys, as each model names them in its own way.
    """
    found = set()
    for key, value in config.items():
        is_limit = any(word in str(key) for word in LIMIT_WORDS)
        if isinstance(value, dict):
            found |= length_limits(value)
        elif is_limit and type(value) is int and value > 1:
            found.add(value)
    return found


def compared_positions(length: int) -> list[int]:
    """Return the positions that are compared: all of a short document, both ends of a long one."""
    if length <= COMPARED_FIRST + COMPARED_LAST:
        return list(range(length))
    return [*range(COMPARED_FIRST), *range(length - COMPARED_LAST, length)]


def num_trained(length: int) -> int:
    """Return how many of a document's last tokens are predicted for the comparison of the loss."""
    return min(length - 1, COMPARED_LAST)


def pack_documents(documents: Sequence[torch.Tensor]) -> Batch:
    """Return the documents packed; the last tokens of each are trained, with one weight."""
    lengths = [ids.shape[0] for ids in documents]
    starts = [0, *accumulate(lengths)]
    device = documents[0].device
    # a document's last token predicts nothing: the next one is its neighbour's
    trained = [range(end - 1 - num_trained(n), end - 1) for end, n in zip(starts[1:], lengths)]
    trained_positions = torch.tensor([*chain(*trained)], device=device)
    weight = 1 / len(trained_positions)
    ids = torch.cat(list(documents))
    return Batch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(n, device=device) for n in lengths]),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
        lengths=tuple(lengths),
        trained_positions=trained_positions,
        targets=ids[trained_positions + 1],
        weights=torch.full((len(trained_positions),), weight, device=device),
        document_keys=tuple((0, i, 0) for i in range(len(lengths))),
        sequence_ids=(0,),
    )
