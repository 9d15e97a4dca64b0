"""A short campaign of kills at random moments; `make chaos KILLS=1000` makes a long one."""

from pathlib import Path

import pytest

from tests import chaos

pytestmark = pytest.mark.runs


def test_runs_that_are_killed_at_random_learn_the_same(tmp_path: Path) -> None:
    # without the launcher's starts, which are slow
    trials = chaos.campaign(5, 1, tmp_path / "chaos.jsonl", kinds=chaos.KINDS[:-1])
    differences = [trial["difference"] for trial in trials if trial["difference"]]
    assert not differences, differences
    assert f"| all | {sum(trial['kills'] for trial in trials)} |" in chaos.table(trials)
