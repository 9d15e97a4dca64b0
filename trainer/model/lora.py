"""LoRA (Hu et al., 2021, arXiv:2106.09685): small matrices beside a model's linear modules are
trained, it is not.

In: a transformers model and the recipe's adapter section. Out: the same model, changed in place by
    peft. It is not
wrapped, so that all who know the model still do:

    q_proj.weight (O, I)    ->    q_proj.base_layer.weight, frozen; in 4 bits under QLoRA
                                  q_proj.lora_A.default.weight (R, I), q_proj.lora_B.default.weight
                                  (O, R)

A weight W acts as W + alpha / R x B A. B starts at zero, A from (seed, name): the same in every
world and stage. Everything is in the model's type, and the optimizer has fp32 masters of what is
trained, as of a whole model's weights.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from trainer import dist
from trainer.config.recipe import AdapterSection
from trainer.datatypes import BadInput

# Where peft imports it on some CPUs, it warns that kernels of a hub were not found, which are not
# wanted.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_BLOCK = 64  # weights that share a scale in 4 bits
NAME = "default"  # peft's own for the one adapter of a model; a part of parameters' names


def add_adapter(model: Any, section: AdapterSection, seed: int) -> None:
    """Put the adapter in, freeze the rest, and say how much is trained. On the meta device nothing
    is quantised.

    Under ZeRO-3 it runs where transformers loads in shards: DoRA gathers the weights whose norms it
    takes.

    Raises:
        BadInput: a module that is named does not exist, or cannot have an adapter; or bitsandbytes
            is not there.
    """
    targets, whole = targets_of(model, section), whole_modules(model, section)
    if section.base and not next(model.parameters()).is_meta:
        _quantise(model, quantised_modules(model, section), section.base == "nf4_double_quant")
    _inject(model, section, targets)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_of_adapter(name) or _lies_in(name, whole))
    _initialise(model, seed)
    there = sum(numel(parameter) for parameter in model.parameters())
    trained = sum(numel(parameter) for parameter in model.parameters() if parameter.requires_grad)
    dist.log.info(
        "adapter: rank %d beside %d modules%s; %.2f%% of %.3g billion weights are trained",
        section.rank, len(targets), f", {len(whole)} whole" if whole else "", 100 * trained / there, there / 1e9,
    )  # fmt: skip


def is_of_adapter(name: str) -> bool:
    """Whether a parameter of this name is one of peft's."""
    return ".lora_" in name


def numel(parameter: Any) -> int:
    """Weights of a parameter, in shards or in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return (
        state.shape.numel()
        if state is not None
        else getattr(parameter, "ds_numel", parameter.numel())
    )


def _inject(model: Any, section: AdapterSection, targets: list[str]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        target_modules=targets,
        lora_dropout=section.dropout,
        use_rslora=section.rslora,
        use_dora=section.dora,
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, model, adapter_name=NAME)


@torch.no_grad()
def _initialise(model: Any, seed: int) -> None:
    """A as Linear does it, uniform in +-1 / sqrt(I), drawn on the CPU in fp32: no device, world or
    order matters.

    peft has left B at zero. DoRA's sizes are the norms of the weights' rows, which it took.
    """
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(dist.seed_from(seed, "adapter", name))
            bound = 1 / math.sqrt(parameter.shape[1])
            parameter.copy_(
                torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            )


# ------------------------------------------------------------------------------------ which modules


def targets_of(model: Any, section: AdapterSection) -> list[str]:
    """The names of the linear modules that get an adapter.

    Raises:
        BadInput: a name or pattern is of no module, of one that is not linear, of the head, or of
            one trained whole.
    """
    linear, whole = _linear_modules(model), whole_modules(model, section)
    if section.target_modules == "all-linear":
        found = [name for name in linear if not _lies_in(name, whole)]
        if not found:
            raise BadInput(
                f"adapter.target_modules: {type(model).__name__} has no linear modules; train all "
                f"its weights"
            )
        return found
    is_pattern = isinstance(section.target_modules, str)
    found = []
    for wanted in (
        (section.target_modules,)
        if isinstance(section.target_modules, str)
        else section.target_modules
    ):
        matching = _matching(wanted, is_pattern, dict(model.named_modules()))
        mine = [name for name in matching if name in linear]
        if not mine or any(_needs_saving(model, name) for name in matching):
            raise BadInput(_no_target(model, wanted, is_pattern, matching, linear))
        found += [name for name in mine if name not in found]
    twice = [name for name in found if _lies_in(name, whole)]
    if twice:
        raise BadInput(
            f"adapter.target_modules: `{twice[0]}` is trained whole by adapter.modules_to_save; "
            f"name it in one of them"
        )
    return found


def whole_modules(model: Any, section: AdapterSection) -> list[str]:
    """The names of the modules that are trained whole.

    Raises:
        BadInput: there is no such module with weights, or only one of two that share their weight
            is named.
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if name and any(True for _ in module.parameters())
    }
    found: list[str] = []
    for wanted in section.modules_to_save:
        matching = _matching(wanted, False, modules)
        if not matching:
            raise BadInput(
                f"adapter.modules_to_save: no module is called `{wanted}`; "
                f"{_nearest(wanted, modules)}"
            )
        found += [name for name in matching if name not in found]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in modules.items()}
    tied = (
        {names[id(module)] for module in (embedding, head)}
        if embedding.weight is head.weight
        else set()
    )
    one = sorted(name for name in tied if _lies_in(name, found))
    if len(one) == 1:
        raise BadInput(
            f"adapter.modules_to_save: `{one[0]}` shares its weight with `{min(tied - set(one))}`; "
            f"name both, or neither"
        )
    return found


