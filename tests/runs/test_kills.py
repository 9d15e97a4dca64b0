"""X5: a run that is killed at any moment and started again ends as if never killed.

Six steps of recipes/debug.yaml are evaluated before, in the middle and after. A checkpoint is saved
every two steps and the last one kept: the save of step 4 removes that of step 2. Every named point
must be reached. On the same number of ranks the rest of the run is the same bit for bit: the logged
numbers and the bytes of the last checkpoint. On another number it stays within the bounds of X4.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.numerics.compare import difference, read_run
from tests.runs.killed import KILLED, ForkServer, Point, Run, assert_same, logged

pytestmark = pytest.mark.runs

RANDOM_KILLS = 6

SAVES = {
    "in its first file": Point("digest", "saving-step-000004/rank00000-000", call=30),
    "before its first file's fsync": Point("fsync", "saving-step-000004/rank00000-000"),
    "after its first file's fsync": Point("fsync", "saving-step-000004/rank00000-000", after=True),
    "in its last file": Point("digest", "saving-step-000004/rank00000-001", call=5),
    "before its last file's fsync": Point("fsync", "saving-step-000004/rank00000-001"),
    "after its last file's fsync": Point("fsync", "saving-step-000004/rank00000-001", after=True),
    "before the manifest's fsync": Point("fsync", "saving-step-000004/.manifest"),
    "before the manifest has its name": Point("replace", "saving-step-000004/manifest"),
    "after the manifest has its name": Point("replace", "saving-step-000004/manifest", after=True),
    "after its folder's fsync": Point("fsync", "saving-step-000004$", after=True),
    "before it is published": Point("rename", "/step-000004"),
    "after it is published": Point("rename", "/step-000004", after=True),
    "before the fsync of latest": Point("fsync", r"\.latest", call=2),
    "before latest": Point("replace", "latest", call=2),
    "after latest, before the old one is put aside": Point("replace", "latest", call=2, after=True),
    "after the old one is put aside": Point("rename", "removing-step-000002", after=True),
    "in the removal of the old one": Point("unlink", "removing-step-000002", after=True),
    "after the old one's folder is gone": Point("rmdir", "removing-step-000002", after=True),
}
SYNCHRONOUS = (
    "in its first file",
    "before its last file's fsync",
    "before the manifest has its name",
    "before it is published",
    "after it is published",
    "in the removal of the old one",
)
MEANWHILE = {
    "in a file, training going on": Point(
        "digest", "saving-step-000004/rank00000-000", call=30, meanwhile=True
    ),
    "before it is published, training going on": Point("rename", "/step-000004", meanwhile=True),
    "in the removal of the old one, training going on": Point(
        "unlink", "removing-step-000002", meanwhile=True
    ),
}
ELSEWHERE = {
    "while the first checkpoint is written": Point("fsync", "saving-step-000002/rank00000-000"),
    "while the last checkpoint is published": Point("rename", "/step-000006"),
    "after the last checkpoint is published": Point("rename", "/step-000006", after=True),
    "while the last but one is removed": Point("unlink", "removing-step-000004"),
    "before the recipe is written": Point("replace", "/recipe.yaml"),
    "while the model is loaded": Point("load"),
    "in the evaluation before training": Point("evaluate", "evaluation 0", call=2),
    "in the first step": Point("step"),
    "in the third step": Point("step", call=3),
    "in the evaluation of step 3": Point("evaluate", "evaluation 3", call=2),
    "after the evaluation of step 3": Point("evaluation", "evaluation 3", after=True),
    "in the evaluation after training": Point("evaluate", "evaluation 6", call=2),
    "before the summary is written": Point("replace", "/summary.json"),
    "after the summary is written": Point("replace", "/summary.json", after=True),
}
RESUMES = {
    "while the recipe is written": Point("fsync", r"\.recipe.yaml"),
    "while checksums are read": Point("checksum", "step-000004/rank00000-001"),
    "while the state is read": Point("fill", call=10),
    "when the state is read": Point("restore", after=True),
    "while metrics.jsonl is shortened": Point("fsync", r"\.metrics.jsonl"),
    "when metrics.jsonl is shortened": Point("replace", "/metrics.jsonl", after=True),
    "in the first step of the resumed run": Point("step"),
    "in the save of the resumed run": Point("rename", "/step-000006"),
}
PREPARATIONS = {
    "before the first rows are safe": Point("fsync", r"documents.*\.build-.*/input_ids"),
    "while rows are made safe": Point("fsync", r"documents.*\.build-.*/offsets", call=3),
    "when some rows are safe": Point("replace", "/progress.json", call=2, after=True),
    "when all rows are safe": Point("replace", "/progress.json", call=6, after=True),
    "before the report": Point("replace", "/report.json"),
    "before the cache is published": Point("rename", r"/documents-\w*$"),
    "after the cache is published": Point("rename", r"/documents-\w*$", after=True),
    "while the held-out rows are prepared": Point(
        "fsync", r"documents.*\.build-.*/input_ids", call=10
    ),
}
RANKS = {
    "rank 1 in its file": (1, Point("digest", "saving-step-000004/rank00001-000", call=10)),
    "rank 1 before its file's fsync": (1, Point("fsync", "saving-step-000004/rank00001-000")),
    "rank 1 after its last file's fsync": (
        1,
        Point("fsync", "saving-step-000004/rank00001-001", after=True),
    ),
    "rank 0 before it publishes": (0, Point("rename", "/step-000004")),
    "rank 0 after it published": (0, Point("rename", "/step-000004", after=True)),
    "rank 0 in the removal of the old one": (
        0,
        Point("unlink", "removing-step-000002", after=True),
    ),
    "rank 1 in a step": (1, Point("step", call=5)),
    "rank 1 in the evaluation of step 3": (1, Point("evaluate", "evaluation 3")),
}


# ----------------------------------------------------------------------------------- the same world


@pytest.mark.parametrize("name", SAVES)
def test_killed_in_an_asynchronous_save(whole: dict[int, Path], run: Run, name: str) -> None:
    run.die(1, SAVES[name])
    run.finish(1)
    assert_same(run.folder, whole[1])


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_killed_in_a_synchronous_save(whole: dict[int, Path], run: Run, name: str) -> None:
    run.overrides += ("checkpoint.asynchronous=false",)
    run.die(1, SAVES[name])
    run.finish(1)
    assert_same(run.folder, whole[1])


@pytest.mark.parametrize("name", MEANWHILE)
def test_killed_in_a_save_while_training_goes_on(
    whole: dict[int, Path], run: Run, name: str
) -> None:
    run.die(1, MEANWHILE[name])
    assert logged(run.folder)[-1]["step"] > 4, "training waited for the save"
    run.finish(1)
    assert_same(run.folder, whole[1])


@pytest.mark.parametrize("name", ELSEWHERE)
def test_killed_elsewhere(whole: dict[int, Path], run: Run, name: str) -> None:
    run.die(1, ELSEWHERE[name])
    run.finish(1)
    assert_same(run.folder, whole[1])


@pytest.fixture(scope="module")
def half_way(
    fork_server: ForkServer, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of a run that was killed in step 6, with a checkpoint of step 4."""
    run = Run(fork_server, tmp_path_factory.mktemp("half-way"), cache)
    run.die(1, Point("step", call=6))
    assert (run.folder / "checkpoints" / "step-000004").exists()
    return run.folder


