"""A checkpoint is complete or absent, and a damaged one is named and skipped (C7)."""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from packhorse.trainer import dist
from packhorse.trainer.checkpoint import checkpoint, saver
from packhorse.trainer.checkpoint.manifest import RunState, read_best
from packhorse.trainer.checkpoint.saver import Saver
from packhorse.trainer.config.recipe import CheckpointSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine import sharded_state
from packhorse.trainer.engine.sharded_state import (
    FROZEN,
    WEIGHT,
    Digests,
    Shards,
    Slice,
    add_digests,
    digest,
    digests_of,
)


@pytest.fixture(autouse=True)
def logs_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist.log, "propagate", True)


class Model:
    """What a Saver asks of an engine, with two parameters."""

    stage = 3

    def __init__(self, value: float = 1.0, base: float = 9.0) -> None:
        self.parameters = {"a": torch.full((500,), value), "b": torch.full((30,), value)}
        self.base = torch.full((10,), base)
        self.state = self

    def bytes(self) -> int:
        return 4 * 530

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(tensor.shape) for name, tensor in self.parameters.items()}

    def slices(self) -> Iterator[list[Slice]]:
        for name, tensor in self.parameters.items():
            yield [Slice(name, 0, {WEIGHT: tensor})]

    def frozen_digests(self) -> Digests:
        return {("base", FROZEN): digest(self.base)}

    def restore(self, files: Shards, steps: int) -> None:
        for group in self.slices():
            files.fill(group[0])

    def digests(self) -> Digests:
        found = self.frozen_digests()
        for group in self.slices():
            add_digests(found, digests_of(group))
        return found


def state(step: int) -> RunState:
    return RunState(
        step=step,
        updates=step,
        data="abc",
        micro_batch_size=1,
        recent_losses=[],
        world_size=1,
        stage=3,
    )


def publish(run_dir: Path, *steps: int, **section: Any) -> None:
    with Saver(run_dir, Model(), CheckpointSection(**section)) as saver:  # type: ignore[arg-type]
        for step in steps:
            saver.save(state(step))


def found_step(run_dir: Path) -> int | None:
    found = checkpoint.find(run_dir)
    return found[1].state.step if found else None


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_newest_is_found_and_older_ones_are_pruned(tmp_path: Path, asynchronous: bool) -> None:
    publish(tmp_path, 1, 2, 3, 10, keep=2, asynchronous=asynchronous)
    found = checkpoint.find(tmp_path)
    assert found
    assert found[0] == tmp_path / "checkpoints" / "step-000010"
    assert found[1].state == state(10)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step-000003",
        "step-000010",
    ]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000010"


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_best_one_is_spared_and_not_counted(tmp_path: Path, asynchronous: bool) -> None:
    bests = {1: None, 2: 2, 3: 2, 4: 2, 5: 2}
    section = CheckpointSection(keep=2, asynchronous=asynchronous)
    with Saver(tmp_path, Model(), section) as saver:  # type: ignore[arg-type]
        for step, best in bests.items():
            saver.save(state(step), best)
    assert names(tmp_path) == ["best", "latest", "step-000002", "step-000004", "step-000005"]
    assert (tmp_path / "checkpoints" / "best").read_text() == "step-000002"
    assert found_step(tmp_path) == 5


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_that_was_saved_before_it_was_evaluated_becomes_the_best(
    tmp_path: Path, asynchronous: bool
) -> None:
    section = CheckpointSection(keep=1, asynchronous=asynchronous)
    with Saver(tmp_path, Model(), section) as saver:  # type: ignore[arg-type]
        saver.save(state(1))
        saver.save(state(1), 1)
        assert (tmp_path / "checkpoints" / "best").read_text() == "step-000001"
        saver.save(state(2), 1)
    assert names(tmp_path) == ["best", "latest", "step-000001", "step-000002"]


def test_one_that_is_the_best_no_more_is_pruned_as_others_are(tmp_path: Path) -> None:
    with Saver(tmp_path, Model(), CheckpointSection(keep=1)) as saver:  # type: ignore[arg-type]
        for step, best in {1: 1, 2: 1, 3: 3, 4: 3}.items():
            saver.save(state(step), best)
    assert names(tmp_path) == ["best", "latest", "step-000003", "step-000004"]
    publish(tmp_path, 5, keep=1)  # a rule that was taken out
    assert names(tmp_path) == ["latest", "step-000005"]


