"""A short campaign of kills and faults; `make chaos KILLS=1000` makes a long one."""

from pathlib import Path

import pytest

from tests import chaos
from tests.power_cut import drop_unsynced, sizes
from tests.runs.killed import KILLED, ForkServer, Point, Run, assert_same

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


@pytest.mark.parametrize("step", [0, 6])
def test_a_power_cut_after_an_evaluation_takes_none_of_its_lines(
    whole: dict[int, Path], run: Run, step: int
) -> None:
    """It is not repeated, so its line in metrics.jsonl must be on the disk before."""
    before, journal = sizes(run.folder), run.folder.with_name("synced")
    environ = {"FAULT_FOLDER": str(run.folder), "FAULT_SYNCED": str(journal)}
    point = Point("record", f"record {step}", after=True)
    assert run.start(1, point, environ=environ) == [KILLED], run.log_tail
    drop_unsynced(run.folder, before, journal)
    run.finish(1)
    assert_same(run.folder, whole[1])
