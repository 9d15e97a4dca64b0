"""checkpoint.mirror: what is copied, what comes back, and what a broken place says.

On servers of S3, Google Cloud Storage and Azure, and on a folder.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from packhorse.trainer.checkpoint import mirror as mirrors
from packhorse.trainer.checkpoint.mirror import Mirror, open_mirror
from packhorse.trainer.checkpoint.saver import Saver
from packhorse.trainer.config.recipe import Recipe, load_recipe
from packhorse.trainer.config.sections import CheckpointSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.run_folder import open_run_folder
from tests.azure import azure_server
from tests.gcs import gcs_server
from tests.ranks import ROOT
from tests.s3 import SECRET, s3_server
from tests.unit.test_checkpoint import Model, found_step, names, state


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server("mirrors") as url:
        yield url


@pytest.fixture(scope="module")
def buckets(bucket: str) -> Iterator[dict[str, str]]:
    with gcs_server("mirrors") as gs, azure_server("mirrors") as az:
        yield {"s3": bucket, "gs": gs, "az": az}


@pytest.fixture(params=["s3", "file"])
def place(request: Any, buckets: dict[str, str], tmp_path: Path) -> str:
    """Return the URL of an empty place."""
    return f"{buckets.get(request.param, f'file://{tmp_path}')}/{tmp_path.name}"


def recipe(run_dir: Path, place: str, *overrides: str) -> Recipe:
    fixed = [f"run.dir={run_dir}", f"checkpoint.mirror={place}", "checkpoint.keep=2"]
    return load_recipe(ROOT / "recipes" / "debug.yaml", [*fixed, *overrides])


def start(run_dir: Path, place: str, *overrides: str) -> Mirror:
    """Begin a run as train.py does, up to its first step."""
    parsed = recipe(run_dir, place, *overrides)
    mirror = open_mirror(parsed, run_dir)
    open_run_folder(parsed, run_dir)
    assert mirror
    return mirror


def save(mirror: Mirror, run_dir: Path, *steps: int, best: int | None = None) -> None:
    section = CheckpointSection(keep=2)
    with Saver(run_dir, Model(), section, mirror) as saver:  # type: ignore[arg-type]
        for step in steps:
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step}) + "\n")
            saver.save(state(step), best)
            saver.wait()
            wait(mirror)


def wait(mirror: Mirror) -> None:
    while mirror._thread is not None:
        mirror._thread.join()


@pytest.mark.parametrize("place", ["file"], indirect=True)
@pytest.mark.parametrize(
    "name", ["../recipe.yaml", "/recipe.yaml", "../tensorboard/x", "tensorboard/..", "secrets.json"]
)
def test_an_archive_writes_no_other_files_than_a_runs(tmp_path, place, name):
    save(start(tmp_path / "first", place), tmp_path / "first", 10)
    packed = Path(place.removeprefix("file://")) / "step-000010" / "run.zip"
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr(name, "of somebody else")
    with pytest.raises(BadInput, match=f"run.zip holds {name}"):
        start(tmp_path / "outer" / "second", place)
    assert not any("of somebody" in p.read_text() for p in (tmp_path / "outer").rglob("*.*ml"))
    assert not (tmp_path / "outer" / "second" / "checkpoints" / "step-000010").exists()


@pytest.mark.parametrize("place", ["file"], indirect=True)
def test_an_archive_that_unfolds_to_more_than_there_is_room_is_refused(
    tmp_path, place, monkeypatch
):
    save(start(tmp_path / "first", place), tmp_path / "first", 10)
    packed = Path(place.removeprefix("file://")) / "step-000010" / "run.zip"
    with zipfile.ZipFile(packed, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("trace.jsonl", b"\0" * (64 << 20))
    assert packed.stat().st_size < 1 << 20
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=32 << 20))
    with pytest.raises(BadInput, match=r"needs 0.06 GiB and 0.03 GiB are free"):
        start(tmp_path / "second", place)
    assert not (tmp_path / "second" / "trace.jsonl").exists()


@pytest.mark.parametrize("place", ["s3", "gs", "az", "file"], indirect=True)
def test_a_fresh_folder_takes_up_the_newest_and_the_best_checkpoint(tmp_path, place):
    first, fresh = tmp_path / "first", tmp_path / "fresh"
    mirror = start(first, place)
    (first / "tensorboard").mkdir()
    (first / "tensorboard" / "events.1").write_bytes(b"curves")
    save(mirror, first, 2, 4, 6, 8, best=2)
    mirror.finish(is_done=False)
    there = mirrors.Place(place)
    assert there.whole_steps() == [2, 6, 8], "as many as in the run folder, and the best"
    start(fresh, place)
    assert found_step(fresh) == 8
    assert names(fresh) == ["best", "step-000002", "step-000008"]
    for name in ("recipe.yaml", "metrics.jsonl", "tensorboard/events.1"):
        assert (fresh / name).exists()
    assert (fresh / "metrics.jsonl").read_bytes() == (first / "metrics.jsonl").read_bytes()
    # a start that is behind the mirror takes the newer checkpoint, one that is ahead keeps its own
    again = start(first, place)
    save(again, first, 10, best=2)
    start(fresh, place)
    assert found_step(fresh) == 10
    mirror = start(first, place)
    there.remove("step-000010")
    start(fresh, place)
    assert found_step(fresh) == 10
    mirror.offer(10)  # as a start does that finds it missing
    mirror.finish(is_done=False)
    assert there.whole_steps() == [2, 8, 10]


@pytest.mark.parametrize("place", ["file"], indirect=True)
def test_what_comes_down_is_written_through_no_link(tmp_path, place):
    save(start(tmp_path / "first", place), tmp_path / "first", 10)
    shard, *_ = (tmp_path / "first" / "checkpoints" / "step-000010").glob("rank*")
    fresh, mine = tmp_path / "fresh", tmp_path / "mine"
    fetched = fresh / "checkpoints" / ".fetching-step-000010" / shard.name
    fetched.parent.mkdir(parents=True)
    mine.write_text("mine")
    for link in (fresh / ".metrics.jsonl.new", fetched):
        link.symlink_to(mine)
    start(fresh, place)
    assert found_step(fresh) == 10
    assert mine.read_text() == "mine"
    assert not any(path.is_symlink() for path in fresh.rglob("*"))


def test_what_a_run_has_at_its_end_is_copied_too(tmp_path, place):
    mirror = start(tmp_path / "first", place)
    save(mirror, tmp_path / "first", 2)
    (tmp_path / "first" / "summary.json").write_text("{}")
    mirror.finish(is_done=True)
    start(tmp_path / "fresh", place)
    assert (tmp_path / "fresh" / "summary.json").read_text() == "{}"


def test_a_damaged_or_unfinished_copy_is_passed_over(tmp_path, place, caplog):
    save(start(tmp_path / "first", place), tmp_path / "first", 2, 4)
    there = mirrors.Place(place)
    there.fs.pipe_file(there.path("step-000006/rank00000-000.safetensors"), b"half")
    file = there.path("step-000004/rank00000-000.safetensors")
    whole = there.fs.cat_file(file)
    there.fs.pipe_file(file, whole[:-1] + bytes([whole[-1] ^ 1]))
    with caplog.at_level(logging.INFO, "packhorse"):
        start(tmp_path / "fresh", place)
    assert found_step(tmp_path / "fresh") == 2
    assert "skipping step-000004: rank00000-000.safetensors has other bytes" in caplog.text
    there.fs.rm_file(there.path("step-000002/rank00000-000.safetensors"))
    with pytest.raises(BadInput, match=r"none of the checkpoints in .* is whole"):
        start(tmp_path / "fresher", place)
    # what is not whole goes with the next copy
    mirror = start(tmp_path / "first", place)
    save(mirror, tmp_path / "first", 6, 8)
    assert there.whole_steps() == [6, 8]
    assert not [name for name in there.names() if name not in _expected(6, 8)]


@pytest.mark.parametrize("place", ["file"], indirect=True)
def test_what_a_user_keeps_beside_the_copies_stays(tmp_path, place):
    run, there = tmp_path / "run", Path(place.removeprefix("file://"))
    mirror = start(run, place)
    save(mirror, run, 10)
    shutil.copytree(there / "step-000010", there / "step-000010-before-the-new-data")
    shutil.copytree(there / "step-000010", there / "step-10")
    (there / "step-notes.txt").write_text("mine")
    (there / "step-000015").mkdir()  # a copy that came to no end
    save(mirror, run, 20, 30, 40)
    kept = {"step-000010-before-the-new-data", "step-10", "step-notes.txt"}
    assert {path.name for path in there.glob("step-*")} == {"step-000030", "step-000040", *kept}


def _expected(*steps: int) -> set[str]:
    return {"best", "recipe.yaml", *(f"step-{step:06d}" for step in steps)}


def test_a_place_of_others_is_refused_and_left_alone(tmp_path, place):
    there = mirrors.Place(place)
    there.write("notes.txt", b"mine")
    with pytest.raises(BadInput, match="holds files that no run has copied there"):
        start(tmp_path / "run", place)
    assert there.names() == ["notes.txt"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("url", ["memory://x", "file://RUN", "file://RUN/copies", "local://RUN/x"])
def test_a_place_that_goes_with_the_run_is_refused(tmp_path, url):
    run = tmp_path / "run"
    with pytest.raises(BadInput, match=r"is lost together with run\.dir"):
        start(run, url.replace("RUN", str(run)))
    assert not any(run.rglob("*"))


@pytest.mark.parametrize("url", ["ftp://127.0.0.1:1/x", "zip://x::file:///etc/passwd", "dir:///x"])
def test_a_store_that_does_not_open_is_a_sentence(tmp_path, url):
    with pytest.raises(BadInput, match=url.partition(":")[0]):
        start(tmp_path / "run", url)


def test_the_run_of_another_recipe_is_refused(tmp_path, place):
    save(start(tmp_path / "first", place), tmp_path / "first", 2)
    with pytest.raises(BadInput, match=r"a run of another recipe, which differs in optim\.lr"):
        start(tmp_path / "fresh", place, "optim.lr=1e-3")
    assert not (tmp_path / "fresh").exists()
    start(tmp_path / "fresh", place, "eval.every_steps=5")  # may change (C8)


def test_a_copy_that_fails_is_tried_again_and_only_the_end_insists(
    tmp_path, bucket, caplog, monkeypatch
):
    monkeypatch.setattr(mirrors, "_PAUSE_S", 0.0)
    run_dir, place = tmp_path / "run", f"{bucket}/fails"
    mirror = start(run_dir, place)
    put = mirror._place.fs.put_file
    broken = threading.Event()
    broken.set()

    def put_file(*arguments: Any) -> None:
        if broken.is_set():
            raise ConnectionError("the line is cut")
        put(*arguments)

    monkeypatch.setattr(mirror._place.fs, "put_file", put_file)
    with caplog.at_level(logging.INFO, "packhorse"):
        save(mirror, run_dir, 2)
        assert "step 2 could not be copied" in caplog.text
        assert "the line is cut); the next checkpoint tries again" in caplog.text
        mirror.finish(is_done=False)  # stopped: the next start copies it
        with pytest.raises(BadInput, match=r"done and whole.*, but was not copied.*line is cut"):
            mirror.finish(is_done=True)
        assert mirror._place.whole_steps() == []
        broken.clear()
        save(mirror, run_dir, 4)
        mirror.finish(is_done=True)
    assert mirror._place.whole_steps() == [4]
    assert SECRET not in caplog.text


def test_a_checkpoint_stays_until_it_is_copied(tmp_path, bucket, monkeypatch):
    run_dir = tmp_path / "run"
    mirror = start(run_dir, f"{bucket}/slow")
    put, go, begun = mirror._place.fs.put_file, threading.Event(), threading.Event()

    def put_file(*arguments: Any) -> None:
        begun.set()
        assert go.wait(60)
        put(*arguments)

    monkeypatch.setattr(mirror._place.fs, "put_file", put_file)
    section = CheckpointSection(keep=1)
    with Saver(run_dir, Model(), section, mirror) as saver:  # type: ignore[arg-type]
        saver.save(state(1))
        assert begun.wait(60)
        for step in (2, 3, 4):  # training does not wait
            saver.save(state(step))
        saver.wait()
        assert names(run_dir) == ["latest", "step-000001", "step-000003", "step-000004"]
        go.set()
    mirror._keep = 1
    mirror.finish(is_done=False)
    assert mirror._place.whole_steps() == [4], "2 and 3 were overtaken, and 1 is older"
    assert names(run_dir) == ["latest", "step-000004"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("runs/one", "it is a URL, as s3://bucket/folder"),
        ("s3://key:secret@bucket/x", "may hold no credentials"),
        ("az://box/x?sig=abc", "may hold no credentials"),
    ],
)
def test_a_url_is_plain_and_holds_no_secret(tmp_path, url, message):
    with pytest.raises(BadInput, match=message):
        recipe(tmp_path, url)


def test_a_place_that_cannot_be_reached_says_what_to_do(tmp_path, bucket, monkeypatch):
    with pytest.raises(BadInput, match=r"s3://gone/x cannot be used \(FileNotFoundError.*bucket"):
        start(tmp_path / "run", "s3://gone/x")
    with pytest.raises(BadInput, match="nowhere://x"):
        start(tmp_path / "run", "nowhere://x")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(BadInput, match="the credentials in the environment"):
        start(tmp_path / "run", f"{bucket}/none")