def quantised_modules(model: Any, section: AdapterSection) -> list[str]:
    """The names of the modules that nf4 puts into 4 bits: every linear one but the head and those
    trained whole.
    """
    whole = whole_modules(model, section)
    return [name for name in _linear_modules(model) if not _lies_in(name, whole)]


def _linear_modules(model: Any) -> dict[str, nn.Linear]:
    """By name, without the head: its loss is fused, and would not see an adapter."""
    head = model.get_output_embeddings()
    return {
        name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head
    }


def _lies_in(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _matching(wanted: str, is_pattern: bool, names: Iterable[str]) -> list[str]:
    if is_pattern:
        return [name for name in names if re.fullmatch(wanted, name)]
    return [name for name in names if name == wanted or name.endswith(f".{wanted}")]


def _needs_saving(model: Any, name: str) -> bool:
    """Whether a module is the head or an embedding, which can be trained whole only."""
    module = model.get_submodule(name)
    return module is model.get_output_embeddings() or isinstance(module, nn.Embedding)


def _no_target(
    model: Any, wanted: str, is_pattern: bool, matching: list[str], linear: Iterable[str]
) -> str:
    """Why `wanted` cannot have an adapter, in a sentence."""
    if not matching:
        what = "no module's whole name matches" if is_pattern else "no module is called"
        return f"adapter.target_modules: {what} `{wanted}`; {_nearest(wanted, linear)}"
    name = next((name for name in matching if _needs_saving(model, name)), matching[0])
    module = model.get_submodule(name)
    if module is model.get_output_embeddings():
        return (
            f"adapter.target_modules: `{name}` is the head, whose loss is fused and would not see "
            f"an adapter; put it "
            "into adapter.modules_to_save, which trains it whole"
        )
    return (
        f"adapter.target_modules: `{name}` is of the type {type(module).__name__}, and an adapter "
        f"goes beside linear "
        "modules only; name those, or put it into adapter.modules_to_save"
    )


def _nearest(wanted: str, names: Iterable[str]) -> str:
    ends = {name.rsplit(".", 1)[-1] for name in names}
    candidates = sorted(name for name in (*names, *ends) if not name.isdigit())
    near = difflib.get_close_matches(wanted, candidates, n=1, cutoff=0.0)
    return f"the nearest is `{near[0]}`" if near else "it has none"


# ------------------------------------------------------------------------------------------- 4 bits


def _quantise(model: Any, names: list[str], double: bool) -> None:
    """Put linear modules into 4 bits on this rank's device, one by one: the whole model is never
    there.

    NF4 (Dettmers et al., 2023, arXiv:2305.14314): blocks of 64 weights, each with its largest as a
    scale.
    """
    try:
        import bitsandbytes
    except ImportError:
        raise BadInput(
            "adapter.base: nf4 needs the library bitsandbytes: pip install 'packhorse[qlora]'"
        ) from None
    bnb: Any = bitsandbytes.nn  # whose own types are wrong
    for name in names:
        old = model.get_submodule(name)
        new = bnb.Linear4bit(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            compute_dtype=old.weight.dtype,
            compress_statistics=double,
            quant_type="nf4",
            device="meta",
        )
        weight = bnb.Params4bit(
            old.weight.data,
            requires_grad=False,
            compress_statistics=double,
            quant_type="nf4",
            module=new,
        )
        new.weight, new.bias = weight.to(dist.device()), old.bias
        _require_near(name, old.weight.detach(), _dequantised(new.weight))
        new.support_avx512bf16_for_cpu = (
            False  # where it evaluates it would lay the weights out anew, in place
        )
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new)
    model.is_loaded_in_4bit = True  # peft asks


