"""A call in a helper process: its result, or the error that it took too long or failed."""

import multiprocessing
import os
import re
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from packhorse.trainer.config.adapter import AdapterSection
from packhorse.trainer.config.optim import OptimGroup, OptimSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine.optim import parameter_groups
from packhorse.trainer.model.lora import adapter_targets
from packhorse.trainer.model.reach import freeze_named
from packhorse.trainer.utils import time_limit
from packhorse.trainer.utils.time_limit import (
    Failed,
    Killed,
    OutOfTime,
    bounded,
    interrupted_after,
    many_interruptions,
    names_matching,
)
from tests.model_helpers import tiny_llama

ENDLESS = r"^(a+)+b$"  # at a name of many a, it backtracks without end


def double(number):
    return 2 * number


def doubled_beside(number):
    return bounded(double, number, limit_s=10.0)


def one_c_function():
    return 7 ** (10**9)


def backtrack(pattern, text):
    return re.fullmatch(pattern, text) is not None


def take_memory():
    return len(bytearray(64 << 30))


def double_after_a_signal(number, mark):
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return 2 * number


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def raise_key_error():
    raise KeyError("x")


def test_the_result_comes_back():
    assert bounded(double, 4, limit_s=10.0) == 8


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(one_c_function, ()), (backtrack, ("(a+)+b", "a" * 64))],
    ids=["one C function", "a pattern that backtracks"],
)
def test_what_does_not_end_takes_too_long_and_the_next_call_is_answered(function, arguments):
    """The limit is the kernel's: Python's own handlers wait while one long operation runs."""
    with pytest.raises(OutOfTime):
        bounded(function, *arguments, limit_s=0.5)
    assert bounded(double, 4, limit_s=10.0) == 8


@pytest.mark.parametrize(
    ("function", "name"), [(raise_key_error, "KeyError"), (take_memory, "MemoryError")]
)
def test_a_call_that_fails_is_told_apart_and_so_is_one_that_takes_all_memory(function, name):
    with pytest.raises(Failed, match=name):
        bounded(function, limit_s=10.0)
    assert bounded(double, 4, limit_s=10.0) == 8


def test_calls_of_c_code_count_as_the_time_that_they_take():
    """The timer's signals merge while one runs."""

    calls = []

    def call():
        calls.append(sum(range(20_000_000)))

    began = os.times().user
    call()
    with pytest.raises(OutOfTime), interrupted_after(2 * (os.times().user - began)):
        [call() for _ in range(20)]
    assert len(calls) <= 5


def test_an_interrupted_call_leaves_no_reply_for_the_next():
    def interrupt(*_):
        raise KeyboardInterrupt

    assert bounded(double, 4, limit_s=10.0) == 8
    assert time_limit._helper is not None
    pipe = SimpleNamespace(send=time_limit._helper.pipe.send, recv=interrupt)
    time_limit._helper = time_limit._helper._replace(pipe=pipe)
    with pytest.raises(KeyboardInterrupt):
        bounded(double, 5, limit_s=10.0)
    assert bounded(double, 6, limit_s=10.0) == 12


def test_a_signal_to_all_processes_changes_no_result(tmp_path):
    """Slurm's SIGTERM reaches this one, too, and must not pass for OutOfTime."""
    assert bounded(double_after_a_signal, 4, tmp_path / "mark", limit_s=10.0) == 8


def test_a_call_that_ends_its_process_has_failed_and_the_next_is_answered():
    with pytest.raises(Failed, match=f"exit code -{signal.SIGSEGV.value}"):
        bounded(crash, limit_s=10.0)
    assert bounded(double, 4, limit_s=10.0) == 8


def test_a_call_whose_process_others_kill_has_not_failed():
    """Else a row would be left out for want of memory, and the next start would train on it."""
    with pytest.raises(Killed, match="the helper process was killed twice"):
        bounded(killed, limit_s=10.0)
    assert bounded(double, 4, limit_s=10.0) == 8


def test_imports_are_not_the_calls_time(monkeypatch, tmp_path):
    (tmp_path / "slow_to_import.py").write_text(
        "import time\nwhile time.process_time() < 2: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(time_limit, "_helper", None)  # the next one knows this path
    assert bounded(double, 4, limit_s=0.5, imports=["slow_to_import"]) == 8
    with pytest.raises(Failed, match="ModuleNotFoundError"):
        bounded(double, 4, limit_s=0.5, imports=["no_such_module"])


def _fail_to_start(calls):
    raise SystemExit("no such library")


def test_a_process_that_fails_is_no_fault_of_the_call(monkeypatch):
    monkeypatch.setattr(time_limit, "_helper", None)
    monkeypatch.setattr(time_limit, "_serve", _fail_to_start)
    with pytest.raises(RuntimeError, match="the helper process ended with exit code 1"):
        bounded(double, 4, limit_s=10.0)


def test_it_works_in_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(doubled_beside(4)))
    thread.start()
    thread.join()
    assert found == [8]


def test_it_works_in_processes_and_ends_with_them():
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        assert list(pool.map(doubled_beside, range(6))) == [0, 2, 4, 6, 8, 10]


def test_a_killed_process_leaves_none_behind():
    """The one beside it sees that nobody asks any more."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_ask_and_wait, args=(queue,))
    process.start()
    beside = queue.get(timeout=60)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    deadline = time.monotonic() + 30
    while _runs(beside):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _ask_and_wait(queue):
    doubled_beside(4)
    queue.put(multiprocessing.active_children()[0].pid)
    time.sleep(600)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def compute(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_blocks_of_a_chunk_share_a_timer_and_each_has_its_limit(monkeypatch):
    calls = []
    set_timer = signal.setitimer

    def counted(*given):
        calls.append(given)
        set_timer(*given)

    monkeypatch.setattr(signal, "setitimer", counted)
    with many_interruptions():
        for _ in range(100):
            with interrupted_after(0.1):
                pass
        with pytest.raises(OutOfTime), interrupted_after(0.1):
            compute(60)
        compute(0.5)  # longer than any limit, outside of all blocks
    assert len(calls) == 2
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("option", "work"),
    [
        (
            "optim.groups",
            lambda model: parameter_groups(
                model, OptimSection(groups=(OptimGroup(match=ENDLESS, lr=1e-4),))
            ),
        ),
        ("model.freeze", lambda model: freeze_named(model, [ENDLESS])),
        (
            "adapter.target_modules",
            lambda model: adapter_targets(model, AdapterSection(target_modules=ENDLESS)),
        ),
    ],
)
def test_a_pattern_of_the_recipe_that_does_not_end_is_named(monkeypatch, option, work):
    monkeypatch.setattr(time_limit, "NAME_S", 0.2)
    model = tiny_llama()
    model.add_module("a" * 40, torch.nn.Linear(2, 2))
    with pytest.raises(BadInput, match=rf"{option}: .* was not finished at the model's name `a+"):
        work(model)


def test_a_slow_pattern_may_take_longer_at_many_names_than_at_one(monkeypatch):
    monkeypatch.setattr(time_limit, "NAME_S", 0.4)
    names = ["a", "b", "c", "d", "e", "f"]
    assert names_matching("x", ".", names, lambda *_: compute(0.15) is None) == names
