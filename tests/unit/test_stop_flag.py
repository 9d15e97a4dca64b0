"""One flag for all ranks, also before they have a process group."""

import os
import signal
import threading
import time
from unittest import mock

import pytest
from torch.distributed import HashStore

from packhorse.trainer import stop_flag
from packhorse.trainer.config.recipe import parse_recipe
from packhorse.trainer.stop_flag import StopFlag
from packhorse.trainer.train import stop_in_time


@pytest.fixture(autouse=True)
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def flags(monkeypatch) -> list[StopFlag]:
    """Return the flags of two ranks."""
    store = HashStore()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(stop_flag, "_launchers_store", lambda: store)
    return [StopFlag(), StopFlag()]


def met(flags: list[StopFlag], delay_s: float = 0.0) -> list[bool]:
    """Return what `wait_for_ranks` returns on each rank; the second one comes later."""
    answers: dict[int, bool] = {}

    def meet(rank: int) -> None:
        time.sleep(rank * delay_s)
        answers[rank] = flags[rank].wait_for_ranks()

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [answers[rank] for rank in (0, 1)]


def test_ranks_that_nobody_stops_meet(flags):
    assert not flags[0].raised_early()
    assert met(flags, delay_s=0.3) == [True, True]
    flags[0].raised = True
    assert not flags[1].raised_early(), "from here on the process group tells"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_came_before_the_flag_raises_it(number):
    """The launcher starts ranks with these signals blocked."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    # not to the process: a thread that an earlier test left may not block it, and would take it
    signal.pthread_kill(threading.get_ident(), number)
    assert StopFlag().raised


def test_one_flag_stops_the_others_in_preparation_and_at_the_meeting(flags):
    flags[1].raised = True
    assert flags[1].raised_early()
    assert flags[0].raised_early()
    assert met(flags) == [False, False]


def test_a_flag_that_goes_up_while_waiting_stops_those_who_come_later(flags):
    threading.Timer(0.2, lambda: setattr(flags[0], "raised", True)).start()
    assert met(flags, delay_s=0.6) == [False, False]


def test_without_other_ranks_the_own_flag_counts():
    flag = StopFlag()
    assert not flag.raised_early()
    assert flag.wait_for_ranks()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert flag.raised_early()
    assert not flag.wait_for_ranks()


@pytest.mark.parametrize(
    ("before_s", "end_in_s", "raised"), [(50, 50.2, True), (50, 60, False), (None, 0, False)]
)
def test_the_flag_goes_up_before_the_jobs_end(monkeypatch, before_s, end_in_s, raised):
    recipe = parse_recipe(
        {
            "model": {"name": "m"},
            "data": {"train": [{"path": "x"}]},
            "run": {"dir": "r"},
            "checkpoint": {"before_timeout_s": before_s},
        }
    )
    flag = StopFlag()
    stop_in_time(recipe, flag)  # Slurm tells no end
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + end_in_s)))
    stop_in_time(recipe, flag)
    time.sleep(0.5)
    assert flag.raised is raised


def test_the_flag_goes_up_after_the_hours_of_a_start() -> None:
    tree = {"model": {"name": "m"}, "data": {"train": [{"path": "x"}]}, "run": {"dir": "r"}}
    flag = StopFlag()
    recipe = parse_recipe({**tree, "train": {"max_hours": 1e-5}})
    assert recipe.fixed() == parse_recipe(tree).fixed(), "a resumed run may have another limit"
    stop_in_time(recipe, flag)
    for _ in range(1000):
        if flag.raised:
            break
        time.sleep(0.01)
    assert flag.raised


def test_a_time_too_far_for_a_timer_is_never_reached(monkeypatch) -> None:
    """As Slurm's end of a job without a limit may be."""
    timer = mock.Mock()
    monkeypatch.setattr(threading, "Timer", timer)
    StopFlag().raise_at(1e18)
    assert 1e9 < timer.call_args.args[0] <= threading.TIMEOUT_MAX


def test_a_rank_that_stands_still_before_the_meeting_is_named(flags, monkeypatch, caplog) -> None:
    monkeypatch.setattr(stop_flag, "BEAT_S", 0.02)
    monkeypatch.setattr(stop_flag, "SILENT_S", 0.3)
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    store = stop_flag._launchers_store()
    for rank in (0, 1):
        threading.Thread(target=stop_flag._beat, args=(store, rank, ended), daemon=True).start()
    assert not ended.wait(1.0), "both are alive"
    # rank 1 beats no more; rank 0 watches it
    ended.set()
    time.sleep(0.1)
    ended.clear()
    stop_flag._beat(store, 0, ended)
    assert codes == [1]
    assert "rank 1 has given no sign of life" in caplog.text


def test_a_second_sigterm_ends_what_does_not_stop_before_the_first_step(monkeypatch) -> None:
    monkeypatch.setattr(stop_flag, "_AGAIN_S", 0.2)
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    flag = StopFlag()
    for _ in range(2):  # one signal that came by two ways
        os.kill(os.getpid(), signal.SIGTERM)
    assert flag.raised
    assert codes == []
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGTERM)
    assert codes == [75]
    assert not flag.wait_for_ranks()
    os.kill(os.getpid(), signal.SIGTERM)
    assert codes == [75], "a save must not be cut short"
