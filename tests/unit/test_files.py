"""One process builds, the others wait; if it dies, another one takes over, and nothing incomplete
is used.
"""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils import lease, staged_build
from packhorse.trainer.utils.files import apply_umask, write_synced
from packhorse.trainer.utils.json_lines import cut_json_lines
from packhorse.trainer.utils.staged_build import ResumableFiles, Stopped, build_once

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    monkeypatch.setattr(lease, "STALE_S", 0.5)
    monkeypatch.setattr(staged_build, "POLL_S", 0.02)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache" / "thing"


def write(text: str):
    def build(staging: Path, leftovers: list[Path], check) -> None:
        staging.mkdir()
        (staging / "text").write_text(text)

    return build


def content(folder: Path) -> str:
    assert sorted(path.name for path in folder.parent.iterdir()) == ["thing"], (
        "nothing else is left lying about"
    )
    return (folder / "text").read_text()


def test_a_folder_is_built_once(folder):
    build_once(folder, write("first"), "building")
    build_once(folder, write("second"), "building")
    assert content(folder) == "first"


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_get_the_mode_that_the_umask_says(tmp_path, umask):
    (tmp_path / "code").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")  # by a file of mode 0600
    (tmp_path / "code" / "a.py").touch(0o400)
    (tmp_path / "link").symlink_to("/dev/null")
    before = os.umask(umask)
    try:
        apply_umask(tmp_path)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.[ps]*")}
    assert modes == {0o666 & ~umask}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "code", "link"]


def require_one_build(folder, num_threads):
    """Start threads that build the same folder: one of them builds, the others find it built."""
    built = []

    def build(staging, leftovers, check):
        built.append(staging)
        time.sleep(0.2)
        write("one")(staging, leftovers, check)

    threads = [
        threading.Thread(target=build_once, args=(folder, build, "building"))
        for _ in range(num_threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert content(folder) == "one"


def test_of_many_that_start_together_one_builds(folder):
    require_one_build(folder, num_threads=8)


def test_a_live_owner_is_waited_for_and_named_once(folder, caplog):
    def slow(staging, leftovers, check):
        time.sleep(1.2)  # longer than STALE_S: the heartbeat keeps the lock
        write("slow")(staging, leftovers, check)

    owner = threading.Thread(target=build_once, args=(folder, slow, "building"))
    owner.start()
    time.sleep(0.1)
    with caplog.at_level("INFO", "packhorse"):
        build_once(folder, write("hasty"), "building")
    owner.join()
    assert content(folder) == "slow"
    waited = [record.message for record in caplog.records]
    assert len(waited) == 1
    assert f"process {os.getpid()}), which is building" in waited[0]


def test_a_dead_owner_is_followed_after_some_silence(folder, caplog):
    folder.parent.mkdir(parents=True)
    (folder.parent / "thing.lock-000003").write_text("a node that is gone")
    (folder.parent / "thing.build-abc").mkdir()
    seen = []

    def build(staging, leftovers, check):
        seen.extend(leftovers)
        write("after")(staging, leftovers, check)

    started = time.monotonic()
    with caplog.at_level("INFO", "packhorse"):
        build_once(folder, build, "building")
    assert time.monotonic() - started > 0.5
    assert [path.name for path in seen] == ["thing.build-abc"], "what it left is offered"
    assert content(folder) == "after"
    assert "taking over" in caplog.text


def test_of_many_that_find_an_owner_dead_one_takes_over(folder):
    folder.parent.mkdir(parents=True)
    (folder.parent / "thing.lock-000001").touch()
    require_one_build(folder, num_threads=6)


def test_an_owner_that_was_frozen_gives_way_to_the_one_that_took_over(folder):
    def frozen(staging, leftovers, check):
        staging.mkdir()
        (staging / "text").write_text("half of")
        (folder.parent / "thing.lock-000002").touch()  # what the other does after STALE_S
        with pytest.raises(RuntimeError, match="another process has taken over"):
            check()
        other.start()
        check()

    def publish():
        time.sleep(0.2)
        write("the other's")(folder.with_name("thing.other"), [], None)
        folder.with_name("thing.other").rename(folder)
        (folder.parent / "thing.lock-000002").unlink()

    other = threading.Thread(target=publish)
    build_once(folder, frozen, "building")
    other.join()
    assert content(folder) == "the other's"


KILLED = """
import sys, time
from pathlib import Path
from packhorse.trainer.utils.staged_build import build_once

def build(staging, leftovers, check):
    staging.mkdir()
    (staging / "text").write_text("half")
    print("half done", flush=True)
    time.sleep(60)

build_once(Path(sys.argv[1]), build, "building")
"""


def test_a_killed_build_is_not_taken_for_whole(folder, monkeypatch):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half done\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not folder.exists()
    # nobody waits for a process that has ended on this machine, however long it was silent
    monkeypatch.setattr(lease, "STALE_S", 1000.0)
    build_once(folder, write("whole"), "building")
    assert content(folder) == "whole"


def test_a_build_that_fails_leaves_nothing(folder):
    def build(staging, leftovers, check):
        write("half")(staging, leftovers, check)
        raise BadInput("row 3 is broken")

    with pytest.raises(BadInput, match="row 3"):
        build_once(folder, build, "building")
    assert list(folder.parent.iterdir()) == []


def test_a_build_that_is_stopped_leaves_its_work_and_no_lock(folder):
    def build(staging, leftovers, check):
        write("half")(staging, leftovers, check)
        raise Stopped("enough")

    with pytest.raises(Stopped):
        build_once(folder, build, "building")
    (left,) = folder.parent.iterdir()
    assert left.name.startswith("thing.build-")


def test_waiting_ends_when_asked_to_stop(folder):
    folder.parent.mkdir(parents=True)
    (folder.parent / "thing.lock-000001").touch()
    with pytest.raises(Stopped, match="waiting for another process that is building"):
        build_once(folder, write("never"), "building", stopping=lambda: True)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "the disk is full while building; free some room"),
        (errno.EROFS, "cannot be written"),
    ],
)
def test_a_disk_that_takes_no_more_is_said_in_a_sentence(folder, code, said):
    def build(staging, leftovers, check):
        raise OSError(code, os.strerror(code))

    with pytest.raises(BadInput, match=said):
        build_once(folder, build, "building")


