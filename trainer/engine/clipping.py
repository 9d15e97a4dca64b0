"""Clip a step's gradients by their norm and apply the update, with one reading of the device.

In: DeepSpeed's engine after a step's last backward, and the loss. Out: the norm, and whether the
update was applied, alike at every ZeRO stage (C12).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from packhorse.trainer import dist
from packhorse.trainer.engine.missing_gradients import clip_all, fill_gradients
from packhorse.trainer.utils.lean_import import replaced

_NORM_BLOCK = 256  # gradient elements whose squares are summed in fp32


def replace_gradient_norm(optimizer: Any) -> None:
    """Make DeepSpeed's optimizer of ZeRO stages 1 to 3 sum its norm in fp64."""
    if hasattr(optimizer, "get_grad_norm_direct"):
        optimizer.get_grad_norm_direct = gradient_norm
        if not getattr(optimizer, "cpu_offload", True):
            # stages 1 and 2 in bf16 look at each gradient, of which the norm tells the same
            optimizer.check_overflow = lambda **_: None


def gradient_norm(gradients: Iterable[torch.Tensor], *_: Any) -> torch.Tensor:
    """Return the 2-norm of the gradients of all ranks, () float64; -1 where it is not finite.

    It replaces DeepSpeed's own, which copies every gradient to fp64 first: 4% of a step on a CPU.
    Here norms of blocks in fp32 are summed in fp64, which differs by 1e-9 of the norm.
    """
    total = _sum_of_squares(gradients)
    torch.distributed.all_reduce(total)
    # DeepSpeed reads -1 as overflow and skips the step on all ranks
    return torch.where(total.isfinite(), total.sqrt(), -1.0)


def whole_gradient_norm(input_tensors: Iterable[torch.Tensor], **_: Any) -> torch.Tensor:
    """Return the same of gradients that every rank holds whole, for DeepSpeed to call."""
    total = _sum_of_squares(input_tensors)
    return torch.where(total.isfinite(), total.sqrt(), -1.0)


def _sum_of_squares(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64, device=dist.device())
    for gradient in gradients:
        flat = gradient.detach().view(-1)
        whole = flat.numel() // _NORM_BLOCK * _NORM_BLOCK
        blocks = torch.linalg.vector_norm(
            flat[:whole].view(-1, _NORM_BLOCK), dim=1, dtype=torch.float32
        )
        square = blocks.double().square().sum() + flat[whole:].double().square().sum()
        total += square.to(total.device)
    return total


class StepNumbers:
    """What the host must know of a step before its update: norms, and the loss if it is checked.

    They are read at once, as the host waits for the device at each reading.

    Attributes:
        refused: why the loss does not allow the update, or None.

    Args:
        loss: this rank's share, () float32.
        check_loss: gets the loss of all ranks and returns why the step must not be applied.
    """

    def __init__(
        self, loss: torch.Tensor, check_loss: Callable[[float], str | None] | None
    ) -> None:
        self._loss, self._check_loss = loss, check_loss
        self.refused: str | None = None
        self.is_read = False

    def read(self, norms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the norms on the host; NaN where the step must not be applied."""
        loss = self._loss.double()
        if self._check_loss:
            torch.distributed.all_reduce(loss)
        numbers = torch.stack([*(norm.to(loss.device, loss.dtype) for norm in norms), loss])
        *on_host, loss = numbers.cpu()
        self.is_read = True
        if self._check_loss:
            self.refused = self._check_loss(float(loss))
        factor = math.nan if self.refused else 1.0
        return [(read * factor).to(norm.dtype) for read, norm in zip(on_host, norms, strict=True)]


@contextmanager
def norm_on_host(optimizer: Any, numbers: StepNumbers) -> Iterator[None]:
    """Give DeepSpeed's step of ZeRO stages 1 to 3 a norm that lies on the host.

    DeepSpeed 0.19.8 asks a norm up to five times whether it is finite or above the limit.
    """
    from deepspeed.runtime import bf16_optimizer

    if isinstance(optimizer, bf16_optimizer.BF16_Optimizer):
        # stage 1 in bf16: its ranks hold all gradients, and it calls a function
        owner: Any = bf16_optimizer
        name, take = "get_global_norm_of_tensors", whole_gradient_norm
    elif hasattr(optimizer, "scaled_global_norm"):
        owner, name, take = optimizer, "scaled_global_norm", optimizer.scaled_global_norm
    else:
        owner, name, take = optimizer, "_get_norm_groups", optimizer._get_norm_groups

    def read(*args: Any, **kwargs: Any) -> Any:
        norms = take(*args, **kwargs)
        return numbers.read(norms) if isinstance(norms, list) else numbers.read([norms])[0]

    with replaced(owner, name, read):
        yield
    if not numbers.is_read:
        raise RuntimeError(
            f"DeepSpeed's step did not call `{name}`, so that another norm than ours clipped its "
            "gradients; install the version of DeepSpeed that pyproject.toml names"
        )


def step_clipped(
    engine: Any,
    parameters: Iterable[nn.Parameter],
    max_grad_norm: float,
    stage: int,
    numbers: StepNumbers,
) -> tuple[float, bool]:
    """Clip the gradients by their global norm and apply the update, alike at every stage (C12).

    Returns:
        The norm before clipping, and whether the update was applied. It is not where the norm is
        not finite or the loss is refused; the gradients are dropped then.
    """
    if stage > 0:
        clip_all(engine.optimizer)
        # DeepSpeed clips by the configuration's `gradient_clipping`
        with norm_on_host(engine.optimizer, numbers):
            engine.step()
        applied = engine.was_step_applied()
        # a step that stage 3 skips leaves the norm of the step before in place
        return float(engine.get_global_grad_norm()) if applied else math.nan, applied
    # At stage 0 DeepSpeed reports no norm and would apply a NaN. Every rank has all gradients
    # here, already averaged, so that the norm needs no collective. fp64, as in `gradient_norm`.
    trained = [p for p in parameters if p.requires_grad]
    fill_gradients(trained)
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in trained]
    total = torch.linalg.vector_norm(torch.stack(norms))
    norm = float(numbers.read([total])[0])
    if not math.isfinite(norm):
        engine.zero_grad()
        return norm, False
    nn.utils.clip_grads_with_norm_(trained, max_grad_norm, total)
    engine.step()
    return norm, True
