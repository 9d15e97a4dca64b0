"""Multiply the linear modules of a decoder's layers in fp8, with a scale for each row.

In: a loaded model in bfloat16. Out: the same model, whose linear modules round both factors of a
product to float8_e4m3fn, in the forward and in both products of the backward. Weights, names and
optimizer stay in the types that they have.

It computes what the recipe `rowwise` of torchao 0.18 computes, by the bit. That library is not used
as it keeps a view of each weight until the backward, which at ZeRO-3 holds what was gathered.

A token's scale is its own, so that packed documents stay apart (C4); one scale for a whole tensor
would mix them. The gradient of a weight sums over tokens, and takes its scales over all tokens of a
micro-batch: there, documents and micro-batches change each other's rounding.

Shapes: T tokens, I inputs and O outputs of a module, R rows, C columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.decoder import decoder_layers
from packhorse.trainer.utils.text import one_line

MULTIPLE = 16  # of inputs, outputs and summed tokens: the kernels take no other sizes
# A router's small errors send tokens to other experts; an adapter's matrices are too small to gain.
_LEFT_OUT = re.compile(r"(^|[._])(gate|router)(\.|$)|(^|\.)lora_")
# Largest ||fp8 - bf16|| / ||bf16|| of a product of random numbers. Rounding to 3 bits after the
# point gives 0.04; rows with each other's scales give 0.3 and more.
_MOST_ROUNDING = 0.08


def use_fp8(model: Any, device: torch.device) -> str:
    """Let the model's linear modules multiply in fp8, and try each size of them; return what was
    done, for the log.

    Raises:
        BadInput: the device cannot, the model has no such modules, or a product comes out wrong.
    """
    if missing := missing_for_fp8(device):
        raise BadInput(f"model.matmul: fp8_rowwise cannot be used: {missing}; set it to bf16")
    modules = list(fp8_modules(model))
    if not modules:
        raise BadInput(
            f"model.matmul: the layers of {type(model).__name__} have no linear modules in "
            f"bfloat16 whose sizes are multiples of {MULTIPLE}; set it to bf16"
        )
    for outputs, inputs in {(module.out_features, module.in_features) for module in modules}:
        try:
            _require_right(outputs, inputs, device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a card or a build of torch without such a kernel
            raise BadInput(
                f"model.matmul: a product of {inputs} to {outputs} cannot be made in fp8 here "
                f"({one_line(error, 200)}); set it to bf16"
            ) from None
    for module in modules:
        module.__class__ = Fp8Linear
    return f"fp8, a scale for each row, in {len(modules)} linear modules"


def missing_for_fp8(device: torch.device) -> str | None:
    """Return what the device lacks, or None."""
    if device.type != "cuda":
        return "it needs a CUDA device, as a CPU only emulates it, slowly"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return "it needs a GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell)"
    return None


def fp8_modules(model: Any) -> Iterator[nn.Linear]:
    """Yield the linear modules that multiply in fp8: those of the decoder's layers, without routers
    and adapters, in bfloat16 and of fitting sizes.
    """
    for layer in decoder_layers(model):
        for name, module in layer.named_modules():
            if not (isinstance(module, nn.Linear) and type(module) is nn.Linear):
                continue  # a class of its own multiplies in its own way, as weights in 4 bits
            sizes = module.in_features, module.out_features
            fits = module.weight.dtype == torch.bfloat16 and not any(n % MULTIPLE for n in sizes)
            if fits and not _LEFT_OUT.search(name):
                yield module


def workspace_bytes(model: Any, tokens: int) -> int:
    """Return at most what the fp8 factors of a product take, which live as long as it runs."""
    sizes = [(m.in_features, m.out_features) for m in fp8_modules(model)]
    return max((tokens * (i + o) + i * o for i, o in sizes), default=0)


class Fp8Linear(nn.Linear):
    """A linear module that multiplies in fp8: inputs (..., I), outputs (..., O), in bfloat16."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.numel() == 0:  # of an expert without tokens
            return super().forward(input)
        out = _Fp8Product.apply(input, self.weight)
        return out if self.bias is None else out + self.bias


