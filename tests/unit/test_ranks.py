"""Tests that start ranks give up with the ranks' stacks."""

import pytest

from tests import ranks

SLEEP = "import time\ndef waits_for_ever():\n    time.sleep(1000)\n"
HANG = f"{SLEEP}waits_for_ever()"
RANK_0_FAILS = f"{SLEEP}import os\nos.environ['RANK'] == '0' and exit('broken')\nwaits_for_ever()"


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
