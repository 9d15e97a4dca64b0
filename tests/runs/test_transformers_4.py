"""Exports load in transformers 4 with the logits and the tokens that they have in transformers 5.

python -m tests.runs.test_transformers_4 FOLDER   # trains and exports, under a launcher
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from packhorse.trainer import dist
from tests.models.sweep import try_model
from tests.ranks import ROOT, run_ranks

pytestmark = pytest.mark.runs

# their rotary embeddings, experts, windows or layers with a state are written in ways of their own
FAMILIES = (
    *("llama", "phi3", "qwen3_moe", "gemma2", "gemma3_text", "olmo3"),
    *("gpt_oss", "deepseek_v3", "glm4_moe", "smollm3", "cohere", "falcon_h1"),
)
TEXT = "<|im_start|>user a 12"
OF_4 = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
found = {}
for place in map(Path, sys.argv[2:]):
    out, seen = place / "zero0" / "export", load_file(place / "seen.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    with torch.no_grad():
        off = (model.eval()(seen["ids"]).logits - seen["logits"]).norm() / seen["logits"].norm()
    ids = AutoTokenizer.from_pretrained(out)(sys.argv[1]).input_ids
    found[place.name] = {
        "off": float(off),
        "same tokens": ids == seen["text"].tolist(),
        "loading": [name for name, values in info.items() if values],
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    root = tmp_path_factory.mktemp("exports")
    run_ranks(1, ["-m", "tests.runs.test_transformers_4", str(root)], timeout_s=900)
    wanted = ROOT / "tests" / "transformers4" / "requirements.txt"
    site = tmp_path_factory.mktemp("transformers4")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, "-r", str(wanted)], check=True)
    places = [str(root / name) for name in FAMILIES]
    done = subprocess.run(
        [sys.executable, "-c", OF_4, TEXT, *places],
        env=os.environ | {"PYTHONPATH": str(site)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_acts_alike_in_both_major_versions(found: dict[str, dict], name: str) -> None:
    seen = found[name]
    print(f"{name}: logits differ by {seen['off']:.1e}")
    assert seen["off"] < 1e-5
    assert seen["same tokens"]
    assert not seen["loading"], "weights are missing, left over or of another shape"


def main(root: Path) -> None:
    """Train each family for three steps, export it, and save what transformers 5 says of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.arange(5, 105)[None]
    for name in FAMILIES:
        place = root / name
        place.mkdir()
        result = try_model(name, place)
        assert result["works"] == "packed", result
        out = place / "zero0" / "export"
        model = AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            logits = model.eval()(ids).logits
        text = torch.tensor(AutoTokenizer.from_pretrained(out)(TEXT).input_ids)
        save_file({"ids": ids, "logits": logits, "text": text}, place / "seen.safetensors")


if __name__ == "__main__":
    with dist.process_group():
        main(Path(sys.argv[1]))