def test_a_place_that_cannot_be_a_folder_is_said_in_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"cannot be written .* set data\.cache"):
        build_once(tmp_path / "file" / "thing", write("never"), "building")


def test_other_local_ranks_leave_the_work_to_the_first_for_a_while(folder, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(staged_build, "PATIENCE_S", 0.3)
    started = time.monotonic()
    build_once(folder, write("at last"), "building")
    assert time.monotonic() - started > 0.3


# ----------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("kind", ["link", "link to nowhere", "pipe", "leftover"])
def test_a_file_is_written_aside_through_nothing_that_stands_there(tmp_path, kind):
    mine, aside = tmp_path / "mine", tmp_path / ".recipe.yaml.new"
    mine.write_text("mine")
    if kind == "pipe":
        os.mkfifo(aside)
        os.open(aside, os.O_RDWR)  # so that who opens it to write fails instead of waiting
    elif kind == "leftover":
        aside.write_text("longer than what is written")
    else:
        aside.symlink_to(mine if kind == "link" else tmp_path / "nowhere")
    write_synced(tmp_path / "recipe.yaml", "ours")
    assert (tmp_path / "recipe.yaml").read_text() == "ours"
    assert not (tmp_path / "recipe.yaml").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "recipe.yaml"]
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "link to nowhere", "pipe", "folder"])
def test_damaged_lines_are_set_aside_in_a_plain_file_alone(tmp_path, kind):
    mine, aside = tmp_path / "mine", tmp_path / "metrics.jsonl.damaged"
    mine.write_text("mine")
    (tmp_path / "metrics.jsonl").write_text("damaged\n")
    if kind == "pipe":
        os.mkfifo(aside)
        os.open(aside, os.O_RDWR)
    elif kind == "folder":
        aside.mkdir()
    else:
        aside.symlink_to(mine if kind == "link" else tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"metrics\.jsonl\.damaged: is no plain file"):
        cut_json_lines(tmp_path / "metrics.jsonl", lambda _: True)
    assert (tmp_path / "metrics.jsonl").read_text() == "damaged\n"
    assert mine.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def resumable(staging: Path, leftovers: list[Path] | None = None) -> ResumableFiles:
    return ResumableFiles(staging, leftovers or [], ["a", "b"], {"rows": 0})


def test_a_build_is_resumed_from_the_leftover_with_the_most_rows_and_what_it_saved(tmp_path):
    for name, rows in (("old", 1), ("new", 2)):
        writer = resumable(tmp_path / name)
        writer.append_lines("a", [{"row": row} for row in range(rows)])
        writer.state["rows"] = rows
        writer.save()
        writer.append("a", b"not saved")
        writer.close()
    resumable(tmp_path / "none").close()
    resumed = resumable(tmp_path / "resumed", [tmp_path / name for name in ("new", "none", "old")])
    assert resumed.state == {"rows": 2}
    resumed.append("b", b"more")
    assert resumed.sync() == {"a": 22, "b": 4}
    resumed.close()
    assert (tmp_path / "resumed/a").read_text() == '{"row": 0}\n{"row": 1}\n'


def test_a_build_whose_files_are_being_replaced_is_not_resumed(tmp_path):
    writer = resumable(tmp_path / "staging")
    writer.append("a", b"old")
    writer.save()
    (tmp_path / "staging/aside").write_bytes(b"new")
    writer.replace({"a": tmp_path / "staging/aside"})
    writer.append("a", b"er")
    assert writer.sync() == {"a": 5, "b": 0}
    writer.close()
    assert (tmp_path / "staging/a").read_bytes() == b"newer"
    assert resumable(tmp_path / "next", [tmp_path / "staging"]).state == {"rows": 0}
