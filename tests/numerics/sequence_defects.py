"""Defects of sequence parallelism that X9 must catch, as contexts for tests/numerics/cases.py."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch

from packhorse.trainer import build_engine, datatypes, dist
from packhorse.trainer.model import attention, sft


def unchecked(*patches: Any) -> Any:
    """Apply patches, and leave out the check at the start, which refuses such defects."""
    changed = contextlib.ExitStack()
    changed.enter_context(mock.patch.object(build_engine, "prove_slices", return_value=0.0))
    for patch in patches:
        changed.enter_context(patch)
    return changed


def attend_within_the_slice(kernel: Any, layer: str, *qkv_and_arguments: Any) -> torch.Tensor:
    *qkv, arguments = qkv_and_arguments
    pieces, index, *_ = arguments.bounds.slices
    inside, _ = arguments.bounds.of_pieces(pieces[index], [start for start, _ in pieces[index]])
    return kernel(layer, *qkv, arguments._replace(bounds=inside))


def boundaries_per_slice() -> Any:
    """Let a document end where a slice does."""
    return unchecked(mock.patch.object(attention, "attend_in_slices", attend_within_the_slice))


def keys_of_the_wrong_document() -> Any:
    """Take the documents' lengths in another order in attention."""
    attend: Any = attention.attend_in_slices

    def reversed_lengths(*given: Any) -> torch.Tensor:
        *others, arguments = given
        bounds = arguments.bounds._of(arguments.bounds.lengths[::-1])
        return attend(*others, arguments._replace(bounds=bounds))

    return unchecked(mock.patch.object(attention, "attend_in_slices", reversed_lengths))


def noise_per_slice() -> Any:
    """Draw each slice's noise from a seed of its own."""
    draw = sft.document_noise
    return unchecked(
        mock.patch.object(
            sft, "document_noise", lambda seed, *rest: draw(seed + dist.rank(), *rest)
        )
    )


def mean_over_the_group() -> Any:
    """Average the losses of the ranks that share a sequence."""
    forward = sft.SftModel.forward

    def averaged(self: Any, batch: Any) -> torch.Tensor:
        return forward(self, batch) / (batch.slice[1] if self.training else 1)

    return unchecked(mock.patch.object(sft.SftModel, "forward", averaged))


def short_zigzag() -> Any:
    """Cut documents of any length in a zigzag; no defect."""
    return mock.patch.object(datatypes, "ZIGZAG_TOKENS", 4)


DEFECTS = {
    f.__name__: f
    for f in (
        boundaries_per_slice,
        keys_of_the_wrong_document,
        noise_per_slice,
        mean_over_the_group,
    )
}
