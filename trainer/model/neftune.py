"""NEFTune (Jain et al., 2023, arXiv:2310.05914), with the noise of a document belonging to the
document (C3).

In: a batch's document keys and lengths. Out: noise for its embeddings, the same however documents
    are packed,
ranked or resumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from trainer.dist import seed_from


def document_noise(
    seed: int,
    document_keys: Sequence[tuple[int, int, int]],
    lengths: Sequence[int],
    width: int,
    alpha: float,
    device: torch.device,
) -> torch.Tensor:
    """(T, width) float32, uniform in +-alpha / sqrt(L x width) with L each document's own length.

    Drawn from (seed, epoch, document, piece), so that packing weakens nothing: where the whole
    row's length is taken for L, as elsewhere, the noise shrinks by sqrt(row / document). The CPU's
    and a GPU's numbers differ.
    """
    noise = torch.empty(sum(lengths), width, device=device)
    generator = torch.Generator(device)
    for (epoch, document, piece), length, part in zip(
        document_keys, lengths, noise.split(list(lengths))
    ):
        generator.manual_seed(seed_from(seed, "neftune", epoch, document, piece))
        bound = alpha / math.sqrt(length * width)
        part.uniform_(-bound, bound, generator=generator)
    return noise
