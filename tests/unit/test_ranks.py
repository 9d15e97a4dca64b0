"""Tests that start ranks give up with the ranks' stacks; ranks exchange values without pickles."""

import pytest

from packhorse.trainer import dist
from tests import ranks

SLEEP = "import time\ndef waits_for_ever():\n    time.sleep(1000)\n"
HANG = f"{SLEEP}waits_for_ever()"
RANK_0_FAILS = f"{SLEEP}import os\nos.environ['RANK'] == '0' and exit('broken')\nwaits_for_ever()"

EXCHANGE = """
import math
import pickle
from unittest import mock
from packhorse.trainer import dist
value = lambda rank: {"text": "\\ud800é" * rank * 1000, "numbers": [rank, 2**60, 1e-300, None]}
with dist.process_group():
    group = dist.new_group()
    with mock.patch.object(pickle, "Pickler", None), mock.patch.object(pickle, "Unpickler", None):
        assert dist.gather(value(dist.rank())) == [value(0), value(1), value(2)]
        assert dist.gather(value(2 - dist.rank()), group) == [value(2), value(1), value(0)]
        maxima = dist.max_over_ranks([float(dist.rank()), [0.0, math.nan, 0.0][dist.rank()]])
        assert maxima[0] == 2.0 and maxima[1] != maxima[1]
        assert dist.broadcast(value(2) if dist.is_main() else object()) == value(2)
        assert dist.run_on_rank0(lambda: open("/nowhere/x")) == (
            "[Errno 2] No such file or directory: '/nowhere/x'"
        )
"""


CLOSED = """
import os
from packhorse.trainer import dist
with dist.process_group():
    dist.close_group(dist.new_group())
    before = len(os.listdir("/proc/self/task"))
    for _ in range(3):
        group = dist.new_group()
        assert dist.gather(dist.rank(), group) == [0, 1]
        dist.close_group(group)
        del group
    dist.barrier()
    assert len(os.listdir("/proc/self/task")) == before
"""


def test_ranks_that_hang_are_ended_and_their_stacks_shown() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] of 2 did not end") as caught:
        ranks.run_ranks(2, ["-c", HANG], timeout_s=3)
    assert str(caught.value).count("in waits_for_ever") == 2


def test_ranks_that_outlive_a_failed_one_are_ended_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "SURVIVORS_S", 1.0)
    with pytest.raises(AssertionError, match=r"ranks \[1\] of 2 did not end") as caught:
        ranks.run_ranks(2, ["-c", RANK_0_FAILS], timeout_s=1000)
    assert "broken" in str(caught.value)
    assert "in waits_for_ever" in str(caught.value)


def test_ranks_return_what_they_print() -> None:
    assert ranks.run_ranks(2, ["-c", "import os; print(os.environ['RANK'])"]) == ["0\n", "1\n"]


def test_values_travel_between_ranks_without_a_pickle() -> None:
    ranks.run_ranks(3, ["-c", EXCHANGE])


def test_a_group_that_is_closed_leaves_no_thread() -> None:
    """A run that rolls back has one for the checkpoints of each of its attempts."""
    ranks.run_ranks(2, ["-c", CLOSED])


def test_a_single_rank_sees_its_values_as_several_ranks_would() -> None:
    assert dist.gather((1, 2)) == [[1, 2]]
    assert dist.broadcast((1, 2)) == [1, 2]
