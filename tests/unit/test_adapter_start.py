"""An adapter starts from an earlier one's folder, or the folder is refused in a sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from packhorse.trainer.build_engine import _adapter
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.adapter_start import start_adapter
from packhorse.trainer.model.lora import in_peft_form
from tests.model_helpers import relative
from tests.ranks import ROOT
from tests.unit.test_lora import adapted, logits, section, stir

TENSORS = "adapter_model.safetensors"


def saved(folder: Path, fields: dict[str, Any]) -> Any:
    """Save an adapter that has learned something as peft does, and return its model."""
    earlier = stir(adapted(**fields))
    with torch.no_grad():
        if earlier.lm_head.weight.requires_grad:
            earlier.lm_head.weight += 0.1
    trained = {n: p.detach() for n, p in earlier.named_parameters() if p.requires_grad}
    config, tensors = in_peft_form(earlier, section(**fields), trained, "base", None)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / TENSORS)
    return earlier


@pytest.mark.parametrize("variants", [[], ["dora"]], ids=["lora", "dora"])
def test_an_adapter_starts_from_an_earlier_ones_folder(tmp_path: Path, variants: list[str]) -> None:
    fields: dict[str, Any] = {"variants": variants, "modules_to_save": ["lm_head"]}
    earlier = saved(tmp_path, fields)
    later, fields = adapted(seed=5, **fields), {**fields, "init_from": str(tmp_path)}
    assert relative(logits(later), logits(earlier)) > 1e-2
    start_adapter(later, section(**fields))
    assert torch.equal(logits(later), logits(earlier))
    for changes, fault in (
        ({"rank": 8}, "adapter.rank: it is 8 here and 4 in"),
        ({"alpha": 9}, "adapter.alpha: it is 9 here and 8 in"),
        ({"variants": ["rslora", *variants]}, "rslora in adapter.variants: it is True here"),
        ({"target_modules": ["q_proj"]}, "has, and this adapter has not,"),
        ({"modules_to_save": []}, "has, and this adapter has not,"),
        ({"init_from": str(tmp_path / "none")}, "there is no folder"),
    ):
        others = {**fields, **changes}
        with pytest.raises(BadInput, match=fault):
            start_adapter(adapted(**others), section(**others))


def changed(**keys: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return change


def narrow(folder: Path) -> None:
    """Cut a matrix to one row, which would be copied into each."""
    tensors = load_file(folder / TENSORS)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: tensors[name][:1].clone()}, folder / TENSORS)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tensors": (lambda f: (f / TENSORS).unlink(), "cannot read .*adapter_model.safetensors"),
    "a pipe": (
        lambda f: ((f / TENSORS).unlink(), os.mkfifo(f / TENSORS)),
        "cannot read .*adapter_model.safetensors",
    ),
    "cut tensors": (lambda f: (f / TENSORS).write_bytes(b"1234"), "cannot read .*adapter_model"),
    "cut": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot read .*_config.json"),
    "deep": (
        lambda f: (f / "adapter_config.json").write_text("[" * 99_999),
        "cannot read .*_config.json .RecursionError",
    ),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[1]"), "cannot read .*_config"),
    "row": (narrow, r"`base_model.*lora_A.weight` is \(1, \d+\) in .* and \(4, \d+\) here"),
    "alpha_pattern": (changed(alpha_pattern={"q_proj": 400}), "`alpha_pattern`: it is False here"),
    "rank_pattern": (changed(rank_pattern={"q_proj": 2}), "`rank_pattern`: it is False here"),
    "pissa": (changed(init_lora_weights="pissa"), "`init_lora_weights`: it is True here and pissa"),
    "other kind": (changed(peft_type="LOHA"), "`peft_type`"),
    "tokens": (
        changed(trainable_token_indices={"embed_tokens": [9, 3]}),
        r"trainable_token_indices: it is \[3, 7\] here and \[9, 3\] in",
    ),
    "new": (changed(use_next_lora=True), "`use_next_lora`: it is False here and True"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_would_act_otherwise_is_refused(tmp_path: Path, fault: str) -> None:
    fields: dict[str, Any] = {"trainable_token_indices": [7, 3], "target_modules": ["q_proj"]}
    saved(tmp_path, fields)
    fields["init_from"] = str(tmp_path)
    model, (change, words) = adapted(seed=5, **fields), FAULTS[fault]
    before = logits(model)
    change(tmp_path)
    with pytest.raises(BadInput, match=words):
        start_adapter(model, section(**fields))
    assert torch.equal(logits(model), before)


def test_an_adapter_of_a_model_of_another_width_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, {})
    with pytest.raises(BadInput, match="give an adapter of this base model"):
        start_adapter(adapted(model={"hidden_size": 64}), section(init_from=str(tmp_path)))


def test_keys_that_change_no_number_are_left_alone(tmp_path: Path) -> None:
    earlier = saved(tmp_path, {})
    path = tmp_path / "adapter_config.json"
    few = ("r", "lora_alpha", "peft_type", "target_modules")
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key in few}
    path.write_text(json.dumps({**kept, "init_lora_weights": "gaussian", "lora_dropout": 0.5}))
    later = adapted(seed=5)
    start_adapter(later, section(init_from=str(tmp_path)))
    assert torch.equal(logits(later), logits(earlier))


def test_a_run_with_a_checkpoint_does_not_ask_for_the_folder(tmp_path: Path) -> None:
    folder = str(tmp_path / "gone")
    changes = [f"adapter={{rank: 4, init_from: {folder}}}", f"run.dir={tmp_path}"]
    recipe = load_recipe(ROOT / "recipes" / "debug.yaml", changes)
    (tmp_path / "checkpoints" / "step-000002-copy").mkdir(parents=True)
    new = _adapter(recipe, tmp_path)
    (tmp_path / "checkpoints" / "step-000002").mkdir()
    resumed = _adapter(recipe, tmp_path)
    assert new
    assert resumed
    assert recipe.adapter
    assert (new.init_from, resumed.init_from) == (folder, None)
    assert resumed == recipe.adapter.model_copy(update={"init_from": None})
