"""Compute the weighted cross-entropy by Liger's Triton kernel, in one pass that never waits.

In and out: as in loss.py. A chunk of positions at a time becomes logits, which the kernel replaces
by their gradient; the products with it follow at once, in the forward.

Liger's own function around that kernel is not used. It reads back the number of targets and the
gradient that comes in, so that the host waits for the GPU twice in a micro-batch. It takes one
weight for all positions, or makes all logits again in the backward. And it gives a head no gradient
if the hidden states need none.

Shapes: N trained positions, C of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from packhorse.trainer.model.logit_transform import LogitTransform

# c of C5: a chunk has the logits of c x H x N / V positions, and adds its part to the head's
# gradient in fp32. At Liger's own 1 an N of 8192 and Qwen2.5-1.5B's head are 64 chunks, which read
# and write 120 GB.
LIGER_HIDDEN = 8


def chunk_positions(trained: int, hidden: int, vocabulary: int) -> int:
    """Return C: a power of two, or N where that is less."""
    chunks = -(-vocabulary // (LIGER_HIDDEN * hidden))
    # Triton would compile another kernel for chunks that do not begin at multiples of 16 bytes
    return min(trained, max(16, 1 << (-(-trained // chunks) - 1).bit_length()))


def liger_cross_entropy(
    hidden_NH: torch.Tensor,
    head_weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    transform: LogitTransform,
) -> torch.Tensor:
    """Return the weighted sum of losses, () float32; at least one position is there."""
    if transform.scale != 1.0:
        # the kernel has no scale: scale x (h W' + b) = (scale h) W' + scale b
        hidden_NH = hidden_NH * transform.scale
        bias_V = bias_V * transform.scale if bias_V is not None else None
    args = (hidden_NH, head_weight_VH, bias_V, targets_N, weights_N, transform.softcap)
    return _Loss.apply(*args, torch.is_grad_enabled())  # type: ignore[return-value]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        head_weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor,
        softcap: float | None,
        learns: bool,
    ) -> torch.Tensor:
        (N, H), V = hidden_NH.shape, head_weight_VH.shape[0]
        of_hidden, of_weight, of_bias = (learns and needs for needs in ctx.needs_input_grad[:3])
        # Where all weights are alike, the shares are 1 and round nothing.
        largest = weights_N.amax().clamp_min(torch.finfo(torch.float32).tiny)
        shares_N1 = (weights_N / largest).to(hidden_NH.dtype).unsqueeze(1)
        losses_N = torch.empty_like(weights_N)
        grad_hidden_NH = torch.empty_like(hidden_NH) if of_hidden else None
        sum_VH = hidden_NH.new_zeros(V, H, dtype=torch.float32) if of_weight else None
        sum_V = hidden_NH.new_zeros(V, dtype=torch.float32) if of_bias else None
        size = chunk_positions(N, H, V)
        logits_CV = hidden_NH.new_empty(size, V)
        for start in range(0, N, size):
            chunk = slice(start, min(start + size, N))
            hidden_CH, shares_C1 = hidden_NH[chunk], shares_N1[chunk]
            logits = logits_CV[: len(hidden_CH)]
            if bias_V is None:
                torch.mm(hidden_CH, head_weight_VH.t(), out=logits)
            else:
                torch.addmm(bias_V, hidden_CH, head_weight_VH.t(), out=logits)
            _cross_entropy(logits, targets_N[chunk], losses_N[chunk], softcap, learns)
            # from here on `logits` are their gradients
            if grad_hidden_NH is not None:
                torch.mm(logits, head_weight_VH, out=grad_hidden_NH[chunk])
            # the product's other factor is the smaller one to be weighted
            if sum_VH is not None:
                _add_product(sum_VH, logits.t(), hidden_CH * shares_C1)
            if sum_V is not None:
                sum_V += logits.t() @ shares_C1.squeeze(1)
        if grad_hidden_NH is not None:
            grad_hidden_NH *= weights_N.unsqueeze(1)
        of_head = (_scaled(total, largest, hidden_NH.dtype) for total in (sum_VH, sum_V))
        ctx.gradients = (grad_hidden_NH, *of_head)
        return (losses_N * weights_N).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = ctx.gradients
        ctx.gradients = None  # a second backward would multiply them again
        return *(g if g is None else g.mul_(grad_loss) for g in gradients), *(None,) * 4


def _cross_entropy(
    logits_CV: torch.Tensor,
    targets_C: torch.Tensor,
    losses_C: torch.Tensor,
    softcap: float | None,
    learns: bool,
) -> None:
    """Write each position's loss, and if the model `learns` the gradient over the logits."""
    from liger_kernel.ops import cross_entropy

    # Triton's types know no grid and no num_warps
    kernel: Any = cross_entropy.liger_cross_entropy_kernel
    positions, vocabulary = logits_CV.shape
    # Numbers that are not used are constants: Triton compiles a kernel anew for some new numbers.
    kernel[(positions,)](
        X_ptr=logits_CV,
        X_stride=logits_CV.stride(0),
        Y_ptr=targets_C,
        Y_stride=targets_C.stride(0),
        weight_ptr=None,
        loss_ptr=losses_C,
        z_loss_ptr=None,
        loss_stride=losses_C.stride(0),
        token_accuracy_ptr=None,
        token_accuracy_stride=0,
        predicted_tokens_ptr=None,
        predicted_tokens_stride=0,
        n_cols=vocabulary,
        n_non_ignore=1,
        sum_non_ignore_weight=1,
        weight_sum=0.0,
        ignore_index=-100,  # no target is
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="sum",
        softcap=softcap,
        RETURN_Z_LOSS=False,
        RETURN_TOKEN_ACCURACY=False,
        RETURN_PREDICTED_TOKENS=False,
        HAS_WEIGHT=False,
        HAS_SOFTCAPPING=softcap is not None,
        HAS_GRADIENTS=learns,
        BLOCK_SIZE=min(cross_entropy.MAX_FUSED_SIZE, 1 << (vocabulary - 1).bit_length()),
        num_warps=32,
    )


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left @ right to an fp32 sum, which is not rounded in between."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


def _scaled(
    total: torch.Tensor | None, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    if total is None:
        return None
    return torch.mul(total, scale, out=torch.empty_like(total, dtype=dtype))