def _require_near(name: str, weight_OI: torch.Tensor, back_OI: torch.Tensor) -> None:
    """Raises BadInput where a weight is read back from its 4 bits farther off than they can put it:
    half the widest gap of their values is 0.15 of a block's scale, and scales of 8 bits add a
    little of the largest.

    bitsandbytes 0.50 takes wrong scales on a CPU where rows are no multiples of a block.
    """
    off = (back_OI.float() - weight_OI.to(back_OI).float()).abs().flatten()
    sizes = weight_OI.to(back_OI).float().abs().flatten()
    fill = (0, -off.numel() % _BLOCK)
    off, sizes = (
        nn.functional.pad(values, fill).view(-1, _BLOCK).amax(1) for values in (off, sizes)
    )
    if not bool((off <= 0.2 * sizes + 0.05 * sizes.amax()).all()):
        raise BadInput(
            f"adapter.base: bitsandbytes does not read `{name}` ({weight_OI.shape[0]} x "
            f"{weight_OI.shape[1]}) back "
            f"from its 4 bits on {back_OI.device.type}: its rows are no multiple of {_BLOCK} "
            f"weights; take `base` out"
        )


def require_stage(section: AdapterSection | None, stage: int) -> None:
    """Raises BadInput where the base lies in 4 bits and would be sharded."""
    if section and section.base and stage == 3:
        raise BadInput(
            "adapter.base: nf4 is not proved at ZeRO-3, which would cut weights of 4 bits into "
            "shards; use "
            "ds_configs/zero2.json, where each GPU holds the 4-bit base whole, or take `base` out"
        )


def parts_of(name: str, parameter: nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
    """A frozen parameter's tensors by name: itself and, in 4 bits, the numbers that its bits stand
    for.
    """
    yield name, parameter.detach()
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        for key, tensor in state.as_dict(packed=True).items():
            yield f"{name}.{key}", tensor


def borrowed_weights(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Modules that use the weight of another: DoRA's, which take the norms of W + B A's rows in
    every forward.
    """
    for module in model.modules():
        if len(getattr(module, "lora_magnitude_vector", ())):
            layer: Any = module
            for owner in (layer.base_layer, layer.lora_A[NAME], layer.lora_B[NAME]):
                yield layer.lora_magnitude_vector[NAME], owner.weight


# ------------------------------------------------------------------------------- what becomes of it


@torch.no_grad()
def merged_weights(
    model: Any,
    gathered: Callable[..., AbstractContextManager[Any]] = lambda parameters: nullcontext(),
) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of the plain model that acts as this one, by its own names; one after the
    other, and each for as long as the next is not asked for. Of a model without an adapter they are
    its own.

    Weights are merged in fp32 and rounded once, to their own type. What lies in 4 bits is taken as
    what it stands for, which the adapter was trained on, and not as the weights it was made from.

    Args:
        gathered: holds parameters whole, where they lie in shards (engine.gathered); then every
            rank takes part.
    """
    from peft.tuners.lora import LoraLayer

    layers = {
        f"{name}.base_layer.weight": m
        for name, m in model.named_modules()
        if isinstance(m, LoraLayer)
    }
    for name, parameter in model.named_parameters():
        if is_of_adapter(name):
            continue
        layer: Any = layers.get(name)
        beside = (
            [p for part, p in layer.named_parameters() if is_of_adapter(f".{part}")]
            if layer
            else []
        )
        with gathered([parameter, *beside]):
            weight = _dequantised(parameter)
            merged = _merged(layer, weight).to(weight.dtype) if layer else weight
            yield name.replace(".base_layer.", "."), merged


def _merged(layer: Any, weight_OI: torch.Tensor) -> torch.Tensor:
    """(O, I) float32."""
    b_OR, a_RI = (getattr(layer, which)[NAME].weight.float() for which in ("lora_B", "lora_A"))
    merged_OI = weight_OI.float() + layer.scaling[NAME] * b_OR @ a_RI
    if NAME in layer.lora_magnitude_vector:
        merged_OI *= (
            layer.lora_magnitude_vector[NAME].weight.float() / merged_OI.norm(dim=1)
        ).unsqueeze(1)
    return merged_OI


def _dequantised(parameter: Any) -> torch.Tensor:
    """In the type that it had before it was put into 4 bits, and is computed in."""
    if getattr(parameter, "quant_state", None) is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state)


def in_peft_form(
    model: Any,
    section: AdapterSection,
    trained: Mapping[str, torch.Tensor],
    base: str,
    revision: str | None,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The configuration and the tensors that peft writes: those of the adapter, and of the modules
    trained whole.

    Args:
        trained: the trained parameters by name.
        base: the folder or hub name of the model that the adapter belongs to.
    """
    from peft import get_peft_model_state_dict

    whole = whole_modules(model, section)
    config = model.peft_config[NAME]
    config.base_model_name_or_path, config.revision = base, revision
    config.modules_to_save, config.inference_mode = whole or None, True
    mine = {name: tensor for name, tensor in trained.items() if is_of_adapter(name)}
    found = get_peft_model_state_dict(
        model, state_dict=mine, adapter_name=NAME, save_embedding_layers=False
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in whole:  # of two that share their weight each has it, as peft makes two of them
        for name, parameter in model.get_submodule(module).named_parameters():
            found[f"{module}.{name}"] = trained[names[id(parameter)]].clone()
    return config, {
        f"base_model.model.{name}": tensor.contiguous() for name, tensor in found.items()
    }
