"""Train a LoRA adapter: small matrices beside a model's linear modules; the model is frozen.

LoRA: Hu et al., 2021, arXiv:2106.09685.

In: a transformers model and the recipe's adapter section. Out: the same model, changed in place by
peft. It is not wrapped, so that all code that knows the model still does:

    q_proj.weight (O, I)    ->    q_proj.base_layer.weight, frozen; in 4 bits under QLoRA
                                  q_proj.lora_A.default.weight (R, I)
                                  q_proj.lora_B.default.weight (O, R)

A weight W acts as W + alpha / R x B A. B starts at zero, A follows from (seed, name): alike at
every world size and stage. Everything is in the model's type, and the optimizer keeps fp32 master
weights of what is trained, as it does for a whole model.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from itertools import chain
from typing import Any

import torch
from torch import nn

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import AdapterSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.expert_lora import (
    expert_parameters,
    expert_targets,
    lies_in,
    merged_experts,
    parameter_name,
    plain_name,
    wraps_parameter,
)
from packhorse.trainer.model.expert_weights import make_where_they_run, packable_experts
from packhorse.trainer.model.linear_modules import linear_modules, read_by
from packhorse.trainer.model.peft_names import (
    hide_from_conversion,
    names_kept,
    require_wrapped,
    why_merged_only,
)
from packhorse.trainer.model.quantisation import BLOCK, dequantise, numel, quantise
from packhorse.trainer.model.token_rows import ROWS, add_rows, indices, merged_rows, with_rows
from packhorse.trainer.utils.time_limit import names_matching

# what a layer of peft holds of an adapter
_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")
NAME = "default"  # peft's name of a model's only adapter; a part of parameters' names

Gathered = Callable[..., AbstractContextManager[Any]]
"""`gathered(parameters, write=True)` holds parameters whole inside its block, where ZeRO-3 has them
in shards, and hands rank 0's changes to all ranks (engine.gathered). Every rank enters it."""


def not_in_shards(parameters: Any, write: bool = False) -> AbstractContextManager[Any]:
    """Stand in for `gathered` where every rank holds the parameters whole."""
    return nullcontext()


