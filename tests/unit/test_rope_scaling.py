"""`model.rope_scaling`: other rotary positions than the model's folder says, also in the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from packhorse.trainer.checkpoint.export_files import suit_transformers_4
from packhorse.trainer.config.recipe import ModelSection, load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.load import load_config
from packhorse.trainer.model.rope_scaling import require_rope
from tests.model_helpers import SIZES, WIDE, tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
KINDS = {
    "yarn": YARN,
    "the older name": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


def configured(config: Any, folder: Path, scaling: dict[str, Any] | None) -> Any:
    config.save_pretrained(folder)
    section = ModelSection.model_validate({"name": str(folder), "rope_scaling": scaling})
    return load_config(section)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_models_own_key(kind: str, tmp_path: Path) -> None:
    """As if the folder's config.json had it, by either name of the key."""
    given = KINDS[kind]
    theta: dict[str, Any] = {"rope_theta": 5e5}
    made = configured(tf.LlamaConfig(**SIZES, **theta), tmp_path, given)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    content.pop("rope_parameters")
    file.write_text(json.dumps({**content, "rope_theta": 5e5, "rope_scaling": given}))
    by_hand = load_config(ModelSection.model_validate({"name": str(tmp_path)}))
    positions = torch.arange(400)[None]
    of_both = [tiny(c).model.rotary_emb(torch.zeros(1), positions) for c in (made, by_hand)]
    assert torch.equal(*(torch.stack(table) for table in of_both))
    assert made.rope_parameters["rope_theta"] == 5e5


def test_an_export_has_it_by_both_names_of_the_key(tmp_path: Path) -> None:
    made = configured(tf.LlamaConfig(**SIZES), tmp_path / "model", YARN)
    tiny(made).config.save_pretrained(tmp_path / "out")
    suit_transformers_4(tmp_path / "out", False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_scaling"] == YARN
    assert YARN.items() <= written["rope_parameters"].items()


def test_layers_with_windows_keep_theirs(tmp_path: Path) -> None:
    config: Any = tf.Gemma3TextConfig(**WIDE, layer_types=["sliding_attention", "full_attention"])
    before = dict(config.rope_parameters["sliding_attention"])
    made = configured(config, tmp_path, KINDS["linear"])
    assert made.rope_parameters["sliding_attention"] == before
    assert made.rope_parameters["full_attention"]["factor"] == 2.0
    require_rope(tiny(made), "linear")


@pytest.mark.parametrize(
    ("config", "scaling", "message"),
    [
        (tf.LlamaConfig(**SIZES), {"rope_type": "yarm"}, "no kind `yarm`; transformers has"),
        (tf.LlamaConfig(**SIZES), {"rope_type": "yarn"}, "factor"),
        (tf.GPT2Config(n_layer=1), YARN, "gpt2 has no rotary positions"),
    ],
)
def test_what_the_model_cannot_have_is_refused(
    config: Any, scaling: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=rf"model\.rope_scaling: .*{message}"):
        configured(config, tmp_path, scaling)


def test_a_model_whose_code_ignores_it_is_refused() -> None:
    model = tiny(tf.LlamaConfig(**SIZES))
    with pytest.raises(
        BadInput, match=r"LlamaForCausalLM makes no rotary table of the kind `yarn`"
    ):
        require_rope(model, "yarn")


def test_a_scaling_without_a_kind_is_refused() -> None:
    with pytest.raises(BadInput, match="`rope_scaling` names no kind"):
        load_recipe("debug", ["model.rope_scaling={factor: 4}"])
