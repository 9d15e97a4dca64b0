"""Launchers on two hosts, one of which is cut off during training.

If selected, these tests run: without root or iproute2 they fail.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from packhorse.trainer.checkpoint import checkpoint
from packhorse.trainer.utils.json_lines import read_json_lines
from tests.cluster.hosts import Hosts, hosts

pytestmark = pytest.mark.cluster

LONG = ("train.epochs=1000", "data.eval=[]", "eval.every_steps=null", "eval.generate=null")


@pytest.fixture
def two(tmp_path) -> Iterator[Hosts]:
    with hosts(tmp_path, ["host0", "host1"]) as made:
        yield made


def start(two: Hosts, run_dir: Path, *arguments: str) -> list[subprocess.Popen]:
    """Start a launcher of one rank on each host; host0 is the rendezvous host."""
    recipe = [
        "recipes/debug.yaml",
        f"run.dir={run_dir}",
        f"data.cache={run_dir.parent / 'cache'}",
        *LONG,
    ]
    meeting = ["--nproc", "1", "--rdzv-endpoint", "host0:29400", *arguments]
    command = [sys.executable, "-m", "packhorse", "train", *recipe, *meeting]
    return [two.start(name, command) for name in ("host0", "host1")]


def wait_for_step(run_dir: Path, step: int, world_size: int) -> None:
    end = time.monotonic() + 300
    while True:
        try:
            lines = [
                json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()
            ]
            world = json.loads((run_dir / "environment.json").read_text())["world_size"]
        except (OSError, ValueError):
            lines, world = [], 0
        if world == world_size and lines and lines[-1]["step"] >= step:
            return
        assert time.monotonic() < end, f"step {step} of {world_size} ranks did not come"
        time.sleep(0.2)


def test_when_another_host_is_gone_the_run_goes_on_without_it(two, tmp_path):
    run_dir = tmp_path / "run"
    stays, goes = start(
        two, run_dir, "--nnodes", "1:2", "--max-restarts", "1", "checkpoint.every_steps=2"
    )
    wait_for_step(run_dir, 5, world_size=2)
    two.cut("host1")
    _, err = goes.communicate(timeout=60)
    assert goes.returncode == 1, err
    assert "the rendezvous host has not answered" in err
    last = len(read_json_lines(run_dir / "metrics.jsonl"))
    wait_for_step(run_dir, last + 3, world_size=1)
    two.signal(stays, signal.SIGTERM)
    _, err = stays.communicate(timeout=60)
    assert "no heartbeat from host1" in err
    assert "written by 2 ranks" in err, "it goes on from what both had saved"
    assert stays.returncode == 75, err
    steps = [line["step"] for line in read_json_lines(run_dir / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)), "no step is lost, and none is counted twice"


@pytest.mark.parametrize(("nnodes", "gone"), [("1:2", "host0"), ("2", "host1")])
def test_without_the_rendezvous_or_enough_hosts_all_end(two, tmp_path, nnodes, gone):
    run_dir = tmp_path / "run"
    launchers = start(two, run_dir, "--nnodes", nnodes, "checkpoint.every_steps=3")
    wait_for_step(run_dir, 4, world_size=2)
    two.cut(gone)
    for launcher in launchers:
        _, err = launcher.communicate(timeout=60)
        assert launcher.returncode == 1, err
    assert checkpoint.find(run_dir) is not None