def add_adapter(
    model: Any, section: AdapterSection, seed: int, gathered: Gathered = not_in_shards
) -> None:
    """Put the adapter into the model, freeze the rest, and log how much is trained.

    On the meta device nothing is quantised. Under ZeRO-3 it runs inside the context in which
    transformers loads in shards, as DoRA gathers the weights to take their norms.

    Raises:
        BadInput: a module that the recipe names does not exist or cannot have an adapter, or
            bitsandbytes is missing.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets, full = adapter_targets(model, section), full_modules(model, section)
    of_experts = expert_targets(model, section, full)
    if section.base and not next(model.parameters()).is_meta:
        linear = [name for name in linear_modules(model) if not lies_in(name, full)]
        quantise(model, linear, section.base, gathered)
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        target_modules=targets,
        target_parameters=of_experts or None,
        lora_dropout=section.dropout,
        use_rslora="rslora" in section.variants,
        use_dora="dora" in section.variants,
        task_type="CAUSAL_LM",
    )
    with names_kept():
        inject_adapter_in_model(config, model, adapter_name=NAME)
    require_wrapped(model, [*targets, *of_experts])
    if section.trainable_token_indices:
        add_rows(model, section.trainable_token_indices, full, gathered)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_of_adapter(name) or lies_in(name, full))
        if is_of_adapter(name) and parameter.dtype != model.dtype:  # beside a quantised weight
            parameter.data = parameter.data.to(model.dtype)
    if section.base and not next(model.parameters()).is_meta:
        # not before: peft reads the shapes of the parameters that it wraps
        quantise(model, packable_experts(model, section.base), section.base, gathered)
    make_where_they_run(model)
    with torch.no_grad():
        # peft has left B at zero, and has set DoRA's magnitudes to the norms of the weights' rows
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                # as nn.Linear draws its weight; on the CPU in fp32 from its own seed, so that no
                # device, world size or order matters
                generator = torch.Generator().manual_seed(dist.seed_from(seed, "adapter", name))
                bound = 1 / math.sqrt(parameter.shape[1])
                drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                parameter.copy_(drawn)
    _log(model, section, [*targets, *of_experts], full)


def _log(model: Any, section: AdapterSection, targets: list[str], full: list[str]) -> None:
    of_experts = [name for name in targets if name not in dict(model.named_modules())]
    total = sum(numel(parameter) for parameter in model.parameters())
    trained = sum(numel(parameter) for parameter in model.parameters() if parameter.requires_grad)
    dist.log.info(
        "adapter: rank %d beside %d modules%s%s; %.2f%% of %.3g billion weights are trained",
        *(section.rank, len(targets) - len(of_experts)),
        f" and {len(of_experts)} parameters of experts" if of_experts else "",
        f", {len(full)} trained in full" if full else "",
        100 * trained / total,
        total / 1e9,
    )
    experts = {
        name: numel(parameter)
        for name, parameter in expert_parameters(model).items()
        if not parameter.requires_grad and plain_name(name) not in targets
    }
    if experts:
        dist.log.warning(
            "adapter: experts are not adapted: `%s` and %d parameters like it, %.0f%% of the "
            "weights. Set adapter.target_parameters=all-experts",
            *(plain_name(next(iter(experts))), len(experts) - 1),
            100 * sum(experts.values()) / total,
        )
    packed = packable_experts(model, section.base)
    left = {
        n: p for n, p in expert_parameters(model).items() if not (p.requires_grad or n in packed)
    }
    if section.base and left:
        dist.log.warning(
            "adapter.base: experts stay in model.dtype, `%s` and %d parameters like it, %.0f%% of "
            "the weights: their rows are no multiple of %d weights; int8 takes them",
            *(plain_name(next(iter(left))), len(left) - 1),
            *(100 * sum(map(numel, left.values())) / total, BLOCK),
        )
    if why := why_merged_only(model):
        dist.log.warning("adapter: it can be exported with --merge only, as %s", why)


def is_of_adapter(name: str) -> bool:
    """Return whether a parameter of this name is one that peft added."""
    return ".lora_" in name or name.endswith(f".{ROWS}")


# ------------------------------------------------------------------------------------ which modules


def adapter_targets(model: Any, section: AdapterSection) -> list[str]:
    """Return the names of the linear modules that get an adapter.

    Raises:
        BadInput: a name or pattern matches no module, one that is not linear, the head, or one
            that is trained in full.
    """
    linear, full = linear_modules(model), full_modules(model, section)
    if section.target_modules == "all-linear":
        found = [name for name in linear if not lies_in(name, full)]
        if not found:
            raise BadInput(
                f"adapter.target_modules: {type(model).__name__} has no linear modules; train all "
                "its weights"
            )
        return found
    is_pattern = isinstance(section.target_modules, str)
    wanted = [section.target_modules] if is_pattern else section.target_modules
    found = []
    for one in map(str, wanted):
        found += _linear_matches(model, one, is_pattern, linear)
    found = list(dict.fromkeys(found))
    twice = [name for name in found if lies_in(name, full)]
    if twice:
        raise BadInput(
            f"adapter.target_modules: `{twice[0]}` is trained in full by adapter.modules_to_save; "
            "name it in one of them"
        )
    return found


def _linear_matches(
    model: Any, wanted: str, is_pattern: bool, linear: Mapping[str, nn.Linear]
) -> list[str]:
    """Return the linear modules that a name or pattern of the recipe stands for.

    Of a module that holds others, as `self_attn`, the linear ones inside are not meant.
    """
    matching = _matching(wanted, is_pattern, dict(model.named_modules()))
    if not matching:
        what = "no module's whole name matches" if is_pattern else "no module is called"
        raise BadInput(f"adapter.target_modules: {what} `{wanted}`; {_nearest(wanted, linear)}")
    found = [name for name in matching if name in linear]
    head = model.get_output_embeddings()
    for name in matching:
        if model.get_submodule(name) is head:
            raise BadInput(
                f"adapter.target_modules: `{name}` is the head, whose loss is fused and would not "
                "see an adapter; put it into adapter.modules_to_save, which trains it in full"
            )
    elsewhere = {id(m): reader for reader in model.modules() for m in read_by(reader)}
    for name in matching:
        if reader := elsewhere.get(id(model.get_submodule(name))):
            raise BadInput(
                f"adapter.target_modules: {type(reader).__name__} reads the weight of `{name}` "
                "itself and would not see an adapter; put it into adapter.modules_to_save, which "
                "trains it in full"
            )
    embeddings = [n for n in matching if isinstance(model.get_submodule(n), nn.Embedding)]
    if embeddings or not found:
        name = [*embeddings, *matching][0]
        raise BadInput(
            f"adapter.target_modules: `{name}` is of the type "
            f"{type(model.get_submodule(name)).__name__}, and an adapter is put beside linear "
            "modules of the language model only; name those, or put it into adapter.modules_to_save"
        )
    return found


def full_modules(model: Any, section: AdapterSection) -> list[str]:
    """Return the names of the modules that are trained in full (adapter.modules_to_save).

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
    if embedding.weight is head.weight:
        tied = {name for name, module in modules.items() if module is embedding or module is head}
        named = {name for name in tied if lies_in(name, found)}
        if len(named) == 1:
            raise BadInput(
                f"adapter.modules_to_save: `{min(named)}` shares its weight with "
                f"`{min(tied - named)}`; name both, or neither"
            )
    return found