def test_the_last_step_counts_damaged_checkpoints_and_no_copies(tmp_path: Path) -> None:
    publish(tmp_path, 1, 2, 10)
    lose_a_file(tmp_path / "checkpoints" / "step-000010")
    for name in ("step-000200-copy", "step-²", "step-"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert checkpoint.last_step(tmp_path) == 10
    with pytest.raises(ValueError, match="empty"):
        checkpoint.last_step(tmp_path / "empty")


def test_a_step_is_opened_or_refused_and_never_replaced_by_another(tmp_path: Path) -> None:
    publish(tmp_path, 1, 2, 3)
    assert checkpoint.open_checkpoint(tmp_path, 2)[1].state == state(2)
    with pytest.raises(BadInput, match=r"no checkpoint of step 7; there are: 1, 2, 3"):
        checkpoint.open_checkpoint(tmp_path, 7)
    lose_a_file(tmp_path / "checkpoints" / "step-000002")
    with pytest.raises(
        BadInput, match=r"step-000002 cannot be used: .*; put a whole one back, or .*: 1, 3"
    ):
        checkpoint.open_checkpoint(tmp_path, 2)
    with pytest.raises(BadInput, match="there is none at all"):
        checkpoint.open_checkpoint(tmp_path / "empty", 2)


def test_none_is_found_where_none_was_written(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path) is None


# ------------------------------------------------------------------------------------------- damage


def flip_a_byte(folder: Path) -> None:
    path = folder / "rank00000-000.safetensors"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def cut_a_file(folder: Path) -> None:
    path = folder / "rank00000-001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def lose_a_file(folder: Path) -> None:
    (folder / "rank00000-001.safetensors").unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def cut_the_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:40])


def flip_a_digit_of_the_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(re.sub(r'"step": \d+', '"step": 3', path.read_text()))


