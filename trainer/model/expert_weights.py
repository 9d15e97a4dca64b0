"""Make the weights of experts where they run: from 4 or 8 bits, and with their adapters added.

In: a model whose modules hold the matrices of all their experts as one frozen parameter (E, M, N),
quantised or with an adapter. Out: the same model. While such a module runs, an attribute with the
weights hides the parameter, so that any code of transformers reads them, grouped products too.
Autograd would keep them until the backward, all layers' at once. It gets a note of what they are
instead, and the backward makes them anew: all, or the experts that an operation asks for.

Shapes: E experts, matrices (M, N), of which n are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from packhorse.trainer.model.expert_lora import expert_parameters, factors, wraps_parameter
from packhorse.trainer.model.int8_linear import RowScales
from packhorse.trainer.model.quantisation import BLOCK, dequantise, shape

Maker = Callable[[int, int], torch.Tensor]
"""make(first, last): the weights of experts first to last - 1, (n, M, N)."""


def packable_experts(model: Any, base: str | None) -> dict[str, nn.Parameter]:
    """Return the frozen parameters of experts that `adapter.base` quantises, by name.

    Blocks of NF4 must not reach from a row into the next, so that experts can be expanded by
    themselves, and bitsandbytes reads them back.
    """
    return {
        name: parameter
        for name, parameter in expert_parameters(model).items()
        if not parameter.requires_grad
        and (base == "int8" or (base and shape(parameter)[-1] % BLOCK == 0))
    }


def make_where_they_run(model: nn.Module) -> None:
    """Let quantised experts, and those with an adapter, run with weights made for each call."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        own = module.named_parameters(recurse=False)
        if wraps_parameter(module):
            module.forward = partial(_run_adapted, module)
        elif packed := [n for n, p in own if hasattr(p, "quant_state") and len(shape(p)) == 3]:
            module.forward = partial(_run_packed, module, packed)


@torch.compiler.disable
def _run_adapted(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the module in peft's wrapper with W + s L R as the parameter that this one adapts."""
    parameter, owner = wrapper.get_param(), wrapper.get_base_layer()
    left, right, scale = factors(wrapper, _dtype(parameter))

    def make(first: int, last: int) -> torch.Tensor:
        weight = _expand(parameter, first, last)
        return torch.baddbmm(weight, left[first:last], right[first:last], alpha=scale)

    with _in_place(owner, {wrapper.parameter_name: make}):
        return wrapper.base_layer(*args, **kwargs)


@torch.compiler.disable
def _run_packed(experts: Any, names: list[str], *args: Any, **kwargs: Any) -> Any:
    """Run a module of experts with its packed parameters expanded, but for those that wrappers
    around it have made.
    """
    own = {name: experts._parameters[name] for name in names if name not in vars(experts)}
    with _in_place(experts, {name: partial(_expand, packed) for name, packed in own.items()}):
        return type(experts).forward(experts, *args, **kwargs)


def _dtype(parameter: Any) -> torch.dtype:
    """Return the type that a parameter, packed or not, computes in."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.dtype
    return state.scales.dtype if isinstance(state, RowScales) else state.dtype


def _expand(parameter: Any, first: int, last: int) -> torch.Tensor:
    """Return the weights of some experts of a parameter that is held whole here, (n, M, N)."""
    state, (experts, *matrix) = getattr(parameter, "quant_state", None), shape(parameter)
    if state is None:
        return parameter.detach()[first:last]
    if (first, last) == (0, experts):
        return dequantise(parameter)
    size = torch.Size((last - first, *matrix))
    codes_EB = parameter.data.view(torch.uint8).view(experts, -1)
    codes = codes_EB[first:last].reshape(-1, 1)
    if isinstance(state, RowScales):
        return RowScales(size, state.scales[first:last]).expand(codes)
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    scales = scales.view(experts, -1)[first:last].flatten()
    settings = (size, state.code, state.blocksize, state.quant_type, state.dtype)
    return dequantize_4bit(codes, QuantState(scales, *settings))


# ----------------------------------------------------------------------- what the backward needs


class _Made(NamedTuple):
    """What autograd keeps of made weights: how to make them, and which view of them it saw."""

    make: Maker
    matrix: int  # elements of one expert
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @torch.no_grad()
    def again(self) -> torch.Tensor:
        reach = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        first, last = self.offset // self.matrix, (self.offset + reach) // self.matrix + 1
        made = self.make(first, last)
        return made.as_strided(self.size, self.stride, self.offset - first * self.matrix)


@contextmanager
def _in_place(owner: nn.Module, makers: Mapping[str, Maker]) -> Iterator[None]:
    """Give a module made weights as attributes inside the block, which hide its parameters."""
    notes: dict[int, tuple[Maker, int]] = {}  # by the address of what was made
    # Hooks do not stack: those around ours, of activation checkpointing for one, get the rest.
    autograd: Any = vars(torch._C)["_autograd"]
    around = autograd._top_saved_tensors_default_hooks(True)

    def pack(tensor: torch.Tensor) -> Any:
        if note := notes.get(tensor.untyped_storage()._cdata):
            return _Made(*note, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        if around:
            return around[0](tensor)
        # an operation that kept its own output would never be freed
        return tensor if isinstance(tensor, nn.Parameter) else tensor.detach()

    def unpack(kept: Any) -> torch.Tensor:
        if isinstance(kept, _Made):
            return kept.again()
        return around[1](kept) if around else kept

    try:
        for name, make in makers.items():
            experts, *_ = shape(owner._parameters[name])
            made = vars(owner)[name] = make(0, experts)
            notes[made.untyped_storage()._cdata] = (make, made.numel() // experts)
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for name in makers:
            vars(owner).pop(name, None)  # the memory may not have sufficed for all