def _matching(wanted: str, is_pattern: bool, names: Iterable[str]) -> list[str]:
    if is_pattern:
        return names_matching("adapter.target_modules", wanted, names, re.fullmatch)
    return [name for name in names if name == wanted or name.endswith(f".{wanted}")]


def _nearest(wanted: str, names: Iterable[str]) -> str:
    ends = {name.rsplit(".", 1)[-1] for name in names}
    candidates = sorted(name for name in (*names, *ends) if not name.isdigit())
    near = difflib.get_close_matches(wanted, candidates, n=1, cutoff=0.0)
    return f"the nearest is `{near[0]}`" if near else "it has none"


def borrowed_weights(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Yield modules with the weights of other modules that they use.

    They are DoRA's, which take the norms of the rows of W + B A in every forward, and wrappers of
    experts' parameters.
    """
    for module in model.modules():
        if wraps_parameter(module):
            wrapper: Any = module
            for owner in (wrapper.lora_A[NAME], wrapper.lora_B[NAME]):
                yield wrapper, owner.weight
            yield wrapper, wrapper.get_param()
        if len(getattr(module, "lora_magnitude_vector", ())):
            layer: Any = module
            for owner in (layer.base_layer, layer.lora_A[NAME], layer.lora_B[NAME]):
                yield layer.lora_magnitude_vector[NAME], owner.weight


# --------------------------------------------------------------------------------- merged, exported


@torch.no_grad()
def merged_weights(
    model: Any, gathered: Gathered = not_in_shards
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters of the plain model that acts as this one, by the plain model's names.

    A model without an adapter yields its own. Each tensor is valid until the next is asked for.
    Weights are merged in fp32 and rounded once, to their own type. A base in 4 bits is read back
    from them, as the adapter was trained on those numbers and not on the original ones.
    """
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {
        parameter_name(name, module)
        if wraps_parameter(module)
        else f"{name}.base_layer.weight": module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    layers |= {f"{name}.weight": module for name, module in with_rows(model)}
    for name, parameter in model.named_parameters():
        if is_of_adapter(name):
            continue
        layer = layers.get(name)
        parts = [getattr(layer, kind, None) for kind in _PARTS]
        adapters = [p for part in parts if part is not None for p in part.parameters()]
        if isinstance(layer, nn.Embedding):
            adapters.append(getattr(layer, ROWS))
        with gathered([parameter, *adapters]):
            weight = dequantise(parameter)
            merged = _merged(layer, weight).to(weight.dtype) if layer else weight
            yield plain_name(name), merged


def _merged(layer: Any, weight_OI: torch.Tensor) -> torch.Tensor:
    """Return W + scaling x B A, (O, I) float32; under DoRA with rows of the trained magnitudes."""
    if isinstance(layer, nn.Embedding):
        return merged_rows(layer, weight_OI)
    if wraps_parameter(layer):
        return merged_experts(layer, weight_OI)
    b_OR, a_RI = (getattr(layer, which)[NAME].weight.float() for which in ("lora_B", "lora_A"))
    merged_OI = weight_OI.float() + layer.scaling[NAME] * b_OR @ a_RI
    if NAME in layer.lora_magnitude_vector:
        magnitudes_O = layer.lora_magnitude_vector[NAME].weight.float()
        merged_OI *= (magnitudes_O / merged_OI.norm(dim=1)).unsqueeze(1)
    return merged_OI


def in_peft_form(
    model: Any,
    section: AdapterSection,
    trained: Mapping[str, torch.Tensor],
    base: str,
    revision: str | None,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the configuration and tensors as peft saves them: adapter, and modules in full.

    Args:
        trained: the trained parameters, and the buffers of modules in full, by name.
        base: the folder or hub name of the model that the adapter belongs to.
    """
    from peft import get_peft_model_state_dict

    full = full_modules(model, section)
    config = copy(model.peft_config[NAME])
    config.base_model_name_or_path, config.revision = base, revision
    config.modules_to_save, config.inference_mode = full or None, True
    hide_from_conversion(config, model)
    mine = {name: tensor for name, tensor in trained.items() if is_of_adapter(name)}
    found = get_peft_model_state_dict(
        model, state_dict=mine, adapter_name=NAME, save_embedding_layers=False
    )
    names = {id(t): name for name, t in chain(model.named_parameters(), model.named_buffers())}
    for module in full:
        for name, tensor in model.get_submodule(module).state_dict(keep_vars=True).items():
            # of two modules that share their weight each gets a copy: peft loads them as two
            found[f"{module}.{name}"] = trained[names[id(tensor)]].clone()
    for name, embedding in with_rows(model):
        config.trainable_token_indices = {name.rpartition(".")[2]: indices(embedding)}
        found[f"{name}.token_adapter.{ROWS}"] = trained[f"{name}.{ROWS}"]
    return config, {
        f"base_model.model.{name}": tensor.contiguous() for name, tensor in found.items()
    }
