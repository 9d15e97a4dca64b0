"""A checkpoint is complete or absent, and a damaged one is named and passed over (C7)."""

from __future__ import annotations

import json
import logging
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer import checkpoint, dist
from trainer.checkpoint import RunState
from trainer.flow import BadInput


@pytest.fixture(autouse=True)
def logs_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist.log, "propagate", True)


def state(step: int) -> RunState:
    return RunState(step=step, world_size=1, stage=3, data="abc")


def write(folder: Path) -> None:
    (folder / "state").mkdir()
    (folder / "state" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(bytes(range(256)) * 10)
    (folder / "state" / "mp_rank_00_model_states.pt").write_bytes(b"weights")


def publish(run_dir: Path, *steps: int, keep: int = 3) -> None:
    for step in steps:
        checkpoint.publish(run_dir, state(step), write, keep=keep, bytes_needed=3000)


def found_step(run_dir: Path) -> int | None:
    found = checkpoint.find(run_dir)
    return found[1].step if found else None


def test_the_newest_is_found_and_older_ones_are_pruned(tmp_path: Path) -> None:
    publish(tmp_path, 1, 2, 3, 10, keep=2)
    assert checkpoint.find(tmp_path) == (tmp_path / "checkpoints" / "step-000010", state(10))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000003", "step-000010"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000010"


def test_none_is_found_where_none_was_written(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path) is None


def flip_a_byte(folder: Path) -> None:
    path = folder / "state" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def cut_a_file(folder: Path) -> None:
    path = folder / "state" / "mp_rank_00_model_states.pt"
    path.write_bytes(path.read_bytes()[:-1])


def lose_a_file(folder: Path) -> None:
    (folder / "state" / "mp_rank_00_model_states.pt").unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def cut_the_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:40])


def be_of_another_format(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


DAMAGES = [flip_a_byte, cut_a_file, lose_a_file, lose_the_manifest, cut_the_manifest, be_of_another_format]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_last_good_one_used(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path, 1, 2)
    damage(tmp_path / "checkpoints" / "step-000002")
    with caplog.at_level(logging.WARNING, logger="packhorse"):
        assert found_step(tmp_path) == 1
    assert "step-000002" in caplog.text


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    publish(tmp_path, 1, 2)
    flip_a_byte(tmp_path / "checkpoints" / "step-000002")
    publish(tmp_path, 2)
    assert found_step(tmp_path) == 2


def test_a_killed_save_is_never_read_and_cleared_by_the_next(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    half = tmp_path / "checkpoints" / ".saving-step-000002"
    shutil.copytree(tmp_path / "checkpoints" / "step-000001", half)
    assert found_step(tmp_path) == 1
    publish(tmp_path, 3)
    assert not half.exists()
    assert found_step(tmp_path) == 3


def test_latest_is_not_trusted(tmp_path: Path) -> None:
    publish(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "latest").write_text("step-000099")
    assert found_step(tmp_path) == 2


def test_a_failed_write_publishes_nothing_and_prunes_nothing(tmp_path: Path) -> None:
    publish(tmp_path, 1)

    def fail(folder: Path) -> None:
        write(folder)
        raise OSError("the cable was pulled")

    with pytest.raises(OSError, match="cable"):
        checkpoint.publish(tmp_path, state(2), fail, keep=1, bytes_needed=0)
    assert found_step(tmp_path) == 1


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(1, 1, 2999))
    with pytest.raises(BadInput, match="make room"):
        publish(tmp_path, 1)
    assert found_step(tmp_path) is None


@pytest.mark.parametrize(
    ("other", "says"),
    [({"world_size": 2}, "--nproc 1"), ({"stage": 2}, "stage 3"), ({"data": "xyz"}, "training data")],
)
def test_a_resume_that_is_not_the_same_run_is_refused(other: dict, says: str) -> None:
    now = {"world_size": 1, "stage": 3, "data": "abc"}
    checkpoint.require_same_run(state(1), **now)
    with pytest.raises(BadInput, match=says):
        checkpoint.require_same_run(state(1), **{**now, **other})
