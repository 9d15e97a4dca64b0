"""The benchmarks' own code runs where there is no time to measure anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import ROOT


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_every_arm_beside_trl_gets_the_type_that_is_asked_for(tmp_path: Path) -> None:
    import vs_trl

    (tmp_path / "data.jsonl").write_text("{}\n")
    given = ["--model", str(tmp_path), "--data", str(tmp_path / "data.jsonl")]
    made: Any = vs_trl.shared_job(vs_trl.parse(given), tmp_path)
    assert (made.dtype, made.seq_len, made.micro_batch_size) == ("bfloat16", 1024, 4)
    options = vs_trl.parse([*given, "--dtype", "float32", "--seq-len", "512"])
    job = vs_trl.shared_job(options, tmp_path)
    assert (job.dtype, job.seq_len) == ("float32", 512)
    assert vs_trl.trl_job("trl_best", job).dtype == "float32"
    assert vs_trl.trl_job("trl_autocast", made).dtype == "float32", "an arm's own type"
    vs_trl.packhorse_command(job, tmp_path, tmp_path / "cache")
    assert '"dtype": "float32"' in (tmp_path / "recipe.yaml").read_text()


def test_each_part_of_a_step_is_a_line_as_soon_as_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_parts

    monkeypatch.setattr(gpu_parts, "CALLS", 1)
    out = tmp_path / "parts.jsonl"
    broken, calls = gpu_parts.loss_part, []

    def counting(*given: Any) -> Any:
        calls.append(len(out.read_text().splitlines()))
        name, run, flops = broken(*given)
        return name, lambda: run() or 1 / 0, flops

    monkeypatch.setattr(gpu_parts, "loss_part", counting)
    lines = gpu_parts.main(["--tiny", "--out", str(out)])
    names = [line["part"] for line in lines]
    assert names == [
        *("products", "attention reference"),
        *(f"layer torch, {mode} recomputed" for mode in ("none", "selective", "full")),
        "loss chunked",
    ]
    assert [json.loads(line) for line in out.read_text().splitlines()] == lines
    assert calls == [5], "the lines before it were written"
    assert all(line["ms"] > 0 for line in lines[:5]), lines
    assert "ZeroDivisionError" in lines[5]["error"], "a part that fails"
