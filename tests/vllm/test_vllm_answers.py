"""Answers of a real vLLM, started by the run itself and ended after each evaluation, are those of
the engine.

`make test-vllm` makes an environment that has vLLM for CPUs and names its Python in
PACKHORSE_VLLM_PYTHON.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.ranks import ROOT, run_ranks

pytestmark = pytest.mark.vllm

PYTHON = os.environ.get("PACKHORSE_VLLM_PYTHON", "")
# vLLM takes no heads of 16; weights so large that answers differ from prompt to prompt, and change
# in a step
SHAPE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
ADAPTER = ("adapter={rank: 8, modules_to_save: [lm_head]}", "optim.lr=0.1")
BY_VLLM = (f"eval.vllm_python={PYTHON}",)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run on two ranks at ZeRO-3, answered by the engine and by vLLM, with and without adapter."""
    assert PYTHON, "PACKHORSE_VLLM_PYTHON names no Python: make test-vllm"
    root = tmp_path_factory.mktemp("runs")
    shutil.copytree(ROOT / "recipes" / "debug" / "model", root / "model")
    config = json.loads((root / "model" / "config.json").read_text())
    (root / "model" / "config.json").write_text(
        json.dumps({**config, **SHAPE, "initializer_range": 0.3})
    )
    common = [
        f"model.name={root / 'model'}",
        f"data.cache={root / 'cache'}",
        "train.steps=1",
        "parallel.deepspeed=zero3",
    ]
    cases = {
        "engine": (),
        "vllm": BY_VLLM,
        "adapter, engine": ADAPTER,
        "adapter, vllm": (*ADAPTER, *BY_VLLM),
    }
    recipe = str(ROOT / "recipes" / "debug.yaml")
    order = [
        {"run": str(root / name), "recipe": recipe, "overrides": [*common, *own]}
        for name, own in cases.items()
    ]
    (root / "cases.json").write_text(json.dumps(order))
    run_ranks(2, ["-m", "tests.numerics.cases", str(root / "cases.json")], timeout_s=1200)
    return {name: root / name for name in cases}


def samples(run: Path) -> list[dict[str, Any]]:
    """Read the samples without a character that an answer's end cuts, which vLLM leaves out."""
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    return [{**line, "answer": line["answer"].rstrip("\ufffd")} for line in lines]


@pytest.mark.parametrize("what", ["", "adapter, "])
def test_vllms_answers_are_the_engines(runs: dict[str, Path], what: str) -> None:
    by_engine, by_vllm = samples(runs[f"{what}engine"]), samples(runs[f"{what}vllm"])
    assert by_vllm == by_engine
    before, after = (
        [sample["answer"] for sample in by_engine if sample["step"] == step] for step in (0, 1)
    )
    assert len(set(before)) > 1
    assert before != after, "else a vLLM that keeps old weights would pass"


def test_nothing_of_it_is_left(runs: dict[str, Path]) -> None:
    assert not (runs["vllm"] / "serving").exists()
    left = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in left if line and line[0] == PYTHON]
