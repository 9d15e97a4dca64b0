"""One process owns a folder; a dead or frozen one is followed, and then writes nothing any more."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils import files, lease
from packhorse.trainer.utils.json_lines import append_json_lines, read_json_lines
from packhorse.trainer.utils.lease import Rival, is_alive, owned, require_owned, take
from tests.file_lease import leased

ROOT = Path(__file__).parents[2]

# owns the folder, says so, and appends a line to `lines` for each line on its stdin
OWNER = """
import sys
from pathlib import Path
from packhorse.trainer.utils import lease
from packhorse.trainer.utils.json_lines import append_json_lines, read_json_lines
lease.BEAT_S = 0.05
run = Path(sys.argv[1])
with lease.owned(run):
    print("owned", flush=True)
    for line in sys.stdin:
        append_json_lines(run / "lines", [{"by": line.strip()}])
        print("written", flush=True)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    monkeypatch.setattr(lease, "STALE_S", 0.6)
    monkeypatch.setattr(lease, "POLL_S", 0.02)


@pytest.fixture
def owner(tmp_path):
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "owned\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_training_is_refused_by_a_sentence(tmp_path, owner):
    assert is_alive(tmp_path)
    with (
        pytest.raises(BadInput, match=rf"process {owner.pid}\) is training in .*give another"),
        owned(tmp_path),
    ):
        pass
    assert is_alive(tmp_path), "the refused one took nothing away"
    owner.communicate("", timeout=20)
    assert owner.returncode == 0
    assert not is_alive(tmp_path)
    with owned(tmp_path):
        assert is_alive(tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_that_was_frozen_writes_nothing_once_another_has_taken_over(tmp_path, owner):
    owner.send_signal(signal.SIGSTOP)
    with owned(tmp_path):
        append_json_lines(tmp_path / "lines", [{"by": "us"}])
    # the other one has ended, and a third has begun: the numbers may be the same again
    for _ in range(2):
        with owned(tmp_path):
            owner.send_signal(signal.SIGCONT)
            if owner.poll() is None:
                _, err = owner.communicate("late\n", timeout=20)
            assert "stood still, and another one has taken over" in err
            assert is_alive(tmp_path), "it took our lease away at its end"
            append_json_lines(tmp_path / "lines", [{"by": "us"}])
    assert read_json_lines(tmp_path / "lines") == [{"by": "us"}] * 3


def test_nobody_waits_for_one_that_was_killed_on_this_machine(tmp_path, owner, monkeypatch):
    owner.kill()
    owner.wait()
    assert list(tmp_path.glob(".lease-*")), "the test has no abandoned lease"
    assert not is_alive(tmp_path)
    monkeypatch.setattr(lease, "STALE_S", 1000.0)
    with owned(tmp_path):
        require_owned(tmp_path / "file")


@pytest.mark.parametrize("text", ["", "node7 (process 9)\nboot pid:[1] 9 77\nx", "a\n1 2 x 4\n"])
def test_a_silent_one_of_another_machine_is_followed_after_its_time(tmp_path, text):
    (tmp_path / ".lease-000007").write_text(text)
    began = time.monotonic()
    with owned(tmp_path):
        assert time.monotonic() - began > lease.STALE_S
        (number,) = tmp_path.glob(".lease-*")
        assert number.name == ".lease-000008"


def test_a_pipe_in_the_place_of_a_lease_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".lease-000001")
    with owned(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lease-000002"]


def test_a_folder_in_the_place_of_a_lease_is_no_sign_of_life(tmp_path):
    (tmp_path / ".lease-000001").mkdir()
    assert not is_alive(tmp_path)


def test_a_lease_of_the_kernel_on_its_file_is_waited_for(tmp_path):
    ours = take(tmp_path / ".lease", 1)
    assert ours is not None
    with ours:
        with leased(tmp_path / ".lease-000001"):
            assert is_alive(tmp_path)
        with leased(tmp_path / ".lease-000001"):
            assert ours.is_ours()


def test_every_writer_asks_first(tmp_path):
    (tmp_path / "aside").mkdir()
    writers = [
        lambda: files.write_json(tmp_path / "a", {}),
        lambda: append_json_lines(tmp_path / "a", [{}]),
        lambda: files.publish_folder(tmp_path / "aside", tmp_path / "a"),
        lambda: files.write_json(tmp_path / "deep/er", {}),
    ]
    with owned(tmp_path):
        following = take(tmp_path / ".lease", 2)
        assert following is not None
        before = sorted(tmp_path.rglob("*"))
        for write in writers:
            with pytest.raises(BadInput, match="writes nothing more"):
                write()
        assert sorted(tmp_path.rglob("*")) == before
        files.write_json(tmp_path.parent / f"{tmp_path.name}-elsewhere", {})
        following.__exit__()


def test_of_two_that_find_an_owner_dead_one_gets_the_lease(tmp_path):
    (tmp_path / "x.lock-000001").touch()
    os.utime(tmp_path / "x.lock-000001", (0, 0))
    rivals = [Rival(tmp_path / "x.lock") for _ in range(2)]
    assert [rival.look() for rival in rivals] == ["unsure", "unsure"]
    time.sleep(lease.STALE_S + 0.1)
    assert [rival.look() for rival in rivals] == ["dead", "dead"]
    first, second = (take(tmp_path / "x.lock", rival.number + 1) for rival in rivals)
    assert first is not None
    assert second is None
    first.__exit__()
    assert not list(tmp_path.iterdir())
