"""Make NEFTune's noise (Jain et al., 2023, arXiv:2310.05914) so that it belongs to a document (C3).

In: a batch's document keys and lengths. Out: noise for its embeddings, alike however documents are
packed, spread over ranks, or resumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from packhorse.trainer.dist import seed_from

# Each block of a document has a seed of its own, so that a rank draws little beside its own slice.
BLOCK_TOKENS = 4096


def document_noise(
    seed: int,
    document_keys: Sequence[tuple[int, int, int]],
    lengths: Sequence[int],
    width: int,
    alpha: float,
    device: torch.device,
    tokens: range | None = None,
) -> torch.Tensor:
    """Return (T, width) float32, uniform in +-alpha / sqrt(L x width), L each document's length.

    The numbers of a CPU and of a GPU differ.

    Args:
        document_keys: (epoch, document, piece) of each document, from which its noise follows.
        tokens: those of the packed sequence whose noise is wanted, as of a rank's slice (T, from
            then on); None for all.
    """
    tokens = range(sum(lengths)) if tokens is None else tokens
    noise = torch.empty(len(tokens), width, device=device)
    generator = torch.Generator(device)
    begin = 0
    for key, length in zip(document_keys, lengths):
        # by the document's length: by the packed sequence's, as elsewhere, the noise would shrink
        # by sqrt(sequence / document)
        bound = alpha / math.sqrt(length * width)
        for block in range(0, length, BLOCK_TOKENS):
            size = min(BLOCK_TOKENS, length - block)
            start = begin + block - tokens.start  # in the slice; before it if negative
            first, last = max(start, 0), min(start + size, len(tokens))
            if first >= last:
                continue
            place = (block,) if block else ()
            generator.manual_seed(seed_from(seed, "neftune", *key, *place))
            drawn = torch.empty(size, width, device=device)
            drawn.uniform_(-bound, bound, generator=generator)
            noise[first:last] = drawn[first - start : last - start]
        begin += length
    return noise
