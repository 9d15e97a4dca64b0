"""`packhorse train` on the debug recipe ends, stops, is killed, and continues."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import ROOT
from tests.sockets import listening

pytestmark = pytest.mark.runs

SAVES_OFTEN = ("checkpoint.every_steps=3", "eval.every_steps=null", "eval.generate=null")


def start(run_dir: Path, *overrides: str, stderr: int = subprocess.PIPE) -> subprocess.Popen:
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
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [*train, cache, "--nproc", "2"], cwd=ROOT, env=env, stderr=stderr, text=True
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


def finish_on_terminal(run_dir: Path, *overrides: str) -> str:
    """Train on a terminal; return what it showed, without control sequences, a line each time that
    a line or the bar was written.
    """
    ours, theirs = pty.openpty()
    process = start(run_dir, *overrides, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the last process has closed the terminal
        while chunk := os.read(ours, 2**16):
            shown += chunk
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r", "\n")
    assert process.wait(60) == 0, text
    return text


@pytest.fixture(scope="module")
def shown_whole(tmp_path_factory) -> tuple[Path, str]:
    """Train without a stop, on a terminal; return the run folder and what was shown."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    # which adds in the order that a CPU has anyway: the other runs, without it, learn the same
    return run_dir, finish_on_terminal(run_dir, *SAVES_OFTEN, "train.deterministic=true")


@pytest.fixture(scope="module")
def whole(shown_whole) -> Path:
    return shown_whole[0]


def test_a_terminal_shows_a_line_a_step_above_a_bar_and_the_end(shown_whole):
    run_dir, shown = shown_whole
    steps = re.findall(r"^\d\d:\d\d:\d\d step (\d+)/18  loss \d", shown, re.MULTILINE)
    assert steps == [str(step) for step in range(1, 19)]
    assert re.search(r"^steps .* 18/18 ", shown, re.MULTILINE), "the bar"
    assert re.search(r"^held-out loss .* batches/s", shown, re.MULTILINE)
    summary = json.loads((run_dir / "summary.json").read_text())
    before, after = (summary[at]["eval/loss"] for at in ("before", "after"))
    assert re.search(rf"^  eval/loss +{before:.4f} -> {after:.4f}$", shown, re.MULTILINE)
    assert summary["seconds"]["evaluation"] > 0
    assert min(summary["seconds"][part] for part in ("data", "forward", "backward")) > 0
    log = (run_dir / "logs" / "rank00000.log").read_text()
    for end in (shown.replace("\n\n", "\n"), log):  # a terminal ends lines with \r\n
        assert f"  packhorse export {run_dir} --out {run_dir / 'export'}\n" in end
        assert f"  packhorse chat {run_dir}" in end
        assert f"  packhorse report {run_dir}\n" in end
        assert f"  tensorboard --logdir {run_dir.parent}\n" in end
    assert len(re.findall(r"^20\d\d-\d\d-\d\d \d\d:\d\d:\d\d step ", log, re.MULTILINE)) == 18


def test_tensorboard_names_the_run_by_its_folder(whole):
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

    board = EventMultiplexer().AddRunsFromDirectory(str(whole.parent))
    assert list(board.Runs()) == ["run/tensorboard"]


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
    assert {address for address, _ in listening(process.pid)} == {"127.0.0.1"}
    process.send_signal(number)
    code, err = finish(process)
    assert code == 75, err
    stopped_at = json.loads((run_dir / "stop.json").read_text())["step"]
    assert 4 <= stopped_at < 18
    code, err = finish(start(run_dir, *SAVES_OFTEN))
    assert code == 0, err
    assert not (run_dir / "stop.json").exists()
    assert losses(run_dir) == losses(whole)
    log = (run_dir / "logs" / "rank00000.log").read_text()
    assert f"stopped on request after step {stopped_at}" in log
    assert [int(step) for step in re.findall(r" step (\d+)/18 ", log)] == list(range(1, 19))


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
