"""Run layers that carry a state from token to token document by document inside a packed sequence.

Recurrent and convolutional mixers keep packed documents apart only with kernels that are not always
installed. Without them such a module is called once for each document: the same numbers as alone,
in more and smaller calls. Which modules these are is found by the packing check, not by a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from packhorse.trainer.model.attention_kernels import Bounds, document_ends

# Arguments that tell a layer of several documents; a call for one document goes without.
_OF_SEVERAL = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


def split_calls(
    modules: Iterable[nn.Module], lengths: Callable[[], tuple[int, ...]]
) -> Callable[[], None]:
    """Let each of these modules be called once for each document; return what undoes it.

    Args:
        lengths: gives the documents' lengths in the sequence that runs, or () for any other call,
            as in generation. A document of length 0 asks for a call that has no effect: under
            ZeRO-3 all ranks must make equally many.
    """
    split = list(modules)
    for module in split:
        module.forward = _split(module.forward, lengths)

    def undo() -> None:
        for module in split:
            del module.forward  # the class's own comes back

    return undo


def _split(whole: Callable[..., Any], lengths: Callable[[], tuple[int, ...]]) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        documents = lengths()
        if len(documents) < 2:
            return whole(*args, **kwargs)
        total = sum(documents)
        kwargs = {key: value for key, value in kwargs.items() if key not in _OF_SEVERAL}
        pieces, idle = [], []
        for end, length in zip(accumulate(documents), documents):
            start, number = (end - length, length) if length else (0, documents[0])
            ours, named = _cut((args, kwargs), start, number, total)
            (pieces if length else idle).append(whole(*ours, **named))
        return with_gradient(_joined(pieces), idle)

    return forward


def _cut(value: Any, start: int, number: int, total: int) -> Any:
    """Return the arguments of one document: tensors (1, total, ...) are cut, others stay."""
    if isinstance(value, torch.Tensor):
        of_tokens = value.dim() > 1 and value.shape[1] == total
        return value.narrow(1, start, number) if of_tokens else value
    if isinstance(value, Bounds):
        return Bounds(document_ends((number,), value.cu_seqlens.device), number, (number,))
    if isinstance(value, dict):
        return {key: _cut(item, start, number, total) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_cut(item, start, number, total) for item in value)
    return value


def _joined(pieces: list[Any]) -> Any:
    """Return outputs laid end to end: tensors (1, L, ...), tuples of them, or what they share."""
    first = pieces[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(pieces, dim=1)
    if type(first) is tuple:
        return tuple(map(_joined, map(list, zip(*pieces, strict=True))))
    return first


def with_gradient(output: Any, idle: list[Any]) -> Any:
    """Return the output, through which the calls without effect get a gradient of zero."""
    if not idle:
        return output
    nothing = sum(_first(call).sum() * 0 for call in idle)
    if isinstance(output, torch.Tensor):
        return output + nothing
    return (output[0] + nothing, *output[1:])


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]
