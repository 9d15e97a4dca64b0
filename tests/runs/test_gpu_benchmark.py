"""The GPU benchmark runs from end to end on a CPU, so that the day of a card finds it whole."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT

pytestmark = pytest.mark.runs


def dry_run(tmp_path: Path, *options: str) -> str:
    """Return the report of a dry run on a CPU, which leaves nothing else behind."""
    out = tmp_path / "report.md"
    given = ["--tiny", "--steps", "3", "--warmup", "1", "--budget-s", "900", *options]
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *given, "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "missing: flash_attn_interface" in done.stdout
    assert not list(tmp_path.glob("gpu_bench.*")), "its files are removed"
    text = out.read_text()
    assert text.startswith("# A dry run on a CPU: no speeds\n")
    return text


# The case "8B, 8 layers" has no arm of its own but fp8, which a CPU has not.
@pytest.mark.parametrize(("model", "arms"), [("1.5B", 4), ("8B", 5)])
def test_every_arm_leaves_its_line_and_packhorse_a_profiled_step(
    tmp_path: Path, model: str, arms: int
) -> None:
    text = dry_run(tmp_path, "--stages", "cases", "--only", model)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(f"| {model} | ")]
    figures = {row[1]: row[2] for row in rows}
    assert len(figures) == arms
    assert all(figure.isdigit() for figure in figures.values()), figures
    for row in [row for row in rows if row[1].startswith("packhorse")]:
        assert "forward" in row[3]
        profiled = text.partition(f"## A step of {model}, {row[1]}\n")[2]
        assert "of which operations run" in profiled
        assert "waits of the host: cudaDeviceSynchronize 0" in profiled


def test_the_other_stages_are_written_line_by_line(tmp_path: Path) -> None:
    text = dry_run(tmp_path, "--stages", "parts,tests,longest")
    assert "| products | " in text.partition("## The parts of a step\n")[2]
    assert re.search(r"\| 256 \| [0-9.]+ \| [0-9.]+ \|  \|\n(.+\n)*.+out of memory", text)
    assert "not run: no card" in text
