"""A step is evaluated once, even if the run is killed or stopped within an evaluation.

It ends with the numbers and answers of a run that was never interrupted.

Six steps of recipes/debug.yaml with sampled answers, evaluated before, in the middle and after,
saved every two steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from packhorse.trainer.utils.json_lines import read_json_lines
from tests.runs.killed import ForkServer, Point, Run, assert_same

pytestmark = pytest.mark.runs

GENERATE = "eval.generate={num_prompts: 3, max_new_tokens: 6, temperature: 1.0}"
FILES = ("evaluations.jsonl", "samples.jsonl")

LOSS_0, ANSWERS_0 = (
    Point("evaluate", "evaluation 0", call=2),
    Point("answers", "evaluation 0", call=2),
)
LOSS_3, ANSWERS_3 = (
    Point("evaluate", "evaluation 3", call=2),
    Point("answers", "evaluation 3", call=2),
)
ANSWERS_6 = Point("answers", "evaluation 6", call=2)
KILLS = {
    "in the held-out loss before training": LOSS_0,
    "in the answers before training": ANSWERS_0,
    "before the record of the evaluation before training": Point("record", "record 0"),
    "after the record of the evaluation before training": Point("record", "record 0", after=True),
    "in the held-out loss of step 3": LOSS_3,
    "in the answers of step 3": ANSWERS_3,
    "in the answers after training": ANSWERS_6,
    "before the record of the evaluation after training": Point("record", "record 6"),
    "after the record of the evaluation after training": Point("record", "record 6", after=True),
}
# The signal comes on this rank of so many, and these steps' evaluations have ended by then.
STOPS = {
    "in the held-out loss before training": (LOSS_0, 0, 1, []),
    "in the answers before training": (ANSWERS_0, 0, 1, []),
    "in the step before, so that an evaluation is due at the stop": (
        Point("step", call=2),
        0,
        1,
        [0],
    ),
    "in the answers of step 3": (ANSWERS_3, 0, 1, [0]),
    "in the answers of step 3, the second of two ranks": (
        Point("answers", "evaluation 3"),
        1,
        2,
        [0],
    ),
    "in the answers after training": (ANSWERS_6, 0, 1, [0, 3]),
}


def generating_run(fork_server: ForkServer, folder: Path, cache: Path) -> Run:
    made = Run(fork_server, folder, cache)
    made.overrides += (GENERATE,)
    return made


@pytest.fixture(scope="module")
def uninterrupted(
    fork_server: ForkServer, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """Return the run folders of runs that were never interrupted, by world size."""
    runs = {
        world: generating_run(fork_server, tmp_path_factory.mktemp(f"uninterrupted-{world}"), cache)
        for world in (1, 2)
    }
    for world, made in runs.items():
        made.finish(world)
    return {world: made.folder for world, made in runs.items()}


def lines(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return read_json_lines(run_dir / name)


def assert_evaluated_alike(run_dir: Path, other: Path) -> None:
    assert_same(run_dir, other)
    for name in FILES:
        assert lines(run_dir, name) == lines(other, name)


def test_each_evaluation_leaves_one_line(uninterrupted: dict[int, Path]) -> None:
    evaluations = lines(uninterrupted[1], "evaluations.jsonl")
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    logged = {
        line["step"]: line["eval/loss"]
        for line in lines(uninterrupted[1], "metrics.jsonl")
        if "eval/loss" in line
    }
    assert {line["step"]: line["eval_loss"] for line in evaluations} == logged
    samples = lines(uninterrupted[1], "samples.jsonl")
    assert [sample["step"] for sample in samples] == [0] * 3 + [3] * 3 + [6] * 3
    assert len({sample["answer"] for sample in samples}) > 3, (
        "answers that are all alike would show nothing"
    )


@pytest.mark.parametrize("name", KILLS)
def test_killed_in_an_evaluation(
    uninterrupted: dict[int, Path], fork_server: ForkServer, cache: Path, tmp_path: Path, name: str
) -> None:
    made = generating_run(fork_server, tmp_path, cache)
    made.die(1, KILLS[name])
    made.finish(1)
    assert_evaluated_alike(made.folder, uninterrupted[1])


@pytest.mark.parametrize("name", STOPS)
def test_stopped_in_an_evaluation(
    uninterrupted: dict[int, Path], fork_server: ForkServer, cache: Path, tmp_path: Path, name: str
) -> None:
    point, rank, world, evaluated = STOPS[name]
    made = generating_run(fork_server, tmp_path, cache)
    codes = made.start(world, point, rank=rank, stop=True)
    assert not any(codes), made.log_tail
    assert (made.folder / "stop.json").exists(), "it was not stopped"
    assert [line["step"] for line in lines(made.folder, "evaluations.jsonl")] == evaluated, (
        "half of one left a line"
    )
    made.finish(world)
    assert_evaluated_alike(made.folder, uninterrupted[world])
