"""Make NEFTune's noise (Jain et al., 2023, arXiv:2310.05914) so that it belongs to a document (C3).

In: a batch's document keys and lengths. Out: noise for its embeddings, alike however documents are
packed, spread over ranks, or resumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from packhorse.trainer.dist import seed_from


def document_noise(
    seed: int,
    document_keys: Sequence[tuple[int, int, int]],
    lengths: Sequence[int],
    width: int,
    alpha: float,
    device: torch.device,
) -> torch.Tensor:
    """Return (T, width) float32, uniform in +-alpha / sqrt(L x width), L each document's length.

    The numbers of a CPU and of a GPU differ.

    Args:
        document_keys: (epoch, document, piece) of each document, from which its noise follows.
    """
    noise = torch.empty(sum(lengths), width, device=device)
    generator = torch.Generator(device)
    parts = noise.split(list(lengths))
    for (epoch, document, piece), length, part in zip(document_keys, lengths, parts):
        generator.manual_seed(seed_from(seed, "neftune", epoch, document, piece))
        # by the document's length: by the packed sequence's, as elsewhere, the noise would shrink
        # by sqrt(sequence / document)
        bound = alpha / math.sqrt(length * width)
        part.uniform_(-bound, bound, generator=generator)
    return noise
