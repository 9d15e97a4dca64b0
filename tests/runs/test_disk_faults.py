"""A full, read-only or damaging disk is reported in one sentence, and nothing is lost (C7).

The full disk is real: a few MiB of memory that root mounts as the run folder. A rank fills it at a
named point. A run that cannot continue ends with exit code 2. Once there is room, the same command
ends as if nothing had happened.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from packhorse.trainer.checkpoint import checkpoint
from packhorse.trainer.datatypes import BAD_INPUT
from tests.runs.killed import ForkServer, Point, Run, assert_same, ballast, fill
from tests.runs.test_command import SAVES_OFTEN, finish, losses, start, wait_for_step
from tests.unit.test_checkpoint import DAMAGES, be_of_another_format

pytestmark = pytest.mark.runs

PROMISED_ROOT = "PACKHORSE_TESTS_AS_ROOT"  # set by .ci/run: what needs root must run there
DISK_MIB = 16

FILLS = {
    "in its first file": Point("digest", "saving-step-000004/rank00000-000", call=30),
    "before its last file": Point("write", "saving-step-000004/rank00000-001"),
    "before the manifest": Point("fsync", "saving-step-000004/rank00000-001", after=True),
    "before latest": Point("rename", "/step-000004", after=True),
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Return disk(folder, kib), which mounts a disk of that size; called again, it resizes it."""
    mounted: list[Path] = []

    def mount(folder: Path, kib: int = DISK_MIB * 1024, *options: str) -> Path:
        folder.mkdir(exist_ok=True)
        how = ["remount"] if folder in mounted else []
        wanted = ",".join([*how, f"size={kib}k", *options])
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", wanted, "none", folder], capture_output=True, text=True
        )
        if done.returncode:
            assert PROMISED_ROOT not in os.environ, f"this must run here: {done.stderr}"
            pytest.skip(
                f"needs a disk of its own, which only root can mount: {done.stderr.strip()}"
            )
        if not how:
            mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


# --------------------------------------------------------------------------------------------- full


def assert_reported_once(log: str, sentence: str) -> None:
    """Assert that all ranks that report an error report the same one, in one line."""
    errors = set(re.findall("packhorse: error: .*", log))
    assert len(errors) == 1, log
    assert re.search(sentence, errors.pop()), log


@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.parametrize("name", FILLS)
def test_the_disk_fills_up_in_a_save(
    disk: Callable[..., Path], whole: dict[int, Path], run: Run, name: str, asynchronous: str
) -> None:
    disk(run.folder)
    run.overrides += (f"checkpoint.asynchronous={asynchronous}",)
    codes = run.start(1, FILLS[name], fill=True)
    assert codes == [BAD_INPUT], run.log_tail
    assert_reported_once(run.log_tail, "the disk is full; make room and start again")
    assert not list((run.folder / "checkpoints").glob(".*saving-*")), (
        "half a checkpoint takes the room"
    )
    found = checkpoint.find(run.folder)
    assert found
    assert found[1].state.step == (4 if name == "before latest" else 2)
    ballast(run.folder).unlink()
    run.finish(1)
    assert_same(run.folder, whole[1])


@pytest.mark.parametrize("rank", [0, 1])
def test_the_disk_fills_up_for_one_of_two_ranks(
    disk: Callable[..., Path], whole: dict[int, Path], run: Run, rank: int
) -> None:
    disk(run.folder)
    run.overrides += ("checkpoint.asynchronous=false",)
    point = Point("digest", f"saving-step-000004/rank0000{rank}-000", call=10)
    assert run.start(2, point, rank=rank, fill=True) == [BAD_INPUT, BAD_INPUT], run.log_tail
    assert_reported_once(run.log_tail, "the disk is full; make room and start again")
    ballast(run.folder).unlink()
    run.finish(2)
    assert_same(run.folder, whole[2])


