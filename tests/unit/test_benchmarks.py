"""The benchmarks' own code runs where there is no time to measure anything."""

from __future__ import annotations

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
