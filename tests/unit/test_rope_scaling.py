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

LONG = {"short_factor": [1.0], "long_factor": [2.0]}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"factor": -4.0}, "factor is -4.0, and no number above 0"),
    ({"factor": True}, "factor is True"),
    ({"factor": "4"}, "factor is '4'"),
    ({"factor": None}, "factor is None"),
    ({"factor": 0.5}, "factor field must be"),
    ({"typo_factor": 3.0}, "Unrecognized keys .*typo_factor"),
    ({"rope_theta": "abc"}, "rope_theta is 'abc'"),
    ({"partial_rotary_factor": 0.3}, "llama has partial_rotary_factor"),
]


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


def test_transformers_4_finds_yarns_factor_in_the_lengths(tmp_path: Path) -> None:
    made = configured(tf.LlamaConfig(**SIZES), tmp_path, YARN)
    assert made.max_position_embeddings == 4 * 256


@pytest.mark.parametrize(
    ("config", "scaling", "key", "value"),
    [
        (tf.Ministral3Config(), YARN, "llama_4_scaling_beta", 0.1),
        (
            tf.LlamaConfig(rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24]}),
            *(KINDS["linear"], "mrope_section", [16, 24, 24]),
        ),
        (
            tf.LlamaConfig(rope_parameters={**YARN, "beta_fast": 8.0}),
            KINDS["linear"],
            "beta_fast",
            None,
        ),
    ],
)
def test_what_the_model_reads_beside_the_table_stays(
    config: Any, scaling: dict[str, Any], key: str, value: Any, tmp_path: Path
) -> None:
    assert configured(config, tmp_path, scaling).rope_parameters.get(key) == value


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
        *((tf.LlamaConfig(**SIZES), YARN | bad, why) for bad, why in BAD),
        (tf.LlamaConfig(**SIZES), {"rope_type": "dynamic", "factor": 0.5}, "factor"),
        (tf.LlamaConfig(**SIZES), {"rope_type": "longrope", "factor": 2.0, **LONG}, "short_factor"),
        (
            tf.Phi3Config(pad_token_id=0, original_max_position_embeddings=4096),
            {
                **{
                    "rope_type": "longrope",
                    "factor": 2.0,
                    "original_max_position_embeddings": 8192,
                },
                **{"short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
            },
            "phi3 has original_max_position_embeddings = 4096 in any case",
        ),
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
