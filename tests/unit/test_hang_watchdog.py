"""Who holds a hanging run up, and what does not count as a hang."""

import subprocess
import sys
import threading
import time

import pytest

from packhorse.trainer.config.recipe import GuardSection
from packhorse.trainer.hang_watchdog import Watch, name_slowest
from tests.ranks import ROOT


def test_a_rank_without_a_report_is_named_first(tmp_path):
    (tmp_path / "rank00000.txt").write_text("7 step 3 > data\n")
    (tmp_path / "rank00002.txt").write_text("6 step 3\n")
    assert name_slowest(tmp_path, 3) == "no report from rank 1: stopped, or the machine is gone"
    (tmp_path / "rank00001.txt").touch()
    assert name_slowest(tmp_path, 3) == "no report from rank 1: stopped, or the machine is gone"


def test_the_ranks_with_the_fewest_beats_are_named(tmp_path):
    for rank, count in enumerate((9, 10, 9)):
        (tmp_path / f"rank{rank:05d}.txt").write_text(f"{count} step 3 > data\nThread 0x1\n")
    assert name_slowest(tmp_path, 3) == "held up by ranks 0, 2, at step 3 > data"
    (tmp_path / "rank00001.txt").write_text("9 step 3 > data\n")
    assert name_slowest(tmp_path, 3) == "all ranks are at step 3 > data"


def test_a_watch_ends_with_its_block(tmp_path):
    with Watch(GuardSection(), tmp_path):
        (thread,) = [one for one in threading.enumerate() if one.name == "hang-watch"]
        assert thread.is_alive()
    thread.join(timeout=60)
    assert not thread.is_alive()


# beats for a while, pauses for longer than a hang, then beats once and never again
PROGRAM = """
import sys, time
from pathlib import Path
from packhorse.trainer import dist, hang_watchdog
from packhorse.trainer.config.recipe import GuardSection
hang_watchdog._POLL_S, hang_watchdog._REPORTS_S, hang_watchdog._USUAL_FACTOR = 0.1, 0.2, 5
dist.start_logging()
watching = hang_watchdog.Watch(GuardSection(hang_timeout_s=0.5), Path(sys.argv[1]))
for i in range(10):
    watching.beat(f"step {i}")
    time.sleep(float(sys.argv[2]))
watching.pause()
time.sleep(2)
print("rested", flush=True)
watching.beat("the last")
time.sleep(30)
"""


@pytest.mark.parametrize(("pace_s", "least_s"), [(0.01, 0.5), (0.3, 1.5)])
def test_silence_ends_the_process_and_a_pause_does_not(tmp_path, pace_s, least_s):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(pace_s)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "rested\n"
    began = time.monotonic()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert least_s < time.monotonic() - began + 0.1
    assert "hang: nothing moved" in err
    (report,) = tmp_path.glob("logs/hang-*/rank00000.txt")
    assert report.read_text().startswith("11 step 8 > step 9 > the last\n")
    assert "<module>" in report.read_text(), "the main thread's stack"
