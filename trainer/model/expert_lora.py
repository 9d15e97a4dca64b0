"""LoRA on the matrices of experts, which transformers 5 holds as one parameter (E, M, N) for all.

In: a model and the recipe's adapter section. Out: the names for peft's `target_parameters`, and
their merged weights. peft wraps the module that holds the parameter, once for each parameter;
expert_weights.py adds scaling x B A of every expert to it in each forward:

    experts.down_proj (E, O, I)    ->    experts.base_layer.down_proj, frozen
                                         experts.lora_A.default.weight (R E, I)
                                         experts.lora_B.default.weight (O, R E)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from packhorse.trainer.config.recipe import AdapterSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.decoder import decoder_of
from packhorse.trainer.model.roles import EXPERTS, roles


def expert_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return the language model's parameters that hold the matrices of all experts of a layer."""
    role = roles(model)
    language = {id(parameter) for parameter in decoder_of(model).parameters()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if role[id(parameter)] == EXPERTS and id(parameter) in language
    }


def expert_targets(model: Any, section: AdapterSection, full: Sequence[str] = ()) -> list[str]:
    """Return the names of the parameters that `adapter.target_parameters` stands for.

    Args:
        full: modules that are trained in full, whose parameters all-experts leaves out.

    Raises:
        BadInput: the model has no such parameter, or it is trained in full.
    """
    there, wanted = expert_parameters(model), section.target_parameters
    if wanted == "all-experts":
        if not there:
            raise BadInput(
                f"adapter.target_parameters: {type(model).__name__} holds no experts in one "
                "parameter for all; where they are linear modules, adapter.target_modules has them"
            )
        return [name for name in there if not lies_in(name, full)]
    found: list[str] = []
    for one in wanted:
        matching = [name for name in there if name == one or name.endswith(f".{one}")]
        if not matching:
            example = f"; `{next(iter(there))}` is one" if there else "; it has none"
            raise BadInput(
                f"adapter.target_parameters: no parameter with experts' matrices is called "
                f"`{one}`{example}"
            )
        if twice := [name for name in matching if lies_in(name, full)]:
            raise BadInput(
                f"adapter.target_parameters: `{twice[0]}` is trained in full by "
                "adapter.modules_to_save; name it in one of them"
            )
        found += matching
    return list(dict.fromkeys(found))


def lies_in(name: str, modules: Iterable[str]) -> bool:
    """Return whether a module or parameter of this name is one of `modules`, or inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def wraps_parameter(module: Any) -> bool:
    """Return whether a module is peft's wrapper of one parameter."""
    return hasattr(module, "parameter_name") and hasattr(module, "lora_A")


def stacked_matrices(model: nn.Module) -> set[int]:
    """Return the ids of adapters' matrices that hold those of all experts, one beside the other."""
    wrappers: list[Any] = [module for module in model.modules() if wraps_parameter(module)]
    parts = [part for wrapper in wrappers for part in (wrapper.lora_A, wrapper.lora_B)]
    return {id(parameter) for part in parts for parameter in part.parameters()}


def parameter_name(name: str, module: Any) -> str:
    """Return the name, in the adapted model, of the parameter that a wrapper of this name adapts.

    Wrappers of two parameters of one module lie inside each other.
    """
    depth, inner = 1, module.base_layer
    while wraps_parameter(inner):
        depth, inner = depth + 1, inner.base_layer
    return f"{name}{'.base_layer' * depth}.{module.parameter_name}"


def plain_name(name: str) -> str:
    """Return the name that a parameter had before any wrapper."""
    return re.sub(r"\.base_layer(?=\.)", "", name)


def factors(wrapper: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return L (E, M, R), R (E, R, N) and the scale s of the adapter that a wrapper adds to its
    parameter: W + s L R. What has inputs first, as in gpt-oss, has A as L.
    """
    (adapter,) = wrapper.lora_A  # the model's only one
    a, b = (getattr(wrapper, which)[adapter].weight.to(dtype) for which in ("lora_A", "lora_B"))
    a_ERI = a.view(wrapper.num_experts, -1, a.shape[1])
    b_EOR = b.view(b.shape[0], -1, wrapper.num_experts).permute(2, 0, 1)
    swapped = wrapper._did_swap_in_out_features
    left, right = (b_EOR, a_ERI) if swapped else (a_ERI.mT, b_EOR.mT)
    return left, right, wrapper.scaling[adapter]


def merged_experts(wrapper: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return the experts' weights with the adapter of each added, in float32."""
    left, right, scale = factors(wrapper, torch.float32)
    return torch.baddbmm(weight.float(), left, right, alpha=scale)
