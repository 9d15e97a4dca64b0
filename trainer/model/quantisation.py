"""Hold frozen linear modules in 4 bits (QLoRA, Dettmers et al., 2023, arXiv:2305.14314) or 8.

In: linear modules of a loaded model. Out: bitsandbytes' modules in their place, checked to read
back as the weights that went in, or those of int8_linear.py; and the numbers that quantised
parameters stand for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from packhorse.trainer import dist
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.int8_linear import Int8Linear, RowScales

# peft imports it; on some CPUs it warns that it did not find kernels on the hub, which nobody asked
# for
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_BLOCK = 64  # weights that share a scale in 4 bits


def quantise(model: Any, names: list[str], base: str, gathered: Callable[..., Any]) -> None:
    """Put linear modules into 4 or 8 bits on this rank's device, one by one, so that the device
    never holds the whole model in 16 bits.

    NF4: 64 weights share a scale, their largest; int8: those of a row do. Weights in shards
    (ZeRO-3) become shards of packed bytes, of which each rank keeps all scales. DeepSpeed has one
    type for what it gathers at once: there the bytes go by the type of the weights, whose numbers
    nobody reads.

    Args:
        base: of the recipe's adapter section.
        gathered: holds parameters whole inside its block (engine.gathered).
    """
    for name in names:
        old = model.get_submodule(name)
        shards = getattr(old.weight, "convert_to_zero_parameters", None)
        storage = old.weight.dtype if shards else None
        with gathered([old.weight]):
            if base == "int8":
                new: nn.Module = Int8Linear(old, storage or torch.int8, dist.device())
            else:
                new = _in_4_bits(name, old, base == "nf4_double_quant", storage or torch.uint8)
        if shards:
            shards([new.weight])
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new)
    model.is_loaded_in_4bit = base != "int8"  # peft chooses its layers by it


def _in_4_bits(name: str, old: nn.Linear, double: bool, storage: torch.dtype) -> nn.Module:
    """Return bitsandbytes' module of a linear one, whose weight is held whole here."""
    try:
        import bitsandbytes
    except ImportError:
        raise BadInput(
            "adapter.base: nf4 needs the library bitsandbytes: pip install 'packhorse[qlora]'"
        ) from None
    bnb: Any = bitsandbytes.nn  # its own type annotations are wrong
    settings: dict[str, Any] = {"compress_statistics": double, "quant_type": "nf4"}
    settings["quant_storage"] = storage
    new = bnb.Linear4bit(
        old.in_features,
        old.out_features,
        bias=old.bias is not None,
        compute_dtype=old.weight.dtype,
        device="meta",
        **settings,
    )
    weight = bnb.Params4bit(old.weight.data, requires_grad=False, module=new, **settings)
    new.weight, new.bias = weight.to(dist.device()), old.bias
    _require_near(name, old.weight.detach(), dequantise(new.weight))
    # it would lay the weights out anew in place at the first evaluation, which changes their digest
    # and what a checkpoint is compared with
    new.support_avx512bf16_for_cpu = False
    return new


def _require_near(name: str, weight_OI: torch.Tensor, back_OI: torch.Tensor) -> None:
    """Raise BadInput if a weight comes back from its 4 bits farther off than rounding explains.

    Half the widest gap between NF4's values is 0.15 of a block's scale; scales in 8 bits add a
    little of the largest scale. bitsandbytes 0.50 uses wrong scales on a CPU if a row is no
    multiple of a block.
    """
    exact = weight_OI.to(back_OI).float()
    padding = (0, -exact.numel() % _BLOCK)
    off, sizes = (
        nn.functional.pad(values.abs().flatten(), padding).view(-1, _BLOCK).amax(1)
        for values in (back_OI.float() - exact, exact)
    )
    if not bool((off <= 0.2 * sizes + 0.05 * sizes.amax()).all()):
        raise BadInput(
            f"adapter.base: bitsandbytes does not read `{name}` ({weight_OI.shape[0]} x "
            f"{weight_OI.shape[1]}) back from its 4 bits on {back_OI.device.type}: its rows are "
            f"no multiple of {_BLOCK} weights; take `base` out"
        )


def dequantise(parameter: Any) -> torch.Tensor:
    """Return the parameter's numbers, in the type that the model computes in."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach()
    if isinstance(state, RowScales):
        return state.expand(parameter.data)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, state)


def numel(parameter: Any) -> int:
    """Return the number of a parameter's weights, also where it is in shards or quantised."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def parts_of(name: str, parameter: nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a frozen parameter's tensors by name: itself and, if it is quantised, its scales."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        yield name, parameter.detach()
    else:
        yield name, parameter.detach().view(torch.uint8)  # in whatever type the bytes go
        for key, tensor in state.as_dict(packed=True).items():
            yield f"{name}.{key}", tensor