def test_the_disk_is_full_before_a_save(
    disk: Callable[..., Path], whole: dict[int, Path], run: Run
) -> None:
    """It is found before a byte is written; the log still fits."""
    disk(run.folder)
    codes = run.start(1, Point("step", call=4), fill=True, leave_kib=512)
    assert codes == [BAD_INPUT], run.log_tail
    assert_reported_once(
        run.log_tail, "a checkpoint needs .* GiB are free there; make room and start again"
    )
    ballast(run.folder).unlink()
    run.finish(1)
    assert_same(run.folder, whole[1])


def test_the_disk_is_full_for_the_log(
    disk: Callable[..., Path], whole: dict[int, Path], run: Run
) -> None:
    """The next line may still fit into the last page of the log's file; then the save fails."""
    disk(run.folder)
    assert run.start(1, Point("step", call=4), fill=True) == [BAD_INPUT], run.log_tail
    assert_reported_once(run.log_tail, "(No space left on device|GiB are free there); make room")
    ballast(run.folder).unlink()
    run.finish(1)
    assert_same(run.folder, whole[1])


def test_the_disk_of_the_cache_is_full(
    disk: Callable[..., Path], whole: dict[int, Path], fork_server: ForkServer, tmp_path: Path
) -> None:
    cache = disk(tmp_path / "cache", 24)
    run = Run(fork_server, tmp_path, cache)
    assert run.start(1) == [BAD_INPUT], run.log_tail
    assert_reported_once(
        run.log_tail,
        "the disk is full while preparing data.train; free some room, or set data.cache",
    )
    disk(cache, 4096)
    run.finish(1)
    assert_same(run.folder, whole[1])


def test_the_command_ends_with_2_and_continues_when_there_is_room(
    disk: Callable[..., Path], tmp_path: Path
) -> None:
    """Two ranks run under the launcher. Their logs still fit, a checkpoint does not."""
    run_dir = disk(tmp_path / "run")
    process = start(run_dir, *SAVES_OFTEN, "train.epochs=20")
    wait_for_step(run_dir, 4)
    filled = ballast(run_dir)
    fill(run_dir, leave_kib=512)
    code, err = finish(process)
    assert code == BAD_INPUT, err
    assert "make room" in err
    filled.unlink()
    reached = max(losses(run_dir))
    process = start(run_dir, *SAVES_OFTEN, "train.epochs=20")
    wait_for_step(run_dir, reached + 3)
    process.terminate()
    code, err = finish(process)
    assert code == 75, err
    assert "resuming from" in err


def test_a_read_only_run_folder(disk: Callable[..., Path], run: Run) -> None:
    disk(run.folder)
    disk(run.folder, DISK_MIB * 1024, "ro")
    assert run.start(1) == [BAD_INPUT], run.log_tail
    assert_reported_once(run.log_tail, "run.dir: .* cannot be written .*Read-only file system")


# ------------------------------------------------------------------------------------------ damaged


@pytest.fixture(scope="module")
def with_two(
    fork_server: ForkServer, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a run folder with checkpoints of steps 2 and 4, whose run was killed in step 6."""
    run = Run(fork_server, tmp_path_factory.mktemp("with-two"), cache)
    run.overrides += ("checkpoint.keep=2",)
    run.die(1, Point("step", call=6))
    return run.folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_last_good_one_used(
    whole: dict[int, Path], with_two: Path, run: Run, damage: Callable[[Path], None]
) -> None:
    shutil.copytree(with_two, run.folder)
    damage(run.folder / "checkpoints" / "step-000004")
    run.finish(1)
    assert re.search(r"skipping the damaged checkpoint \S+step-000004: ", run.log_tail)
    assert re.search(r"resuming from \S+step-000002,", run.log_tail)
    assert_same(run.folder, whole[1])


def test_a_run_without_a_good_checkpoint_does_not_start_from_scratch(
    with_two: Path, run: Run
) -> None:
    shutil.copytree(with_two, run.folder)
    for folder in (run.folder / "checkpoints").glob("step-*"):
        be_of_another_format(folder)
    assert run.start(1) == [BAD_INPUT], run.log_tail
    assert_reported_once(run.log_tail, "none of its 2 checkpoints can be used .*format is 99")
