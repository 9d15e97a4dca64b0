"""Start an adapter from an earlier one, in a folder as peft and `packhorse export` write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import AdapterSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.lora import Gathered, in_peft_form, is_of_adapter, not_in_shards
from packhorse.trainer.utils.download import local_folder


@torch.no_grad()
def start_adapter(model: Any, section: AdapterSection, gathered: Gathered = not_in_shards) -> None:
    """Give the model's adapter, and its modules trained in full, the values of an earlier one.

    They are rounded once, to the model's type. Every rank calls it.

    Args:
        section: its `init_from` names the folder.
        gathered: holds parameters whole inside its block (engine.gathered).

    Raises:
        BadInput: there is no adapter in the folder, or it has another rank, scale or form than the
            section, or other modules than the model's adapter.
    """
    from safetensors import safe_open

    assert section.init_from
    folder = local_folder(section.init_from, "adapter.init_from", weights=True)
    if folder is None or not (folder / "adapter_config.json").is_file():
        raise BadInput(
            f"adapter.init_from: {section.init_from} is no folder with an adapter (it has no "
            "adapter_config.json)"
        )
    _require_alike(section, folder)
    parameters = dict(model.named_parameters())
    trained = [n for n, p in parameters.items() if is_of_adapter(n) or p.requires_grad]
    # in_peft_form gives each tensor its name there: a number tells which parameter it is
    numbers = {name: torch.tensor(number) for number, name in enumerate(trained)}
    _, by_key = in_peft_form(model, section, numbers, "", None)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        if odd := sorted(by_key.keys() ^ set(file.keys())):
            lacks = "lacks" if odd[0] in by_key else "has, and this adapter has not,"
            raise BadInput(
                f"adapter.init_from: {folder} {lacks} `{odd[0]}` and {len(odd) - 1} others; give "
                "adapter.target_modules and modules_to_save as that adapter has them"
            )
        for key, number in by_key.items():
            parameter, value = parameters[trained[int(number)]], file.get_tensor(key)
            with gathered([parameter], write=True):
                # under ZeRO-3 only rank 0 holds it whole, and its changes are broadcast
                if parameter.numel():
                    parameter.copy_(value)
    dist.log.info("adapter: starts from the %d tensors in %s", len(by_key), folder)


def _require_alike(section: AdapterSection, folder: Path) -> None:
    """Raise BadInput if the folder's adapter computes otherwise than the section's."""
    theirs = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for key, ours, name in (
        ("r", section.rank, "adapter.rank"),
        ("lora_alpha", section.alpha, "adapter.alpha"),
        ("use_rslora", "rslora" in section.variants, "rslora in adapter.variants"),
        ("use_dora", "dora" in section.variants, "dora in adapter.variants"),
    ):
        if theirs.get(key, False) != ours:
            raise BadInput(
                f"{name}: it is {ours} here and {theirs.get(key, False)} in "
                f"{folder / 'adapter_config.json'} (adapter.init_from); make it the same"
            )
