"""Hold frozen weights in 4 bits (QLoRA, Dettmers et al., 2023, arXiv:2305.14314) or in 8.

In: linear modules of a loaded model, and the parameters of its experts. Out: the modules of
nf4_linear.py in their place, checked to read back as the weights that went in, or those of
int8_linear.py; packed experts, which expert_weights.py expands; and the numbers that quantised
parameters stand for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from packhorse.trainer import dist
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.int8_linear import Int8Linear, RowScales, in_8_bits

# peft imports it; on some CPUs it warns that it did not find kernels on the hub, which nobody asked
# for
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

BLOCK = 64  # weights that share a scale in 4 bits


def quantise(model: Any, names: Iterable[str], base: str, gathered: Callable[..., Any]) -> None:
    """Put linear modules, and experts' parameters, into 4 or 8 bits on this rank's device, one by
    one, so that the device never holds the whole model in 16 bits.

    NF4: 64 weights share a scale, their largest; int8: those of a row do. Weights in shards
    (ZeRO-3) become shards of packed bytes, of which each rank keeps all scales. DeepSpeed has one
    type for what it gathers at once: there the bytes go by the type of the weights, whose numbers
    nobody reads.

    Args:
        names: of linear modules, or of parameters.
        base: of the recipe's adapter section.
        gathered: holds parameters whole inside its block (engine.gathered).
    """
    for name in names:
        parent, _, last = name.rpartition(".")
        old: Any = getattr(model.get_submodule(parent), last)  # a linear module, or a parameter
        weight: Any = getattr(old, "weight", old)
        shards = getattr(weight, "convert_to_zero_parameters", None)
        with gathered([weight]):
            packed = _pack(name, weight, base, weight.dtype if shards else None)
        if shards:
            shards([packed])
        new = packed if old is weight else _linear_of(old, packed)
        setattr(model.get_submodule(parent), last, new)
    model.is_loaded_in_4bit = base != "int8"  # peft chooses its layers by it


def _pack(name: str, weight: Any, base: str, storage: torch.dtype | None) -> Any:
    """Return a frozen parameter of the packed bytes of a weight, which is held whole here.

    Args:
        storage: the type that the bytes are viewed in, if not their own.
    """
    if base == "int8":
        return in_8_bits(weight, storage or torch.int8, dist.device())
    try:
        from packhorse.trainer.model.nf4_linear import Params4bit
    except ImportError:
        raise BadInput(
            "adapter.base: nf4 needs the library bitsandbytes: pip install 'packhorse[qlora]'"
        ) from None
    packed = Params4bit(
        weight.data,
        requires_grad=False,
        compress_statistics=base == "nf4_double_quant",
        quant_type="nf4",
        quant_storage=storage or torch.uint8,
    ).to(dist.device())
    _require_near(name, weight.detach(), dequantise(packed))
    return packed


def _linear_of(old: nn.Linear, packed: Any) -> nn.Module:
    """Return the module that multiplies by a packed weight as `old` did by its own."""
    if isinstance(packed.quant_state, RowScales):
        return Int8Linear(old, packed)
    from packhorse.trainer.model.nf4_linear import Nf4Linear

    has_bias, dtype = old.bias is not None, packed.quant_state.dtype
    new = Nf4Linear(
        old.in_features, old.out_features, bias=has_bias, compute_dtype=dtype, device="meta"
    )
    new.weight, new.bias = packed, old.bias
    return new


def _require_near(name: str, weight: torch.Tensor, back: torch.Tensor) -> None:
    """Raise BadInput if a weight comes back from its 4 bits farther off than rounding explains.

    Half the widest gap between NF4's values is 0.15 of a block's scale; scales in 8 bits add a
    little of the largest scale. bitsandbytes 0.50 uses wrong scales on a CPU if a row is no
    multiple of a block.
    """
    exact = weight.to(back).float()
    padding = (0, -exact.numel() % BLOCK)
    off, sizes = (
        nn.functional.pad(values.abs().flatten(), padding).view(-1, BLOCK).amax(1)
        for values in (back.float() - exact, exact)
    )
    if not bool((off <= 0.2 * sizes + 0.05 * sizes.amax()).all()):
        raise BadInput(
            f"adapter.base: bitsandbytes does not read `{name}` "
            f"({' x '.join(map(str, weight.shape))}) back from its 4 bits on {back.device.type}: "
            f"its rows are no multiple of {BLOCK} weights; take `base` out"
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


def count_scale_bytes(parameter: torch.Tensor, base: str | None) -> int:
    """Return the bytes beside the codes of a parameter that `adapter.base` will pack.

    NF4 has an fp32 scale for each 64 elements, and a table of 16 values in fp32. Double
    quantisation makes the scales bytes, with an fp32 scale for each 256 of those, a table of 256
    values and their mean in fp32. int8 has a scale a row, in the parameter's type.
    """
    if base == "int8":
        return parameter.numel() // parameter.shape[-1] * parameter.element_size()
    scales = -(-parameter.numel() // BLOCK)
    is_double = base == "nf4_double_quant"
    return 64 + (scales + 4 * -(-scales // 256) + 4 * 256 + 4 if is_double else 4 * scales)


def shape(parameter: Any) -> torch.Size:
    """Return the shape of a parameter's weights, also where it is in shards or quantised."""
    state = getattr(parameter, "quant_state", None)
    return state.shape if state is not None else getattr(parameter, "ds_shape", parameter.shape)


def numel(parameter: Any) -> int:
    """Return the number of a parameter's weights, also where it is in shards or quantised."""
    return shape(parameter).numel()


def parts_of(name: str, parameter: nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a frozen parameter's tensors by name: itself and, if it is quantised, its scales."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        yield name, parameter.detach()
    else:
        yield name, parameter.detach().view(torch.uint8)  # in whatever type the bytes go
        for key, tensor in state.as_dict(packed=True).items():
            yield f"{name}.{key}", tensor
