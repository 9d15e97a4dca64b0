"""A streaming run is a function of its shard log: X2 and X3 for streaming sources (C1).

With the same log it learns the same, whenever its shards arrived, whether it was stopped, and on
any number of ranks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.numerics.compare import Run, case, difference, is_same, report, run_cases
from tests.ranks import ROOT


def cut(folder: Path, sizes: tuple[int, ...], present: int) -> Path:
    """Cut the debug recipe's rows into shards of these sizes; all but `present` end in `.later`."""
    folder.mkdir()
    lines = iter((ROOT / "recipes" / "debug" / "train.jsonl").read_text().splitlines(keepends=True))
    for number, size in enumerate(sizes):
        later = "" if number < present else ".later"
        (folder / f"{number}.jsonl{later}").write_text("".join(next(lines) for _ in range(size)))
    return folder


def used_shards(run_dir: Path) -> list[str]:
    return [
        json.loads(line)["file"] for line in (run_dir / "shards.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("growing")


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Run]:
    folder = cut(root / "folder", (14, 5, 12, 6), present=2)
    grows = [f"data.train=[{{path: {folder}, streaming: true}}]", "train.epochs=1", "train.steps=8"]

    def grown(**stop: int) -> dict[str, Any]:
        return case(root, "grown", "zero3", *grows, changes=["shards_appear"], **stop)

    stream = cut(root / "stream", (17, 20), present=2)  # files of other sizes than the shards
    streams = [f"data.train=[{{name: {stream}, streaming: true}}]", *grows[1:]]

    def streamed(name: str, **stop: int) -> dict[str, Any]:
        return case(root, name, "zero3", *streams, changes=["small_shards"], **stop)

    parts = [
        streamed("stopped-stream", stop_after=4),
        streamed("stopped-stream"),
        streamed("stream-whole"),
    ]
    first = run_cases({2: [grown(stop_after=5), grown(), *parts]})
    for name in ("1", "2"):
        (root / name).mkdir()
        shutil.copy(root / "grown" / "shards.jsonl", root / name)
    replays = {world: [case(root, str(world), "zero3", *grows)] for world in (1, 2)}
    return first | run_cases(replays)


def test_shards_arrive_in_training_and_are_repeated(root: Path, runs: dict[str, Run]) -> None:
    assert len(runs["grown"].losses) == 8
    assert used_shards(root / "grown") == [f"{number}.jsonl" for number in (0, 1, 2, 0, 3, 1)]


def test_x3_a_stopped_run_is_the_run_of_its_log(root: Path, runs: dict[str, Run]) -> None:
    assert used_shards(root / "2") == used_shards(root / "grown")
    assert is_same(runs["grown"], runs["2"])


def test_x3_a_stopped_stream_continues_at_its_position(root: Path, runs: dict[str, Run]) -> None:
    assert used_shards(root / "stopped-stream") == used_shards(root / "stream-whole")
    assert len(set(used_shards(root / "stream-whole"))) == 4
    assert is_same(runs["stopped-stream"], runs["stream-whole"])


def test_x2_the_number_of_ranks_changes_nothing(runs: dict[str, Run]) -> None:
    seen = difference(runs["2"], runs["1"])
    report("2 ranks against 1, growing", seen)
    assert seen.agrees
