"""A short campaign of kills at random moments; `make chaos KILLS=1000` makes a long one."""

from pathlib import Path

import pytest

from tests import chaos
from tests.runs.killed import ForkServer

pytestmark = pytest.mark.runs


def test_runs_that_are_killed_at_random_learn_the_same(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    # without the launcher's starts, which are slow
    trials = chaos.campaign(fork_server, 4, 1, tmp_path / "chaos.jsonl", chaos.KINDS[:-1])
    differences = [trial["difference"] for trial in trials if trial["difference"]]
    assert not differences, differences
    assert f"| all | {sum(trial['kills'] for trial in trials)} |" in chaos.table(trials)
