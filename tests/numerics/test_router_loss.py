"""The loss that balances experts is the same however a step is cut (X2), and logged alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.shrunk import config_of
from tests.numerics.compare import Run, case, difference, report, run_cases
from tests.ranks import ROOT

pytestmark = pytest.mark.runs

QWEN3_MOE = {
    **{"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]},
    **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    **{"decoder_sparse_step": 1, "mlp_only_layers": []},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("routers")
    shutil.copytree(ROOT / "recipes" / "debug" / "model", root / "model")
    config = json.loads((root / "model" / "config.json").read_text())
    (root / "model" / "config.json").write_text(json.dumps({**config, **QWEN3_MOE}))
    shutil.copytree(ROOT / "recipes" / "debug" / "model", root / "biased")
    torch.manual_seed(0)
    biased = AutoModelForCausalLM.from_config(config_of("deepseek_v3"), dtype=torch.float32)
    for name, buffer in biased.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.3)
    biased.save_pretrained(root / "biased")
    return root


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Run]:
    model = (f"model.name={root / 'model'}", "optim.lr=3e-3")
    balanced = (*model, "loss.router_aux=0.1")
    ring = ("parallel.sequence=3", "parallel.sequence_kind=ring")
    biased = (f"model.name={root / 'biased'}", "model.init=pretrained", *balanced[1:])
    by_micro_batch = ["routers_balanced_by_micro_batch"]
    one = [
        case(root, "1", "zero0", *balanced, "batch.micro_batch_size=2"),
        case(root, "1-logged", "zero0", *model, "loss.router_aux=0"),
        case(root, "1-off", "zero0", *model),
        case(root, "biased-1", "zero0", *biased, "batch.micro_batch_size=2"),
    ]
    three = [
        case(root, "3-zero2", "zero2", *balanced, "model.activation_checkpointing=full"),
        case(root, "3-zero3", "zero3", *balanced),
        case(root, "3-slices", "zero3", *balanced, "parallel.sequence=3"),
        case(root, "3-ring", "zero2", *balanced, *ring, changes=["short_zigzag"]),
        case(root, "biased-3", "zero3", *biased),
        case(root, "3-defect", "zero2", *balanced, changes=by_micro_batch),
    ]
    return run_cases({1: one, 3: three})


@pytest.mark.parametrize("other", ["3-zero2", "3-zero3", "3-slices", "3-ring"])
def test_worlds_micro_batches_and_stages_change_nothing(
    runs: dict[str, Run], root: Path, other: str
) -> None:
    seen = difference(runs["1"], runs[other])
    report(f"1 rank against {other}", seen)
    assert seen.agrees
    for one, three in zip(router_lines(root, "1"), router_lines(root, other), strict=True):
        assert one == pytest.approx(three, rel=1e-5)


def test_a_router_with_a_bias_learns_the_same_everywhere(runs: dict[str, Run], root: Path) -> None:
    seen = difference(runs["biased-1"], runs["biased-3"])
    report("with a bias, 1 rank against 3 at stage 3", seen)
    assert seen.agrees
    for one, three in zip(router_lines(root, "biased-1"), router_lines(root, "biased-3")):
        assert one == pytest.approx(three, rel=1e-5)
        # the bias, which stays, sends other experts more tokens than the scores alone
        assert one["train/router_peak_load"] > 1.2


def test_a_loss_over_micro_batches_is_caught(runs: dict[str, Run]) -> None:
    seen = difference(runs["1"], runs["3-defect"])
    report("control, by micro-batch", seen)
    assert seen.is_caught


def test_the_coefficient_moves_the_router_and_zero_only_logs(
    runs: dict[str, Run], root: Path
) -> None:
    assert difference(runs["1"], runs["1-off"]).is_caught
    assert runs["1-logged"].losses == runs["1-off"].losses
    assert not any(router_lines(root, "1-off"))
    for line in (*router_lines(root, "1"), *router_lines(root, "1-logged")):
        assert 1.9 < line["train/router_aux"] < 8
        assert 0.5 < line["train/router_entropy"] <= 1
        assert 1 <= line["train/router_peak_load"] <= 4


def router_lines(root: Path, run: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (root / run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if "router" in name}
        for line in lines
        if "train/loss" in line
    ]
