"""Start an adapter from an earlier one, in a folder as peft and `packhorse export` write it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import AdapterSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.lora import Gathered, in_peft_form, not_in_shards
from packhorse.trainer.utils.download import local_folder
from packhorse.trainer.utils.text import error_line

# Keys of adapter_config.json that change nothing in what given tensors compute. Which modules have
# an adapter shows in the tensors' names. A key that peft gets later is compared.
_IRRELEVANT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "modules_to_save", "lora_dropout"),
    *("target_parameters", "layers_to_transform", "layers_pattern", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "megatron_config", "megatron_core", "ensure_weight_tying"),
}
_IN_RECIPE = {
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "use_rslora": "rslora in adapter.variants",
    "use_dora": "dora in adapter.variants",
    "trainable_token_indices": "adapter.trainable_token_indices",
}
# how A was drawn; other ways, as PiSSA's, also changed the base's weights
_BASE_UNCHANGED = (True, False, "gaussian", "orthogonal", "eva")


@torch.no_grad()
def start_adapter(model: Any, section: AdapterSection, gathered: Gathered = not_in_shards) -> None:
    """Give the model's adapter, and its modules trained in full, the values of an earlier one.

    They are rounded once, to the model's type. Every rank calls it.

    Args:
        section: its `init_from` names the folder.
        gathered: holds parameters whole inside its block (engine.gathered).

    Raises:
        BadInput: there is no whole adapter in the folder, or it has another rank, scale or form
            than the section, or other modules or sizes than the model's adapter.
    """
    assert section.init_from
    folder = local_folder(section.init_from, "adapter.init_from", weights=True)
    if folder is None or not (folder / "adapter_config.json").is_file():
        raise BadInput(
            f"adapter.init_from: {section.init_from} is no folder with an adapter (it has no "
            "adapter_config.json)"
        )
    theirs, tensors = _read(folder)
    # a module trained in full brings its buffers, as a router's bias that no gradient reaches
    tensors_here = dict(chain(model.named_parameters(), model.named_buffers()))
    # in_peft_form gives each tensor its name there: a number tells which one it is
    numbers = {name: torch.tensor(number) for number, name in enumerate(tensors_here)}
    config, by_key = in_peft_form(model, section, numbers, "", None)
    names = list(tensors_here)
    mine = {key: tensors_here[names[int(number)]] for key, number in by_key.items()}
    _require_alike(config.to_dict(), theirs, folder)
    _require_same_tensors(mine, tensors, folder)
    for key, tensor in mine.items():
        with gathered([tensor], write=True):
            # under ZeRO-3 only rank 0 holds it whole, and its changes are broadcast
            if tensor.numel():
                tensor.copy_(tensors[key])
    dist.log.info("adapter: starts from the %d tensors in %s", len(mine), folder)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the configuration, with peft's defaults for what it leaves out, and the tensors."""
    from peft import LoraConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "adapter_config.json"
    try:
        theirs = {**LoraConfig().to_dict(), **json.loads(path.read_text(encoding="utf-8"))}
        path = folder / "adapter_model.safetensors"
        if not path.is_file():  # a pipe would be waited for without end
            raise OSError("there is no such file")
        return theirs, load_file(path)
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise BadInput(
            f"adapter.init_from: cannot read {path} ({error_line(error, 200)}); save the adapter "
            "with peft anew, or give another folder"
        ) from None


def _require_alike(ours: Mapping[str, Any], theirs: Mapping[str, Any], folder: Path) -> None:
    """Raise BadInput if the folder's adapter computes otherwise than the model's."""
    for key in sorted(theirs.keys() - _IRRELEVANT):
        mine, other = (_comparable(key, config.get(key)) for config in (ours, theirs))
        if mine != other:
            raise BadInput(
                f"{_IN_RECIPE.get(key, f'adapter.init_from: `{key}`')}: it is {mine} here and "
                f"{other} in {folder / 'adapter_config.json'} (adapter.init_from); make it the same"
            )


def _comparable(key: str, value: Any) -> Any:
    if key == "init_lora_weights" and value in _BASE_UNCHANGED:
        return True
    if key == "trainable_token_indices" and isinstance(value, dict):
        return next(iter(value.values()), None)  # a list means the embeddings', as ours are
    return value or False  # of what is not used: null, false or empty


def _require_same_tensors(
    mine: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """Raise BadInput if the folder has other tensors than the model's adapter, or other sizes."""
    if odd := sorted(mine.keys() ^ tensors.keys()):
        lacks = "lacks" if odd[0] in mine else "has, and this adapter has not,"
        raise BadInput(
            f"adapter.init_from: {folder} {lacks} `{odd[0]}` and {len(odd) - 1} others; give "
            "adapter.target_modules and modules_to_save as that adapter has them"
        )
    for key, parameter in mine.items():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if shape != tuple(tensors[key].shape):
            raise BadInput(
                f"adapter.init_from: `{key}` is {tuple(tensors[key].shape)} in {folder} and "
                f"{shape} here; give an adapter of this base model"
            )