@pytest.mark.parametrize("name", RESUMES)
def test_killed_in_a_resume(whole: dict[int, Path], half_way: Path, run: Run, name: str) -> None:
    shutil.copytree(half_way, run.folder)
    run.die(1, RESUMES[name])
    run.finish(1)
    assert_same(run.folder, whole[1])


@pytest.mark.parametrize("name", PREPARATIONS)
def test_killed_in_the_preparation(
    whole: dict[int, Path], fork_server: ForkServer, tmp_path: Path, name: str
) -> None:
    run = Run(fork_server, tmp_path, tmp_path / "cache")
    run.die(1, PREPARATIONS[name])
    run.finish(1)
    assert_same(run.folder, whole[1])
    assert not list((tmp_path / "cache").glob("*.build-*")), "what the kill left is still there"


@pytest.mark.parametrize("name", RANKS)
def test_one_of_two_ranks_killed(whole: dict[int, Path], run: Run, name: str) -> None:
    rank, point = RANKS[name]
    run.die(2, point, rank)
    run.finish(2)
    assert_same(run.folder, whole[2])


# ------------------------------------------------------------------------------------ another world


@pytest.mark.parametrize(
    ("world", "then", "point"),
    [
        (2, 1, SAVES["before it is published"]),
        (2, 3, SAVES["in the removal of the old one"]),
        (1, 2, SAVES["in its first file"]),
        (1, 2, SAVES["after it is published"]),
    ],
)
def test_killed_and_resumed_by_another_world(
    whole: dict[int, Path], run: Run, world: int, then: int, point: Point
) -> None:
    run.die(world, point)
    run.finish(then)
    starts: dict[str, Any] = {}
    seen = difference(read_run(whole[world], starts), read_run(run.folder, starts))
    assert seen.agrees, seen


# --------------------------------------------------------------------------------------- any moment


@pytest.mark.parametrize("seed", range(RANDOM_KILLS))
def test_killed_at_a_random_moment(
    whole: dict[int, Path], fork_server: ForkServer, cache: Path, tmp_path: Path, seed: int
) -> None:
    """One of two ranks is killed, or both at once, as when the launcher's process tree is killed.

    A third of the kills fall into the start, the others after the first logged step.
    """
    drawn = random.Random(seed)
    victims = [0, 1] if seed % 2 else [drawn.randrange(2)]
    starting = seed % 3 == 0
    delay_s = drawn.uniform(0.0, 1.5)  # which is about what either takes
    while True:
        folder = tmp_path / f"after-{delay_s:.3f}s"
        folder.mkdir()
        run = Run(fork_server, folder, cache)
        log = run.folder / "metrics.jsonl"
        codes = run.start(
            2, victims=victims, after_s=delay_s, after_file=None if starting else str(log)
        )
        if all(codes[rank] == KILLED for rank in victims):
            break
        delay_s *= 0.7  # the run had ended before
    lines = len(logged(run.folder)) if log.exists() else 0
    print(f"\n  ranks {victims} killed after {lines} lines of the log", end="")
    run.finish(2)
    assert_same(run.folder, whole[2])
