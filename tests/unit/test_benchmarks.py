"""The benchmarks' own code runs where there is no time to measure anything."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from packhorse.trainer import attention_choice
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


def test_the_longest_sequence_is_found_by_doubling() -> None:
    import gpu_longest

    found = list(gpu_longest.lengths(True, budget_s=600, limit=10 * 2**20))
    *fitted, end = found
    tokens = [line["tokens"] for line in found]
    assert tokens == [256 * 2**n for n in range(len(found))]
    assert all(line["peak_gib"] <= 0.01 and line["seconds"] > 0 for line in fitted)
    assert end == {"tokens": tokens[-1], "ended": "out of memory"}
    assert list(gpu_longest.lengths(True, budget_s=0))[-1]["ended"] == "no time left"


def test_each_part_of_a_step_is_a_line_as_soon_as_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_parts

    monkeypatch.setattr(attention_choice, "CALLS", 1)
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


def test_a_trace_tells_the_busy_share_and_the_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_trace

    def event(name: str, category: str, start: float, length: float) -> dict[str, Any]:
        return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": length}

    overlapping = [event("gemm", "kernel", 0, 4000), event("norm", "kernel", 3000, 3000)]
    later = [event("gemm", "kernel", 8000, 2000), {"ph": "i", "name": "mark", "ts": 0}]
    waits = [event("cudaStreamSynchronize", "cuda_runtime", 0, 9), event("mm", "cpu_op", 0, 1)]
    said = gpu_trace.report(overlapping + later + waits)
    assert "10.0 ms, of which kernels run 80.0%" in said
    assert "cudaDeviceSynchronize 0, cudaStreamSynchronize 1" in said
    assert "| gemm | 2 | 6.00 | 60.0% |" in said
    # the file that a real profiler writes, as a run's
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.mm(torch.ones(8, 8), torch.ones(8, 8))
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    monkeypatch.setattr(sys, "argv", ["gpu_trace.py", str(tmp_path)])
    gpu_trace.main()
    assert "aten::mm" in capsys.readouterr().out


def test_a_timed_step_that_compiles_is_seen_and_thrown_out(tmp_path: Path) -> None:
    import common

    caches = [tmp_path / "triton", tmp_path / "never made"]
    for name, written_s in (("before", 90.0), ("warm-up", 105.0), ("timed/deep", 118.0)):
        path = caches[0] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a kernel")
        os.utime(path, (written_s, written_s))
    arrived_s = [100.0, 110.0, 120.0, 124.0, 130.0, 190.0]
    compiled = common.compiling_steps(arrived_s, [*map(str, caches)])
    assert compiled == {0, 1, 2}
    lines: list[dict[str, float]] = [{"tokens": 10.0 * n} for n in range(6)]
    run = common.Run(lines, arrived_s, 2, 0.0, 0.0, after=1, compiled=compiled)
    assert (run.kept, run.thrown_out) == ([3, 4], 1)
    assert run.rate("tokens") == (30 + 40) / (4 + 6)
    whole = common.Run(lines, arrived_s, 2, 0.0, 0.0)
    assert whole.rate("tokens") == (20 + 30 + 40 + 50) / 80, "as the other benchmarks count"


def test_a_line_of_the_gpu_benchmark_says_where_the_time_went(tmp_path: Path) -> None:
    import common
    import gpu_cases
    import gpu_report
    import vs_trl

    case = gpu_cases.CASES[0]
    (tmp_path / "config.json").write_text(json.dumps(case.shape))
    (tmp_path / "counts.json").write_text('{"pairs_per_token": 2000}')
    options = vs_trl.parse(["--model", str(tmp_path), "--data", str(tmp_path)])
    job = replace(vs_trl.shared_job(options, tmp_path), model=str(tmp_path), tokens=str(tmp_path))
    spent = {"data": 0.01, "forward": 0.3, "backward": 0.6, "optimizer": 0.05, "step": 1.0}
    line = {f"perf/{part}_s": s for part, s in spent.items()}
    line |= {"tokens": 16384.0, "train/trained_tokens": 8192.0}
    run = common.Run([line] * 4, [0.0, 1.0, 2.0, 3.0], 1, 0.0, 60.0)
    row = gpu_report.table_row(case, case.arms[0], job, [run], "NVIDIA H200")
    assert len(row) == len(gpu_report.HEAD)
    assert row[3] == "data 10, forward 300, backward 600, optimizer 50, rest 40"
    # 6 x (8 layers of 218 million weights, half of the head's, attention) x 16,384 tokens/s
    flops = 6 * (8 * 218_103_808 + 4096 * 128256 / 2 + 4096 * 8 * 2000) * 16384
    assert row[4] == f"{100 * flops / 989e12:.1f}%"
    assert row[6] == "57 to 67% MFU"
    failed = gpu_report.table_row(case, case.arms[0], job, "out of memory", "NVIDIA H200")
    assert failed[2] == "out of memory"


def a_bench(tmp_path: Path, budget_s: float) -> Any:
    import gpu

    options = argparse.Namespace(tiny=False, out=tmp_path / "report.md")
    vars(options).update(steps=8, warmup=3, rounds=1)
    return gpu.Bench(options, "H100", 80.0, tmp_path, time.monotonic() + budget_s)


def test_what_a_script_printed_is_in_the_report_although_it_never_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu

    monkeypatch.setattr(gpu, "LEAST_S", 0)
    script = tmp_path / "parts.py"
    script.write_text('import time\nprint(\'{"part": "products", "ms": 7}\', flush=True)\n')
    with script.open("a") as file:
        file.write("print('{\"part\": \"half a li', end='', flush=True)\ntime.sleep(600)\n")
    bench = a_bench(tmp_path, budget_s=0)
    written: list[str] = []
    monkeypatch.setattr(bench, "write", lambda: written.append(bench.sections["Parts"]))
    monkeypatch.setattr(bench, "left_s", lambda: 0 if "products" in str(written) else 60)
    gpu.follow(bench, "Parts", str(script), [], ("part", "ms", "error"))
    assert "| products | 7 |  |" in written[-2], "before it was stopped"
    assert written[-1].startswith(written[-2])
    assert "stopped: no time left" in written[-1]
    monkeypatch.setattr(gpu, "LEAST_S", 1)
    gpu.follow(bench, "Parts", str(script), [], ("part",))
    assert bench.sections["Parts"] == "not run: no time left"


def test_an_arm_that_the_card_has_no_room_for_says_so(tmp_path: Path) -> None:
    import gpu
    import gpu_cases

    case = gpu_cases.CASES[-1]
    bench = a_bench(tmp_path, budget_s=0)
    said = {arm.label: gpu.run_one(case, arm, None, bench) for arm in case.arms}  # type: ignore
    assert said["packhorse, ZeRO-3"] == "not run: needs 130 GiB"
    assert said["packhorse, ZeRO-1, state on the host"] == "not run: no time left"


def test_the_safeguards_calls_are_counted(tmp_path: Path) -> None:
    import safeguards

    text = safeguards.report(tmp_path, 100)
    # a row is rendered once and its pattern searched once
    assert re.search(r"^\| bounded rendering and patterns \| 2\d\d \|", text, re.MULTILINE)
    assert re.search(r"^\| the lease: asking whether it is ours \| [1-9]", text, re.MULTILINE)
