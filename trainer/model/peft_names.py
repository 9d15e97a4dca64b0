"""Let peft take the names of an adapter's modules as they are.

peft 0.21 reads names of transformers 4: where a family's experts were linear modules once, it takes
`gate_proj`, `up_proj`, `down_proj` and `gate`, also those of a shared expert or a dense layer, for
the experts' matrices of transformers 5, adapts these at twice the rank, and leaves the modules out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.expert_lora import parameter_name, plain_name, wraps_parameter
from packhorse.trainer.model.rescaling import is_rescaled
from packhorse.trainer.utils.lean_import import replaced


@contextmanager
def names_kept() -> Iterator[None]:
    """Let peft put adapters on what its configuration names, inside the block."""
    from peft.utils import transformers_weight_conversion as conversion

    with replaced(conversion, "convert_peft_config_for_transformers", lambda *_, **__: None):
        yield


def require_wrapped(model: Any, names: Collection[str]) -> None:
    """Raise BadInput if peft has put adapters on other modules and parameters than these."""
    from peft.tuners.lora import LoraLayer

    wrapped = {
        plain_name(parameter_name(name, module)) if wraps_parameter(module) else name
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    if odd := sorted(wrapped ^ set(names)):
        what = "an adapter beside" if odd[0] in wrapped else "no adapter beside"
        raise BadInput(
            f"adapter: the installed peft puts {what} `{odd[0]}` and differs in "
            f"{len(odd) - 1} more; install the peft that packhorse names, 0.21"
        )


def why_merged_only(model: Any) -> str | None:
    """Return why peft could not load the model's adapter as it was trained; None, if it can."""
    (config,) = model.peft_config.values()
    if config.use_dora and (taken := _taken_for_experts(config, model)):
        return (
            f"peft takes `{min(taken)}` for an expert of transformers 4 and has no DoRA for those"
        )
    if any(map(is_rescaled, model.modules())):
        return (
            f"{type(model).__name__} in transformers halves weights of later layers in evaluation "
            "and not what peft puts beside them; `rescale_every: 0` in the base's config.json "
            "ends that"
        )
    return None


def _taken_for_experts(config: Any, model: Any) -> set[str]:
    return {name for name in config.target_modules if _is_converted(name, model)}


def hide_from_conversion(config: Any, model: Any) -> None:
    """Name modules whose names peft would take for experts by their weight, as a parameter.

    What peft then builds has the same tensors and computes the same, but under DoRA, which peft has
    for no parameter.
    """
    taken = _taken_for_experts(config, model)
    config.target_modules = set(config.target_modules) - taken
    if taken:
        # peft has none for a parameter, and an adapter that is not trained makes no use of it
        config.lora_dropout = 0.0
        named = {*(config.target_parameters or ()), *(f"{name}.weight" for name in taken)}
        config.target_parameters = sorted(named)


def _is_converted(name: str, model: Any) -> bool:
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    alone = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(alone, model, None)
    except ValueError:  # it asks for the other half of what it would make one of
        return True
    return set(alone.target_modules or ()) != {name}
