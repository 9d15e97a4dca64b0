"""A run whose shards come while it trains, killed and started again, is the run with that log that
was never killed.
"""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from tests.numerics.test_same_log import cut, uses
from tests.runs.killed import ForkServer, Point, Run, assert_same

pytestmark = pytest.mark.runs

POINTS = {
    "before the log's first line is safe": (1, Point("fsync", r"shards\.jsonl")),
    "before a line is safe that no checkpoint knows of": (
        1,
        Point("fsync", r"shards\.jsonl", call=4),
    ),
    "after it": (2, Point("fsync", r"shards\.jsonl", call=4, after=True)),
    "in the middle of a shard": (2, Point("line", call=5)),
}


def bring(folder: Path, log: Path) -> threading.Thread:
    """A producer: for each two lines of the log another shard gets its name. Its time is nobody's."""

    def rename() -> None:
        for number, later in enumerate(sorted(folder.glob("*.later")), start=1):
            while not log.exists() or log.read_bytes().count(b"\n") < 2 * number:
                time.sleep(0.01)
            later.rename(later.with_suffix(""))

    thread = threading.Thread(target=rename, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("where", POINTS)
def test_killed_and_started_again_it_is_the_run_of_its_log(
    fork_server: ForkServer, cache: Path, tmp_path: Path, where: str
) -> None:
    world, point = POINTS[where]
    folder = cut(tmp_path / "folder", (14, 5, 12, 6), present=2)

    def start_of(name: str) -> Run:
        (tmp_path / name).mkdir()
        run = Run(fork_server, tmp_path / name, cache)
        run.overrides += (
            f"data.train=[{{path: {folder}, streaming: true}}]",
            "train.epochs=1",
            "train.steps=8",
        )
        return run

    run, replay = start_of("killed"), start_of("replay")
    producer = bring(folder, run.folder / "shards.jsonl")
    run.die(world, point)
    run.finish(world)
    producer.join(10)
    assert set(uses(run.folder)) == {f"{number}.jsonl" for number in range(4)}
    replay.folder.mkdir()
    shutil.copy(run.folder / "shards.jsonl", replay.folder)
    replay.finish(world)
    assert_same(run.folder, replay.folder)
    assert uses(run.folder) == uses(replay.folder)
