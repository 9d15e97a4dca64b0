"""`packhorse train` on the debug recipe ends, stops, is killed, and continues."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import ROOT

pytestmark = pytest.mark.runs

SAVES_OFTEN = ("checkpoint.every_steps=3", "eval.every_steps=null", "eval.generate=null")


def start(run_dir: Path, *overrides: str) -> subprocess.Popen:
    train = [
        sys.executable,
        "-m",
        "packhorse",
        "train",
        "recipes/debug.yaml",
        f"run.dir={run_dir}",
        *overrides,
    ]
    cache = f"data.cache={run_dir.parent / 'cache'}"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*train, cache, "--nproc", "2"], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, err = process.communicate(timeout=300)
    return process.returncode, err


def losses(run_dir: Path) -> dict[int, float]:
    """Return the loss of each step; the last one where a step was logged twice, after a kill."""
    path = run_dir / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def wait_for_step(run_dir: Path, step: int) -> None:
    end = time.monotonic() + 120
    while max(losses(run_dir), default=0) < step:
        assert time.monotonic() < end, f"step {step} did not come"
        time.sleep(0.02)


def workers_of(run_dir: Path) -> list[int]:
    """Return the process ids of the ranks that train into `run_dir`, without the launcher."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"run.dir={run_dir}".encode() in words and b"--nproc" not in words:
            found.append(int(folder.name))
    return sorted(found)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Train without a stop; return the run folder."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    code, err = finish(start(run_dir, *SAVES_OFTEN))
    assert code == 0, err
    return run_dir


def test_a_run_lowers_the_loss_and_fills_its_run_folder(whole):
    found = losses(whole)
    assert sorted(found) == list(range(1, 19))
    assert found[18] < 0.6 * found[1]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["after"]["eval/loss"] < 0.6 * summary["before"]["eval/loss"]
    for name in (
        "recipe.yaml",
        "environment.json",
        "data.json",
        "data.png",
        "tensorboard",
        "checkpoints/latest",
    ):
        assert (whole / name).exists(), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stopped_run_continues_as_if_never_stopped(whole, tmp_path, number):
    run_dir = tmp_path / "run"
    process = start(run_dir, *SAVES_OFTEN)
    wait_for_step(run_dir, 4)
    process.send_signal(number)
    code, err = finish(process)
    assert code == 75, err
    stopped_at = json.loads((run_dir / "stop.json").read_text())["step"]
    assert 4 <= stopped_at < 18
    code, err = finish(start(run_dir, *SAVES_OFTEN))
    assert code == 0, err
    assert not (run_dir / "stop.json").exists()
    assert losses(run_dir) == losses(whole)


def test_an_extended_run_is_the_longer_run(tmp_path):
    """This holds for a constant learning rate; others follow the longer schedule from there on."""
    run_dir = tmp_path / "run"
    alike = (*SAVES_OFTEN, "optim.lr_schedule=constant", "optim.warmup_ratio=0")
    ends = {}
    for steps, options in ((3, ()), (6, ("--extend",))):
        code, err = finish(start(run_dir, *alike, f"train.steps={steps}", *options))
        assert code == 0, err
        ends[steps] = json.loads((run_dir / "summary.json").read_text())["steps"]
    assert ends == {3: 3, 6: 6}
    assert "is extended: train.steps was 3, is 6" in err
    code, err = finish(start(tmp_path / "longer", *alike, "train.steps=6"))
    assert code == 0, err
    assert losses(run_dir) == losses(tmp_path / "longer")


def test_a_killed_rank_ends_the_run_and_the_next_start_continues(whole, tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, *SAVES_OFTEN)
    wait_for_step(run_dir, 4)
    os.kill(workers_of(run_dir)[-1], signal.SIGKILL)
    code, err = finish(process)
    assert code == 1
    assert "killed by SIGKILL" in err
    assert not workers_of(run_dir)
    code, err = finish(start(run_dir, *SAVES_OFTEN))
    assert code == 0, err
    assert losses(run_dir) == losses(whole)


def test_workers_of_a_killed_launcher_save_and_exit(tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, *SAVES_OFTEN, "train.epochs=1000")
    wait_for_step(run_dir, 2)
    process.kill()
    process.communicate()
    end = time.monotonic() + 60
    while workers_of(run_dir):
        assert time.monotonic() < end, "they go on alone"
        time.sleep(0.1)
    assert (run_dir / "stop.json").exists(), "they saved before they left"
