"""Compute the weighted cross-entropy of the trained positions without holding all logits.

In: hidden states (N, H), the head's weight (V, H), targets (N,), weights (N,). Out: one fp32
number, sum(weight x loss).

Three kernels give the same number and gradients (X6): `reference`, which reads like the formula and
holds all logits; `chunked`, for the CPU; `liger`, for CUDA.

Shapes: N trained positions, H hidden size, V vocabulary, B entries of a block of the vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.liger_layers import kernels_run_on
from packhorse.trainer.model.liger_loss import liger_cross_entropy
from packhorse.trainer.model.logit_transform import LogitTransform

# c of C5: `chunked` works on c x H entries of the vocabulary at a time. Its speed is flat from 2 to
# 16.
BLOCK_HIDDEN = 4


def choose_kernel(name: str, device: torch.device) -> str:
    """Return the kernel for `loss.kernel`; `auto` is liger on CUDA and chunked elsewhere. Raises
    BadInput if the recipe names liger where it cannot run."""
    installed = importlib.util.find_spec("liger_kernel") is not None
    if name == "auto":
        return "liger" if device.type == "cuda" and installed else "chunked"
    if name == "liger" and not installed:
        raise BadInput(
            "loss.kernel: liger is not installed; `pip install liger-kernel`, or use `chunked`"
        )
    if name == "liger" and not kernels_run_on(device):
        raise BadInput("loss.kernel: liger needs a CUDA device; use `chunked`")
    return name


def linear_cross_entropy(
    hidden_NH: torch.Tensor,
    head_weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    kernel: str,
    *,
    bias_V: torch.Tensor | None = None,
    transform: LogitTransform | None = None,
) -> torch.Tensor:
    """Return sum_i weights[i] x cross_entropy(transform(hidden[i] W' + bias), targets[i]).

    Args:
        kernel: `reference`, `chunked` or `liger`.

    Returns:
        () float32.
    """
    transform = transform or LogitTransform()
    if hidden_NH.shape[0] == 0:
        # A filler has no trained position. Its loss is a zero that still gives every parameter a
        # gradient of zeros, so that no collective of another rank waits for one.
        tensors = [t for t in (hidden_NH, head_weight_VH, bias_V) if t is not None]
        return torch.stack([t.reshape(-1)[:1].float().sum() * 0.0 for t in tensors]).sum()
    if kernel == "reference":
        logits_NV = transform(F.linear(hidden_NH, head_weight_VH, bias_V).float())
        return (F.cross_entropy(logits_NV, targets_N, reduction="none") * weights_N).sum()
    args = (hidden_NH, head_weight_VH, bias_V, targets_N, weights_N)
    if kernel == "chunked":
        return _Chunked.apply(*args, transform)  # type: ignore[return-value]
    assert kernel == "liger", kernel
    return liger_cross_entropy(*args, transform)


# ------------------------------------------------------------------------------------------ chunked


class _Block(NamedTuple):
    """Entries [start, stop) of the vocabulary: their logits, and the targets among them.

    `low` has the weights' type, and is room for the gradient that goes back into matrix products.
    `logits` shares its storage if that type is fp32.
    """

    start: int
    stop: int
    low: torch.Tensor  # (N, B)
    logits: torch.Tensor  # (N, B) float32, after the transform
    column: torch.Tensor  # (N, 1) the target's column, or any column if it is in another block
    inside: torch.Tensor  # (N, 1) 1.0 if the target is in this block


class _Chunked(torch.autograd.Function):
    """The loss by blocks of the vocabulary.

    Forward keeps each position's log-sum-exp, backward computes the logits again. Blocks are of the
    vocabulary rather than of positions: a block's part of the weight's gradient is one matrix
    product over all N positions, so that nothing is accumulated (no fp32 copy of the head, no
    rounding between chunks). The workspace is N x B = c x N x H whatever V is: at most 12 N x H
    fp32 numbers in all with a soft cap, 7 without. The fourth matrix product costs less than
    accumulating does: 512 x 576 x 49152 in bf16 on one core takes 0.36 s, chunks of 96 positions
    0.41 s, whole logits 0.49 s.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        head_weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor,
        transform: LogitTransform,
    ) -> torch.Tensor:
        lse_N1 = hidden_NH.new_full((hidden_NH.shape[0], 1), -torch.inf, dtype=torch.float32)
        target_logit_N1 = torch.zeros_like(lse_N1)
        for block in _blocks(hidden_NH, head_weight_VH, bias_V, targets_N, transform):
            target_logit_N1 += block.logits.gather(1, block.column) * block.inside
            # shifted by the block's highest logit, or exp would overflow
            highest_N1 = block.logits.amax(1, keepdim=True)
            sum_N1 = block.logits.sub_(highest_N1).exp_().sum(1, keepdim=True)
            lse_N1 = torch.logaddexp(lse_N1, highest_N1 + sum_N1.log_())
        ctx.save_for_backward(hidden_NH, head_weight_VH, bias_V, targets_N, weights_N, lse_N1)
        ctx.transform = transform
        return ((lse_N1 - target_logit_N1).squeeze(1) * weights_N).sum()

    @staticmethod
    # type: ignore[override]
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, head_weight_VH, bias_V, targets_N, weights_N, lse_N1 = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        weights_N1 = (weights_N * grad_loss).unsqueeze(1)
        # the blocks' parts are summed here, and bf16 would round after each
        grad_hidden_NH = torch.zeros_like(hidden_NH, dtype=torch.float32)
        grad_weight_VH = torch.empty_like(head_weight_VH) if needs_weight else None
        grad_bias_V = torch.empty_like(bias_V) if needs_bias else None
        for block in _blocks(hidden_NH, head_weight_VH, bias_V, targets_N, ctx.transform):
            grad_NB = _gradient_of_logits(block, lse_N1, weights_N1, ctx.transform)
            part = slice(block.start, block.stop)
            if needs_hidden:
                grad_hidden_NH += grad_NB @ head_weight_VH[part]
            if grad_weight_VH is not None:
                torch.mm(grad_NB.t(), hidden_NH, out=grad_weight_VH[part])
            if grad_bias_V is not None:
                grad_bias_V[part] = grad_NB.sum(0)
        grad_hidden = grad_hidden_NH.to(hidden_NH.dtype) if needs_hidden else None
        return grad_hidden, grad_weight_VH, grad_bias_V, None, None, None


def _blocks(
    hidden_NH: torch.Tensor,
    head_weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    transform: LogitTransform,
) -> Iterator[_Block]:
    """Yield the logits block by block, in buffers that the next block overwrites."""
    (N, H), V = hidden_NH.shape, head_weight_VH.shape[0]
    width = min(V, BLOCK_HIDDEN * H)
    low_buffer = hidden_NH.new_empty(N * width)
    logits_buffer = low_buffer
    if low_buffer.dtype != torch.float32:
        logits_buffer = torch.empty_like(low_buffer, dtype=torch.float32)
    targets_N1 = targets_N.unsqueeze(1)
    for start in range(0, V, width):
        stop = min(start + width, V)
        size = stop - start
        low = torch.mm(
            hidden_NH, head_weight_VH[start:stop].t(), out=low_buffer[: N * size].view(N, size)
        )
        logits = logits_buffer[: N * size].view(N, size)
        # what follows is fp32 in every type, as bf16 has 8 bits for a sum over the vocabulary
        if logits.data_ptr() != low.data_ptr():
            logits.copy_(low)
        if bias_V is not None:
            logits += bias_V[start:stop]
        if transform.scale != 1.0:
            logits *= transform.scale
        if transform.softcap:
            logits.div_(transform.softcap).tanh_().mul_(transform.softcap)
        column = targets_N1 - start
        inside = ((column >= 0) & (column < size)).float()
        yield _Block(start, stop, low, logits, column.clamp_(0, size - 1), inside)


def _gradient_of_logits(
    block: _Block, lse_N1: torch.Tensor, weights_N1: torch.Tensor, transform: LogitTransform
) -> torch.Tensor:
    """Return weights x (softmax - one-hot) through the transform, (N, B) in the weights' type."""
    slope = None
    if transform.softcap:
        # the derivative of cap x tanh(x / cap), from its value y: 1 - (y / cap)^2
        slope = block.logits.div(transform.softcap).square_().neg_().add_(1.0)
    grad = block.logits.sub_(lse_N1).exp_()
    grad.scatter_add_(1, block.column, -block.inside)
    grad *= weights_N1 * transform.scale
    if slope is not None:
        grad *= slope
    if block.low.data_ptr() != grad.data_ptr():
        block.low.copy_(grad)
    return block.low
