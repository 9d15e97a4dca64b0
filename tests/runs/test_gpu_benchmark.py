"""The GPU benchmark runs from end to end on a CPU, so that the day of a card finds it whole."""

import os
import re
import subprocess
import sys

import pytest

from tests.ranks import ROOT

pytestmark = pytest.mark.runs


def test_every_arm_of_a_model_leaves_its_line_and_packhorse_a_profiled_step(tmp_path):
    out = tmp_path / "report.md"
    options = ["--tiny", "--steps", "3", "--warmup", "1", "--only", "8B, 8 layers"]
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *options, "--out", str(out), "--budget-s", "900"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "missing: flash_attn_interface" in done.stdout
    text = out.read_text()
    assert text.startswith("# A dry run on a CPU: no speeds\n")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| 8B, 8 layers | ")]
    figures = {row[1]: row[2] for row in rows}
    assert figures.pop("packhorse, fp8") == "not run: a CPU has no fp8"
    assert len(figures) == 4
    assert all(figure.isdigit() for figure in figures.values()), figures
    assert "forward" in rows[0][3]
    profiled = text.partition("## A step of 8B, 8 layers, packhorse, ZeRO-1\n")[2]
    assert "of which operations run" in profiled
    assert "waits of the host: cudaDeviceSynchronize 0" in profiled
    assert "| products | " in text.partition("## The parts of a step\n")[2]
    assert re.search(r"\| 256 \| [0-9.]+ \| [0-9.]+ \|  \|\n(.+\n)*.+out of memory", text)
    assert "not run: no card" in text
    assert not list(tmp_path.glob("gpu_bench.*")), "its files are removed"
