"""A short campaign of kills and faults; `make chaos KILLS=1000` makes a long one."""

from pathlib import Path

import pytest

from tests import chaos
from tests.runs.killed import ForkServer

pytestmark = pytest.mark.runs


def test_runs_that_meet_faults_at_random_learn_the_same(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    made = chaos.Campaign(fork_server, tmp_path)
    trials = [
        {"killed": kind, **made.trial(kind, f"1-{number}", most=1)}
        # test_kills.py kills ranks, and the launcher's starts take long
        for number, kind in enumerate(chaos.FORKED[3:])
    ]
    differences = [trial for trial in trials if trial["difference"]]
    assert not differences, differences
    assert f"| all | {sum(trial['kills'] for trial in trials)} |" in chaos.table(trials)
