"""SmolLM2-135M on gsm8k starts with the loss that transformers computes. `make demo` trains it."""

import runpy
from pathlib import Path

import pytest
import torch

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import parse_recipe
from packhorse.trainer.data import loader, prepare
from packhorse.trainer.data.eval_plan import eval_plan
from packhorse.trainer.model.load import load_model, load_tokenizer
from packhorse.trainer.model.packing_check import prove_packing
from packhorse.trainer.model.sft import SftModel
from tests.ranks import ROOT

pytestmark = pytest.mark.runs

REFERENCE_LOSS = (
    1.4604  # of the untouched model, by transformers alone; see the folder of shared data
)
REFERENCE_TOKENS = 6215  # end token and the newline after it counted


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, as the demo fetches it."""
    folder = Path("~/.cache/packhorse/models/smollm2-135m-instruct").expanduser()
    runpy.run_path(str(ROOT / "recipes" / "quickstart" / "get_smollm2.py"))["get"](folder)
    return folder


def test_the_untouched_model_has_the_loss_that_transformers_gives_it(
    shared: Path, smollm2: Path, tmp_path: Path
) -> None:
    """gsm8k_test's first 48 rows under SmolLM2's own template, fp32. Our policy leaves the newline
    after the end token out; the reference counts it, so here it is counted."""
    made = parse_recipe(
        {
            "model": {"name": str(smollm2), "dtype": "float32"},
            "data": {
                "train": [{"path": str(shared / "data" / "gsm8k_train.jsonl")}],
                "eval": [{"path": str(shared / "data" / "gsm8k_test.jsonl"), "rows": 48}],
                "train_on_eot": "with_newline",
                "cache": str(tmp_path / "cache"),
            },
            "batch": {"seq_len": 512, "global_batch_size": 2},
            "run": {"dir": str(tmp_path / "run")},
        }
    )
    tokenizer = load_tokenizer(made.model)
    data = prepare.prepare(made, tokenizer, "eval")
    assert int(data.documents.trained_counts.sum()) == REFERENCE_TOKENS
    model = load_model(made.model, tokenizer, seed=0)
    sft = SftModel(model, made.loss, 0, dist.device())
    prove_packing(sft, seq_len=512, one_document=False, seed=0)
    sft.eval()
    with (
        torch.no_grad(),
        loader.Loader(data, eval_plan(made, data).plan, 0, 1, pin=False) as batches,
    ):
        loss = sum(float(sft(batch)) for batch in batches.stream(0))
    print(f"\n  held-out loss {loss:.4f}, by transformers alone {REFERENCE_LOSS}", end="")
    assert abs(loss - REFERENCE_LOSS) <= 0.002
