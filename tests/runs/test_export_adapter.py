"""An adapter, exported in peft's format or merged, gives the logits that it had in training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from packhorse.trainer.checkpoint.checkpoint import open_checkpoint
from packhorse.trainer.checkpoint.hf_export import TOLERANCE, _load_trained, export
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.metrics import EVALUATIONS
from packhorse.trainer.model.load import load_model, load_tokenizer
from packhorse.trainer.utils.json_lines import read_json_lines
from tests.model_helpers import relative
from tests.ranks import ROOT, run_ranks

pytestmark = pytest.mark.runs

ADAPTERS = {  # with the stages they are trained at
    "lora": ("zero3", "adapter={rank: 4, alpha: 8, dropout: 0.1, init_from: EARLIER}"),
    "whole": (
        "zero2",
        "adapter={rank: 4, target_modules: [q_proj, up_proj], variants: [rslora], modules_to_save: "
        "[embed_tokens, lm_head]}",
    ),
    "dora": ("zero3", "adapter={rank: 4, variants: [dora]}"),
    "nf4": ("zero2", "adapter={rank: 4, base: nf4_double_quant}"),
    "bf16": ("zero3", "adapter={rank: 4}"),
}
SCALING = {"rope_type": "linear", "factor": 4.0}  # of `lora`
FP32 = [name for name in ADAPTERS if name != "bf16"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Path]:
    """Train short runs on two ranks, from a base with a tied head and from one without."""
    cases = []
    for tied in (False, True):
        base = root / ("tied" if tied else "base")
        shutil.copytree(ROOT / "recipes" / "debug" / "model", base)
        settings = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": tied}))
        section = load_recipe(ROOT / "recipes" / "debug.yaml", [f"model.name={base}"]).model
        model = load_model(section, load_tokenizer(section), seed=3)
        model.save_pretrained(base)
    torch.manual_seed(0)
    start = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, start).save_pretrained(str(root / "earlier"))
    for name, (stage, adapter) in ADAPTERS.items():
        base = root / ("tied" if name == "whole" else "base")
        overrides = [
            *(
                "train.steps=3",
                "eval.every_steps=null",
                "optim.lr=3e-2",
                f"data.cache={root / 'cache'}",
            ),
            *(
                f"model.name={base}",
                "model.init=pretrained",
                f"parallel.deepspeed={stage}",
                adapter.replace("EARLIER", str(root / "earlier")),
            ),
            *(["model.dtype=bfloat16"] if name == "bf16" else []),
            *([f"model.rope_scaling={SCALING}"] if name == "lora" else []),
        ]
        cases.append(
            {
                "run": str(root / name),
                "recipe": str(ROOT / "recipes" / "debug.yaml"),
                "overrides": overrides,
            }
        )
    path = root / "cases.json"
    path.write_text(json.dumps(cases))
    run_ranks(2, ["-m", "tests.numerics.cases", str(path)], timeout_s=600)
    shutil.rmtree(root / "earlier")  # an export needs it no more
    return {name: root / name for name in ADAPTERS}


@pytest.fixture(scope="module")
def exported(runs: dict[str, Path], root: Path) -> dict[str, Path]:
    return {name: export(run, root / f"{name}-adapter") for name, run in runs.items()}


@pytest.fixture(scope="module")
def merged(runs: dict[str, Path], root: Path) -> dict[str, Path]:
    return {name: export(run, root / f"{name}-merged", merge=True) for name, run in runs.items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return (
            model.eval()(input_ids=torch.arange(10, 50).unsqueeze(0), use_cache=False)
            .logits[0]
            .float()
        )


def trained(run: Path) -> torch.Tensor:
    """Return the logits of the model as it was trained."""
    model = _load_trained(load_recipe(run / "recipe.yaml"), *open_checkpoint(run))
    model.set_attn_implementation("sdpa")
    return logits(model)


def plain(folder: Path | str, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **settings})


@pytest.mark.parametrize("name", ["lora", "whole", "dora"])
def test_the_adapter_on_its_base_gives_the_trained_models_logits(
    runs: dict[str, Path], exported: dict[str, Path], name: str
) -> None:
    config = json.loads((exported[name] / "adapter_config.json").read_text())
    folder, settings = config["base_model_name_or_path"], {}
    if name == "lora":
        assert f"`rope_parameters: {SCALING}`" in (exported[name] / "README.md").read_text()
        settings["rope_parameters"] = AutoConfig.from_pretrained(folder).rope_parameters | SCALING
    base = plain(folder, **settings)
    before = logits(base)
    after = logits(PeftModel.from_pretrained(base, str(exported[name])))
    assert relative(after, trained(runs[name])) < 1e-5
    assert relative(after, before) > 1e-2, "the adapter does nothing"


@pytest.mark.parametrize("name", FP32)
def test_the_merged_model_gives_the_trained_models_logits(
    runs: dict[str, Path], merged: dict[str, Path], name: str
) -> None:
    """A QLoRA adapter is merged into the dequantised base."""
    assert relative(logits(plain(merged[name])), trained(runs[name])) < 1e-5


def test_in_bf16_the_merged_model_stays_within_the_stated_tolerance(
    runs: dict[str, Path], merged: dict[str, Path], root: Path
) -> None:
    of_merged, of_base = (
        logits(plain(folder, dtype=torch.bfloat16)) for folder in (merged["bf16"], root / "base")
    )
    of_trained = trained(runs["bf16"])
    seen, control = relative(of_merged, of_trained), relative(of_base, of_trained)
    print(
        f"\n  bf16, merged against base and adapter: {seen:.1e}; the base alone: {control:.1e}",
        end="",
    )
    assert seen < TOLERANCE["bfloat16"]
    assert control > 3 * TOLERANCE["bfloat16"]


def test_a_4_bit_adapter_loads_onto_a_4_bit_base(
    runs: dict[str, Path], exported: dict[str, Path], root: Path
) -> None:
    """transformers quantises it to the base that the adapter was trained on."""
    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = plain(root / "base", quantization_config=bits, device_map="cpu")
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = (
                False  # a kernel of such CPUs computes in bf16 whatever is asked for
            )
    assert (
        relative(
            logits(PeftModel.from_pretrained(base, str(exported["nf4"]))), trained(runs["nf4"])
        )
        < 1e-5
    )


def test_the_export_holds_the_tokenizer_and_names_the_base(
    exported: dict[str, Path], root: Path
) -> None:
    folder = exported["lora"]
    assert AutoTokenizer.from_pretrained(folder).chat_template
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"{root / 'base'}, fine-tuned" in card
    assert "base_model:" not in card, "the hub refuses a folder there"


def test_the_matrices_are_the_fp32_masters_and_no_more(
    runs: dict[str, Path], exported: dict[str, Path]
) -> None:
    saved, _ = open_checkpoint(runs["bf16"])
    tensors = load_file(exported["bf16"] / "adapter_model.safetensors")
    assert len(tensors) == len(saved.names)
    for name in saved.names:
        found = tensors[f"base_model.model.{name.replace('.default', '')}"]
        assert found.dtype == torch.float32
        assert torch.equal(found, saved.whole(name))


def test_another_base_is_refused(runs: dict[str, Path], root: Path, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(runs["lora"], moved)
    other = tmp_path / "other"
    shutil.copytree(root / "base", other)
    model = plain(other)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(other)
    recipe = (moved / "recipe.yaml").read_text().replace(str(root / "base"), str(other))
    (moved / "recipe.yaml").write_text(recipe)
    with pytest.raises(BadInput, match=r"`model.norm.weight` .* has other values here"):
        export(moved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_with_nothing_to_merge_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["lora"], run)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("init: pretrained", "init: random"))
    with pytest.raises(BadInput, match=r"random weights, that no folder holds; add --merge"):
        export(run, tmp_path / "out")
    without = load_recipe(run / "recipe.yaml", ["adapter=null"])
    (run / "recipe.yaml").write_text(without.to_yaml())
    with pytest.raises(BadInput, match="has trained no adapter"):
        export(run, tmp_path / "out", merge=True)


def test_a_run_with_an_adapter_is_scored_as_its_training_scored_it(
    runs: dict[str, Path], root: Path
) -> None:
    """`packhorse eval` takes the model with the adapter merged."""
    given = [
        str(runs["lora"]),
        str(ROOT / "recipes" / "debug.yaml"),
        f"data.cache={root / 'cache'}",
    ]
    command = [
        sys.executable,
        "-m",
        "packhorse",
        "eval",
        *given,
        "--nproc",
        "1",
        "--out",
        str(root / "scored"),
    ]
    subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=600
    )
    (scored,), in_training = (
        read_json_lines(folder / EVALUATIONS) for folder in (root / "scored", runs["lora"])
    )
    assert scored["step"] == in_training[-1]["step"] == 3
    assert scored["eval_loss"] == pytest.approx(in_training[-1]["eval_loss"], rel=1e-5)
    assert scored["metrics"] == in_training[-1]["metrics"]
