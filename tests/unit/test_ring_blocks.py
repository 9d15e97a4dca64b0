"""Blocks of ring attention: FlashAttention's call, by a stand-in for its kernel, is the reference.

What ranks compute together is in tests/numerics/exchange.py, and the kernel in tests/gpu.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model import ring_blocks
from packhorse.trainer.model.attention_kernels import Arguments, Bounds, flash_attn, reference
from packhorse.trainer.model.ring_blocks import BlockLengths
from tests.model_helpers import relative

BLOCKS: Any = ring_blocks
BOUNDS = Bounds(torch.zeros(1), 1, (1,))  # which blocks do not read
ARGUMENTS = Arguments(None, None, None, None, None, BOUNDS)
OWN, OTHERS = BlockLengths((5, 3), (5, 3), True), BlockLengths((2, 3), (7, 1), False)


def block(documents: BlockLengths) -> list[torch.Tensor]:
    """Return grouped queries, keys, narrow values, and an output's gradient, in bf16."""
    shapes = [(4, documents.queries, 20), (2, documents.keys, 20), (2, documents.keys, 12)]
    shapes.append((4, documents.queries, 12))
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(h, sum(n), e, generator=generator).bfloat16() for h, n, e in shapes]


def as_documents(ends_q: torch.Tensor, ends_k: torch.Tensor, is_causal: bool) -> BlockLengths:
    queries, keys = (tuple(ends.diff().tolist()) for ends in (ends_q, ends_k))
    return BlockLengths(queries, keys, is_causal)


def forward_in(q: Any, k: Any, v: Any, ends_q: Any, ends_k: Any, *rest: Any, scale: float) -> Any:
    """Attend as aten::_flash_attention_forward: (T, H, E) in and out, the log of sums (H, T)."""
    longest_q, longest_k, dropout, is_causal, debug = rest
    assert (longest_q, longest_k) == (int(ends_q.diff().max()), int(ends_k.diff().max()))
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] == 24, "one size, a multiple of 8"
    assert not dropout
    assert not debug
    given = (x.transpose(0, 1) for x in (q, k, v))
    documents = as_documents(ends_q, ends_k, is_causal)
    out, log_sum = BLOCKS._reference(*given, documents, ARGUMENTS._replace(scale=scale))
    return out.transpose(0, 1).to(q.dtype), log_sum, None, None, None


def backward_in(
    grad: Any, q: Any, k: Any, v: Any, out: Any, log_sum: Any, *rest: Any, scale: float
) -> Any:
    ends_q, ends_k, _, _, dropout, is_causal, *_ = rest
    assert not dropout
    assert grad.is_contiguous()
    grad, q, k, v, out = (x.transpose(0, 1) for x in (grad, q, k, v, out))
    documents = as_documents(ends_q, ends_k, is_causal)
    given = (grad, q, out, log_sum, k, v, documents, ARGUMENTS._replace(scale=scale))
    return tuple(x.transpose(0, 1).to(q.dtype) for x in BLOCKS._reference_backward(*given))


@pytest.mark.parametrize("documents", [OWN, OTHERS])
def test_the_call_of_a_fused_kernel_is_the_reference(documents: BlockLengths) -> None:
    *qkv, grad = block(documents)
    exact, log_sum = BLOCKS._reference(*qkv, documents, ARGUMENTS)
    exact = exact.to(grad.dtype)
    # as of more keys elsewhere, whose sum is in the softmax
    given = (grad, qkv[0], exact, log_sum + 0.5, *qkv[1:], documents, ARGUMENTS)
    with (
        mock.patch.object(torch.ops.aten, "_flash_attention_forward", forward_in),
        mock.patch.object(torch.ops.aten, "_flash_attention_backward", backward_in),
    ):
        out, its_log_sum = BLOCKS._flash(*qkv, documents, ARGUMENTS)
        gradients = BLOCKS._flash_backward(*given)
    assert out.shape == exact.shape
    assert relative(out, exact) < 1e-2
    assert relative(its_log_sum, log_sum) < 1e-6
    for ours, theirs in zip(gradients, BLOCKS._reference_backward(*given), strict=True):
        assert ours.shape == theirs.shape
        assert relative(ours, theirs) < 1e-2


def test_torch_has_the_kernels_that_are_called() -> None:
    """With these arguments: on meta tensors, which have shapes and no GPU."""
    *qkv, grad = (x.to("meta") for x in block(OTHERS))
    out, log_sum = BLOCKS._flash(*qkv, OTHERS, ARGUMENTS)
    assert (out.shape, log_sum.shape, log_sum.dtype) == (grad.shape, (4, 5), torch.float32)
    given = (grad, qkv[0], out, log_sum, *qkv[1:], OTHERS, ARGUMENTS)
    gradients = BLOCKS._flash_backward(*given)
    assert [x.shape for x in gradients] == [x.shape for x in qkv]


def test_a_soft_cap_is_refused_on_a_gpu() -> None:
    with pytest.raises(BadInput, match=r"sequence_kind: Gemma needs .* soft cap.* use `gather`"):
        ring_blocks.choose_block_kernel(flash_attn, "Gemma", 30.0)
    assert ring_blocks.choose_block_kernel(reference, "Gemma", 30.0).forward