class _Fp8Product(torch.autograd.Function):
    """input (..., I) times weight (O, I) -> (..., O)."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        # the parameter itself and no view of it: ZeRO-3 frees its numbers, and gathers them again
        ctx.save_for_backward(input, weight_OI)
        out_TO = _multiply(input.flatten(0, -2), weight_OI, fast=True)
        return out_TO.view(*input.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight_OI = ctx.saved_tensors
        grad_TO, grad_input, grad_weight = grads[0].flatten(0, -2), None, None
        if ctx.needs_input_grad[0]:
            grad_input = _multiply(grad_TO, weight_OI.t()).view(input.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = _multiply(grad_TO.t(), input.flatten(0, -2).t())
        return grad_input, grad_weight


def _multiply(left_RC: torch.Tensor, right_RC: torch.Tensor, fast: bool = False) -> torch.Tensor:
    """Return left times right transposed, (R of left, R of right) in bfloat16.

    Args:
        fast: let Hopper's tensor cores add up with fewer bits, as is usual in the forward alone.
    """
    (left, left_scale), (right, right_scale) = _rows_in_fp8(left_RC), _rows_in_fp8(right_RC)
    return torch._scaled_mm(
        left,
        right.t(),
        scale_a=left_scale,
        scale_b=right_scale.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )


def _rows_in_fp8(rows_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row in fp8, filled up with zeros to a multiple of 16, and its scale (R, 1).

    row = fp8 x scale. Fused into one kernel on a GPU: operation by operation it would take as long
    as the product gains.
    """
    if rows_RC.is_cuda and not torch.compiler.is_compiling():
        return _compiled_cast()(rows_RC.detach())  # one form, whether or not it needs a gradient
    return _cast(rows_RC)


def _cast(rows_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = rows_RC.abs().amax(dim=1, keepdim=True).double().clamp_min(1e-12)
    # 448 is the largest number in fp8 (a constant of the module would break torch.compile's graph);
    # rounded down to a power of two, by its exponent's bits: multiplying by it rounds nothing
    scale = ((448.0 / largest).float().view(torch.int32) & -(2**23)).view(torch.float32)
    rounded = (rows_RC.float() * scale).to(torch.float8_e4m3fn)
    return F.pad(rounded, (0, -rows_RC.shape[1] % MULTIPLE)).contiguous(), scale.reciprocal()


@cache
def _compiled_cast() -> Any:
    return torch.compile(_cast, dynamic=True)


def _require_right(outputs: int, inputs: int, device: torch.device) -> None:
    """Require that the three products of a size are near those in bfloat16 on this device."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        # rows of other sizes than their neighbours, so that a wrong scale shows
        numbers = torch.randn(size, generator=generator, device=device)
        return numbers * torch.logspace(-1, 1, size[0], device=device)[:, None]

    input, weight, grad = draw(35, inputs), draw(outputs, inputs), draw(35, outputs)
    seen: list[tuple[torch.Tensor, ...]] = []
    for product in (_Fp8Product.apply, F.linear):
        factors = [x.bfloat16().requires_grad_() for x in (input, weight)]
        out = product(*factors)
        seen.append((out.detach(), *torch.autograd.grad(out, factors, grad.bfloat16())))
    for name, ours, exact in zip(("output", "input's gradient", "weight's gradient"), *seen):
        off = float((ours.float() - exact.float()).norm() / exact.float().norm())
        if not off <= _MOST_ROUNDING:  # written so that a NaN fails, too
            raise BadInput(
                f"model.matmul: a product of {inputs} to {outputs} in fp8 gives a {name} that is "
                f"{off:.2g} of its size off here; set it to bf16"
            )
