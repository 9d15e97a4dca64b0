"""All of the experiments by one command, stopped and started again, on the tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.ranks import ROOT

pytestmark = pytest.mark.runs

SCRIPTS = ROOT / "recipes" / "experiments"


def start(recipe: Path, out: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        str(SCRIPTS / "run.py"),
        "--recipe",
        str(recipe),
        "--out",
        str(out),
        "--only",
        "4,7",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=400)
    return process.returncode, err


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """base.yaml with the debug recipe's model, and as many of the word problems."""
    make_data = [sys.executable, str(SCRIPTS / "make_data.py"), str(tmp_path / "data")]
    subprocess.run(make_data, check=True, cwd=ROOT)
    tree = yaml.safe_load((SCRIPTS / "base.yaml").read_text())
    tree["model"] = yaml.safe_load((ROOT / "recipes" / "debug.yaml").read_text())["model"]
    tree["data"] = {
        "train": [{"path": str(tmp_path / "data" / "train.jsonl")}],
        "eval": [{"path": str(tmp_path / "data" / "heldout.jsonl")}],
        "max_length": 250,  # the tiny tokenizer's are shorter
        "cache": str(tmp_path / "cache"),
    }
    tree["eval"]["generate"] |= {"num_prompts": 8, "max_new_tokens": 8}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_stopped_and_started_again_every_run_is_trained_once_and_the_tables_are_written(
    recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(recipe, out)
    log = out / "baseline-seed0" / "metrics.jsonl"
    end = time.monotonic() + 300
    while not (log.exists() and '"train/loss"' in log.read_text()):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < end, "the first run did not begin"
        time.sleep(0.05)
    second, said = finish(start(recipe, out))
    assert second == 2, said
    assert "another process runs the experiments there" in said
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 75, said
    assert "4 runs, 4 of them to do" in said
    assert "run the same command to resume" in said

    code, said = finish(start(recipe, out))
    assert code == 0, said
    assert "4 of 4 runs are done" in said
    starts = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert sorted(line["run"] for line in starts if line["code"] == 0) == [
        *("baseline-seed0", "few-rows-seed0", "fewer-rows-seed0", "neftune-seed0")
    ]
    steps = [
        json.loads(line)["step"] for line in log.read_text().splitlines() if '"train/loss"' in line
    ]
    assert steps == list(range(1, 37)), "the stopped run went on where it was"
    assert not list(out.glob("*/checkpoints"))
    page = (out / "experiments.md").read_text(encoding="utf-8")
    assert "| `neftune` |" in page
    assert "lowest loss" in page
    assert "Not run yet: 0 of its 6 runs are done." in page, "of those that were not asked for"

    code, said = finish(start(recipe, out))
    assert code == 0, said
    assert "4 runs, 0 of them to do" in said
    assert len((out / "log.jsonl").read_text().splitlines()) == len(starts)