def lose_all_files(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def be_of_another_format(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


DAMAGES = [
    flip_a_byte,
    cut_a_file,
    lose_a_file,
    lose_the_manifest,
    cut_the_manifest,
    flip_a_digit_of_the_manifest,
    lose_all_files,
    be_of_another_format,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_last_good_one_used(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path, 1, 2)
    damage(tmp_path / "checkpoints" / "step-000002")
    with caplog.at_level(logging.WARNING, logger="packhorse"):
        assert found_step(tmp_path) == 1
    assert "step-000002" in caplog.text


def test_a_run_without_a_whole_one_is_not_begun_anew_without_a_word(tmp_path: Path) -> None:
    publish(tmp_path, 1, 2)
    for folder in (tmp_path / "checkpoints").glob("step-*"):
        be_of_another_format(folder)
    with pytest.raises(BadInput, match=r"none of its 2 checkpoints can be used .*format is 99"):
        checkpoint.find(tmp_path)


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    publish(tmp_path, 1, 2)
    flip_a_byte(tmp_path / "checkpoints" / "step-000002")
    publish(tmp_path, 2)
    assert found_step(tmp_path) == 2


def test_a_link_to_nowhere_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    """As where the disk to which a user has moved a checkpoint is away."""
    publish(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-000002").symlink_to(tmp_path / "away")
    publish(tmp_path, 2)
    assert found_step(tmp_path) == 2
    assert not (tmp_path / "checkpoints" / "step-000002").is_symlink()


def test_the_last_good_one_is_not_pruned_for_a_newer_damaged_one(tmp_path: Path) -> None:
    publish(tmp_path, 2, 6, keep=2)
    flip_a_byte(tmp_path / "checkpoints" / "step-000006")
    publish(tmp_path, 4, keep=1)
    assert found_step(tmp_path) == 4
    assert not (tmp_path / "checkpoints" / "step-000002").exists()
    publish(tmp_path, 6, keep=1)
    assert found_step(tmp_path) == 6


def test_what_is_put_beside_the_checkpoints_is_neither_read_nor_pruned(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    copy = tmp_path / "checkpoints" / "step-000001-copy"
    shutil.copytree(tmp_path / "checkpoints" / "step-000001", copy)
    flip_a_byte(copy)
    assert found_step(tmp_path) == 1
    publish(tmp_path, 2, keep=1)
    assert copy.exists()
    assert found_step(tmp_path) == 2


def test_one_that_was_moved_to_another_disk_is_pruned_there_by_its_link_alone(
    tmp_path: Path,
) -> None:
    publish(tmp_path, 1)
    there = tmp_path / "large"
    (tmp_path / "checkpoints" / "step-000001").rename(there)
    (tmp_path / "checkpoints" / "step-000001").symlink_to(there)
    assert found_step(tmp_path) == 1
    publish(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["latest", "step-000002"]
    assert (there / "manifest.json").is_file()


@pytest.mark.parametrize("text", [b"\xff\xfe", b"step-" + b"9" * 9000, b"", b"../x"])
def test_a_damaged_name_of_the_best_one_names_none(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "best").write_bytes(text)
    assert read_best(tmp_path) is None


@pytest.mark.parametrize("name", [".saving-step-000002", ".removing-step-000001"])
def test_what_a_kill_left_is_never_read_and_cleared_by_the_next_start(
    tmp_path: Path, name: str
) -> None:
    publish(tmp_path, 1)
    half = tmp_path / "checkpoints" / name
    shutil.copytree(tmp_path / "checkpoints" / "step-000001", half)
    assert found_step(tmp_path) == 1
    publish(tmp_path)
    assert not half.exists()
    assert found_step(tmp_path) == 1


def test_latest_is_not_trusted(tmp_path: Path) -> None:
    publish(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "latest").write_text("step-000099")
    assert found_step(tmp_path) == 2


# ------------------------------------------------------------------------------------- failed saves


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_write_publishes_nothing_and_prunes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    publish(tmp_path, 1)
    written = sharded_state.write

    def fail(path: Path, slices: list[Slice]) -> Any:
        if path.name == "rank00000-001.safetensors":
            raise OSError(28, "No space left on device")
        return written(path, slices)

    monkeypatch.setattr(sharded_state, "write", fail)
    with pytest.raises(BadInput, match="step 2 could not be written: the disk is full; make room"):
        publish(tmp_path, 2, keep=1, asynchronous=asynchronous)
    assert found_step(tmp_path) == 1
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in its place")
    with pytest.raises(BadInput, match=r"the checkpoints' folder cannot be used: .*File exists"):
        publish(tmp_path, 1)


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(saver.shutil, "disk_usage", lambda path: usage(1, 1, 2000))
    with pytest.raises(BadInput, match="make room"):
        publish(tmp_path, 1)
    assert found_step(tmp_path) is None


# ---------------------------------------------------------------------------------- beside training


def test_training_goes_on_while_a_copy_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, written = threading.Event(), sharded_state.write

    def slow(path: Path, slices: list[Slice]) -> Any:
        assert go.wait(30)
        return written(path, slices)

    monkeypatch.setattr(sharded_state, "write", slow)
    model: Any = Model(1.0)
    with Saver(tmp_path, model, CheckpointSection(asynchronous=True)) as saver:
        saver.save(state(1))
        assert found_step(tmp_path) is None
        for tensor in model.parameters.values():
            tensor.fill_(2.0)  # the next step
        go.set()
    found = checkpoint.find(tmp_path)
    assert found
    other = Model(0.0)
    checkpoint.restore(*found, other)  # type: ignore[arg-type]
    assert torch.equal(other.parameters["a"], torch.full((500,), 1.0)), (
        "what was saved is the state of step 1"
    )


def test_a_copy_that_does_not_fit_on_another_host_is_refused_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "gather", lambda mine: [mine, [mine[0], mine[0] - 1]])
    with pytest.raises(BadInput, match="GiB of a host's memory"):
        publish(tmp_path, 1, asynchronous=True)


def test_a_copy_that_does_not_fit_is_refused_where_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(saver.psutil, "virtual_memory", lambda: memory(2000))
    with pytest.raises(BadInput, match="the copy of the state takes"):
        publish(tmp_path, 1, asynchronous=True)
    publish(tmp_path, 1)
    assert found_step(tmp_path) == 1


# ------------------------------------------------------------------------------------------ restore


def test_a_tensor_that_was_not_restored_is_named(tmp_path: Path) -> None:
    class Forgetful(Model):
        def restore(self, files: Shards, steps: int) -> None:
            super().restore(files, steps)
            self.parameters["b"][7] = 0.0

    publish(tmp_path, 1)
    found = checkpoint.find(tmp_path)
    assert found
    with pytest.raises(RuntimeError, match=r"`b` \(weight\)"):
        checkpoint.restore(*found, Forgetful())  # type: ignore[arg-type]


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    found = checkpoint.find(tmp_path)
    assert found
    with pytest.raises(BadInput, match="`base`, which is not trained"):
        checkpoint.restore(*found, Model(base=8.0))  # type: ignore[arg-type]


def test_a_resume_that_is_not_the_same_run_is_refused() -> None:
    checkpoint.require_same_run(state(1), "abc", micro_batch_size=2, is_random=False)
    checkpoint.require_same_run(state(1), "abc", micro_batch_size=1, is_random=True)
    with pytest.raises(BadInput, match="training data"):
        checkpoint.require_same_run(state(1), "xyz", micro_batch_size=1, is_random=False)
    with pytest.raises(BadInput, match="micro_batch_size was 1 and is 2: the model draws random"):
        checkpoint.require_same_run(state(1), "abc", micro_batch_size=2, is_random=True)
