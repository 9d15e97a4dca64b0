"""Rows become documents in the rows' order, whatever the number of processes; examples that are
too long become what the policy says; no process outlives the one that started it."""

import contextlib
import gc
import multiprocessing
import multiprocessing.process
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packhorse.trainer.config.data import DataSection, Filters
from packhorse.trainer.data import prepare, tokenize, worker_pool
from packhorse.trainer.data.filters import apply_filters
from packhorse.trainer.data.tokenize import LengthPolicy, RowResult, fit, tokenize_rows
from packhorse.trainer.datatypes import (
    BadInput,
    Conversation,
    Example,
    LeftOut,
    Message,
    Row,
    RowError,
)
from packhorse.trainer.utils import child_process
from packhorse.trainer.utils.time_limit import OutOfTime, bounded


def example(flags: list[int]) -> Example:
    return Example(np.arange(len(flags), dtype=np.int32) + 10, np.array(flags, bool))


def trained_ids(parts: list[Example]) -> list[int]:
    return [token for part in parts for token in part.input_ids[part.trained].tolist()]


@pytest.mark.parametrize("too_long", ["reject", "truncate", "split"])
def test_an_example_that_fits_is_left_alone(too_long):
    whole = example([0, 1, 1, 1])
    assert fit(whole, LengthPolicy(4, too_long, packing_cuts=False)) == [whole]


def test_reject_leaves_out_what_is_too_long():
    with pytest.raises(RowError, match=r"^longer than max_length$"):
        fit(example([0, 1, 1, 1]), LengthPolicy(3, "reject", packing_cuts=True))


def test_truncate_cuts_what_is_not_trained():
    (part,) = fit(example([0, 1, 1, 0, 0]), LengthPolicy(3, "truncate", packing_cuts=False))
    assert part.input_ids.tolist() == [10, 11, 12]
    assert part.trained.tolist() == [False, True, True]


def test_truncate_rejects_an_answer_that_would_lose_its_end():
    with pytest.raises(RowError, match="would lose its end"):
        fit(example([0, 1, 1, 1, 0]), LengthPolicy(3, "truncate", packing_cuts=False))


def test_split_leaves_cutting_to_a_packing_that_cuts():
    whole = example([0, 1, 1, 1, 0])
    assert fit(whole, LengthPolicy(3, "split", packing_cuts=True)) == [whole]


def test_truncate_keeps_the_answers_before_the_one_that_would_lose_its_end():
    (part,) = fit(example([0, 1, 1, 0, 0, 1, 1]), LengthPolicy(6, "truncate", packing_cuts=False))
    assert part.input_ids.tolist() == [10, 11, 12]
    assert part.trained.tolist() == [False, True, True]


def test_truncate_anywhere_keeps_an_answer_without_its_end():
    limits = LengthPolicy(6, "truncate_anywhere", packing_cuts=False)
    (part,) = fit(example([0, 1, 1, 0, 0, 1, 1]), limits)
    assert part.input_ids.tolist() == [10, 11, 12, 13, 14, 15]
    assert part.trained.tolist() == [False, True, True, False, False, True]
    with pytest.raises(RowError, match="no answer fits"):
        fit(example([0, 0, 0, 0, 0, 0, 1]), limits)


flag_lists = st.lists(st.booleans(), min_size=2, max_size=40).map(
    lambda flags: [False, *(flags if any(flags) else [*flags, True])]
)


@given(flag_lists, st.integers(2, 12), st.booleans())
def test_a_truncated_answer_keeps_its_end_unless_it_may_be_cut(flags, most, anywhere):
    whole = example(flags)
    too_long = "truncate_anywhere" if anywhere else "truncate"
    try:
        (part,) = fit(whole, LengthPolicy(most, too_long, packing_cuts=False))
    except RowError:
        first = flags.index(
            True
        )  # no answer begins before the cut, or the first one does not end there
        assert first >= most or (not anywhere and all(flags[first : most + 1]))
        return
    stop = len(part.input_ids)
    assert stop <= most or len(flags) <= most
    assert part.input_ids.tolist() == whole.input_ids[:stop].tolist()
    assert part.trained.tolist() == flags[:stop]
    assert part.trained.any()
    if stop < len(flags):
        assert part.trained[-1], "an answer's last token, or the last that fits"
        assert not flags[stop] or (anywhere and stop == most)


@given(flag_lists, st.integers(2, 12), st.integers(0, 8))
def test_split_trains_every_trained_token_once_in_parts_that_fit(flags, most, context):
    context = min(context, most - 2)
    whole = example(flags)
    parts = fit(whole, LengthPolicy(most, "split", packing_cuts=False, split_context=context))
    assert trained_ids(parts) == trained_ids([whole])
    for number, part in enumerate(parts):
        assert len(part.input_ids) <= most
        assert not part.trained[0], "nothing predicts a first token"
        assert part.trained.any()
        start = int(part.input_ids[0]) - 10
        assert (
            part.input_ids.tolist() == whole.input_ids[start : start + len(part.input_ids)].tolist()
        )
        if number and start:
            assert not part.trained[: context + 1].any(), "what is repeated is context"


def test_split_repeats_the_tokens_before_a_cut_as_context():
    parts = fit(
        example([0, 1, 1, 1, 1, 1, 1]),
        LengthPolicy(4, "split", packing_cuts=False, split_context=1),
    )
    assert [part.input_ids.tolist() for part in parts] == [
        [10, 11, 12, 13],
        [12, 13, 14, 15],
        [14, 15, 16],
    ]
    assert [part.trained.tolist() for part in parts] == [
        [False, True, True, True],
        [False, False, True, True],
        [False, False, True],
    ]


def test_rows_that_are_cut_are_counted_with_what_they_lose():
    longer = [Row(0, 0, 9, None), Row(1, 0, 14, None), Row(1, 0, 3, None)]  # 6, refused, 5 tokens

    def cuts(limits: LengthPolicy) -> dict:
        (chunk,) = tokenize_rows(longer, fake_tokenize, limits, workers=1)
        return {key: count for key, count in chunk.counts.items() if key[1] != "rows"}

    cut, lost = (0, "cut"), (0, "lost_trained_tokens")
    limits = LengthPolicy(5, "truncate_anywhere", packing_cuts=False)
    assert cuts(limits) == {cut: 1, lost: 1}
    assert cuts(LengthPolicy(5, "split", packing_cuts=False)) == {cut: 1, lost: 0}
    assert cuts(LengthPolicy(6, "truncate", packing_cuts=False)) == {}


def test_an_example_without_a_trained_token_is_rejected():
    with pytest.raises(RowError, match="no trained token"):
        fit(example([0, 0]), LengthPolicy(9, "reject", packing_cuts=False))


def fake_tokenize(rows: list[Row]) -> list[RowResult]:
    return [
        RowError("every seventh")
        if row.number % 7 == 0
        else (example([0] + [1] * (1 + row.number % 5)),)
        for row in rows
    ]


def rows(count: int) -> list[Row]:
    return [Row(number % 2, 0, number, None) for number in range(1, count + 1)]


def helpers() -> list[psutil.Process]:
    """Return the workers and the server that they are forked from, but not the tests' own server
    of ranks (tests/ranks.py), which another file's tests may have started in this process."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "tests.ranks" not in child.cmdline()]


def once_a_worker_is_there(rows: list[Row]) -> Iterator[Row]:
    """Yield the rows, and from the seventh on only once there is a worker: the caller's process
    would have done them all before. The first rows decide that there are workers."""
    for place, row in enumerate(rows):
        while place == 6 and len(helpers()) < 2:  # the server is the first
            time.sleep(0.01)
        yield row


def together(chunks) -> dict[str, list]:
    chunks = list(chunks)
    columns = (
        "lengths",
        "input_ids",
        "trained",
        "trained_counts",
        "sources",
        "files",
        "rows",
        "rejects",
    )
    return {
        name: [item for chunk in chunks for item in list(getattr(chunk, name))] for name in columns
    }


def test_the_outcome_does_not_depend_on_the_number_of_processes(monkeypatch):
    limits = LengthPolicy(4, "split", packing_cuts=False)
    alone = together(tokenize_rows(rows(50), fake_tokenize, limits, workers=1))
    assert alone["rows"][:3] == [1, 2, 3]
    assert alone["rejects"][0] == LeftOut(1, 0, 7, "every seventh")

    monkeypatch.setattr(tokenize, "CHUNK_ROWS", 3)
    monkeypatch.setattr(tokenize, "POOL_FROM_CHUNKS", 2)
    shared = tokenize_rows(once_a_worker_is_there(rows(50)), fake_tokenize, limits, workers=2)
    assert together(shared) == alone


def in_worker(rows: list[Row]) -> bool:
    time.sleep(0.02)
    return multiprocessing.parent_process() is not None


def test_workers_start_at_the_first_rows_where_rows_are_slow(monkeypatch):
    monkeypatch.setattr(tokenize, "SLOW_CHUNK_ROWS", 1)
    with contextlib.closing(tokenize.run(rows(100_000), in_worker, workers=2, slow=True)) as done:
        assert any(done)
    assert not any(tokenize.run(rows(100), in_worker, workers=2)), "they are not worth a start"


def slow_here(rows: list[Row]) -> list[RowResult]:
    """Be slow in the process that waits for its workers, so that they get most of the rows."""
    if multiprocessing.parent_process() is None:
        time.sleep(0.02)
    return fake_tokenize(rows)


def failing_tokenize(rows: list[Row]) -> list[RowResult]:
    if multiprocessing.parent_process() is not None:
        raise ZeroDivisionError("in the worker")
    return slow_here(rows)


def test_a_fault_in_a_worker_reaches_the_caller(monkeypatch):
    monkeypatch.setattr(tokenize, "CHUNK_ROWS", 1)
    monkeypatch.setattr(tokenize, "POOL_FROM_CHUNKS", 2)
    limits = LengthPolicy(9, "reject", packing_cuts=False)
    with pytest.raises(ZeroDivisionError, match="in the worker"):
        list(tokenize_rows(once_a_worker_is_there(rows(100)), failing_tokenize, limits, workers=2))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_workers_outlive_a_signal_that_slurm_sends_to_every_process(monkeypatch, number):
    monkeypatch.setattr(tokenize, "CHUNK_ROWS", 1)
    monkeypatch.setattr(tokenize, "POOL_FROM_CHUNKS", 2)
    given = once_a_worker_is_there(rows(100))
    stream = tokenize_rows(
        given, slow_here, LengthPolicy(9, "reject", packing_cuts=False), workers=2
    )
    chunks = [next(stream) for _ in range(10)]
    assert len(helpers()) >= 2, "a worker, and the server it is forked from"
    for helper in helpers():
        helper.send_signal(number)
    chunks += stream
    assert together(chunks)["rows"] == [row.number for row in rows(100) if row.number % 7]


def test_reading_keeps_only_a_few_chunks_ahead(monkeypatch):
    monkeypatch.setattr(tokenize, "CHUNK_ROWS", 1)
    monkeypatch.setattr(tokenize, "POOL_FROM_CHUNKS", 2)
    read = []

    def reading():
        for row in rows(100):
            read.append(row)
            yield row

    stream = tokenize_rows(
        reading(), fake_tokenize, LengthPolicy(9, "reject", packing_cuts=False), workers=2
    )
    next(stream)
    assert len(read) < 20
    stream.close()


LIMITS = LengthPolicy(9, "reject", packing_cuts=False)


def run_apart(function) -> str:
    """Run a function of this module in a process of its own, and return what it prints.

    It must end in time, and within moments nothing that it started may be left.
    """
    script = f"from tests.unit import test_tokenize; test_tokenize.{function.__name__}()"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        pytest.fail(f"it does not end; left are {still_there(process.pid)}")
    finally:
        left = wait_until_gone(process.pid)
        for other in left:
            other.kill()
    assert process.returncode == 0, said
    assert not left
    return said


def still_there(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def wait_until_gone(session: int) -> list[psutil.Process]:
    deadline = time.monotonic() + 10
    while (left := still_there(session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def use_small_chunks() -> None:
    tokenize.CHUNK_ROWS, tokenize.POOL_FROM_CHUNKS = 1, 2


def verify_in_workers(rows: list[Row]) -> list[RowResult]:
    """As `filters: {math_answer: best}`: each worker starts a helper of its own."""
    if multiprocessing.parent_process() is not None:
        filters = Filters.model_validate({"math_answer": "best"})
        conversation = Conversation((Message("user", "q"), Message("assistant", "#### 4")))
        apply_filters(filters, {"best": "4"}, conversation)
        if rows[0].number % 20 == 0:  # a user's function may start and end programs, too
            program = subprocess.Popen(["sleep", "600"])
            program.terminate()
            assert program.wait() == -signal.SIGTERM
    return slow_here(rows)


def prepare_with_verified_answers() -> None:
    use_small_chunks()
    given = once_a_worker_is_there(rows(100))
    print(len(together(tokenize_rows(given, verify_in_workers, LIMITS, workers=2))["rows"]))


def test_workers_that_verify_answers_end_and_so_do_their_helpers():
    """A helper that inherits a blocked SIGTERM would be waited for without end."""
    assert run_apart(prepare_with_verified_answers) == f"{100 - 100 // 7}\n"


def kill_own_worker(rows: list[Row]) -> list[RowResult]:
    """Kill the worker from row 50 on, during a helper's call, as the kernel may for memory."""
    if multiprocessing.parent_process() is None:
        time.sleep(0.05)
    elif rows[-1].number >= 50:
        bounded(abs, 1, limit_s=1.0)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        bounded(time.sleep, 600, limit_s=1.0)
    return fake_tokenize(rows)


def prepare_with_a_killed_worker() -> None:
    use_small_chunks()
    tokenize.CHUNK_ROWS = 3
    given = once_a_worker_is_there(rows(2000))  # more than are done before a slow worker's end
    try:
        list(tokenize_rows(given, kill_own_worker, LIMITS, 2, ["a.jsonl"]))
    except BadInput as error:
        print(error)


def test_a_worker_that_is_killed_ends_the_preparation_and_its_rows_are_named():
    said = run_apart(prepare_with_a_killed_worker)
    assert "a worker process was killed by signal 9 at the rows from a.jsonl:" in said
    first, last = map(int, re.findall(r"a.jsonl:(\d+)", said))
    assert last == first + 2
    assert last >= 50


def frozen_objects(rows: list[Row]) -> tuple[bool, int]:
    is_worker = multiprocessing.parent_process() is not None
    if not is_worker:
        time.sleep(0.02)
    return is_worker, gc.get_freeze_count()


def prepare_and_look_at_frozen_objects() -> None:
    use_small_chunks()
    given = once_a_worker_is_there(rows(100))
    found = list(tokenize.run(given, frozen_objects, workers=2))
    print({is_worker for is_worker, _ in found} == {False, True})
    print(min(count for _, count in found) > 10_000, gc.get_freeze_count())


def test_the_garbage_collector_does_not_look_through_what_was_imported():
    assert run_apart(prepare_and_look_at_frozen_objects) == "True\nTrue 0\n"


def freeze_own_worker(rows: list[Row]) -> list[RowResult]:
    """Stop the worker from row 50 on, as a user's SIGSTOP does."""
    if multiprocessing.parent_process() is None:
        time.sleep(0.05)
    elif rows[-1].number >= 50:
        os.kill(os.getpid(), signal.SIGSTOP)
    return fake_tokenize(rows)


def prepare_with_a_frozen_worker() -> None:
    use_small_chunks()
    worker_pool.FROZEN_S = 2.0
    given = (row._replace(fields=" " * 10**6) for row in once_a_worker_is_there(rows(400)))
    try:
        list(tokenize_rows(given, freeze_own_worker, LIMITS, 2, ["a.jsonl"]))
    except BadInput as error:
        print(error)


def test_a_frozen_worker_ends_the_preparation_and_its_rows_are_named():
    said = run_apart(prepare_with_a_frozen_worker)
    assert "a worker process has done nothing for 2 s at the rows from a.jsonl:" in said
    assert min(map(int, re.findall(r"a.jsonl:(\d+)", said))) >= 50


def wait_in_worker(rows: list[Row]) -> list[RowResult]:
    """Wait in the worker from row 50 on, as for a file system that is away."""
    if multiprocessing.parent_process() is not None and rows[-1].number >= 50:
        time.sleep(600)
    return slow_here(rows)


def prepare_with_a_worker_that_cannot_be_killed() -> None:
    """The kernel kills no process while it waits for a disk or a network file system."""
    use_small_chunks()
    worker_pool.FROZEN_S, child_process.END_S = 1.0, 0.1
    multiprocessing.process.BaseProcess.kill = lambda self: None
    try:
        list(tokenize_rows(once_a_worker_is_there(rows(400)), wait_in_worker, LIMITS, 2))
    except BadInput as error:
        print(error)
    print([name for name in map(str, threading.enumerate()) if "ThreadPool" in name])


def test_a_worker_that_cannot_be_killed_does_not_hold_up_the_error():
    said = run_apart(prepare_with_a_worker_that_cannot_be_killed)
    assert "a worker process has done nothing for 1 s at the rows from file 0:" in said
    assert said.endswith("\n[]\n"), "no thread reads from it any more"


def own_cores(rows: list[Row]) -> tuple[bool, set[int]]:
    is_worker = multiprocessing.parent_process() is not None
    time.sleep(0 if is_worker else 0.2)  # a worker's imports take seconds on a busy machine
    return is_worker, os.sched_getaffinity(0)


def prepare_in_a_bound_rank() -> None:
    use_small_chunks()
    given = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(given)})  # as numa.bind_to_numa_node does
    assert prepare.workers_of(DataSection.model_construct(workers=None)) == len(given)
    found = list(tokenize.run(once_a_worker_is_there(rows(100)), own_cores, workers=2))
    print({tuple(cores) for is_worker, cores in found if is_worker} == {tuple(given)})
    print(os.sched_getaffinity(0) == {min(given)})


def test_workers_use_all_cores_though_their_rank_is_bound_to_some():
    assert run_apart(prepare_in_a_bound_rank) == "True\nTrue\n"


done_here = 0


def compute_for_ever(rows: list[Row]) -> bool:
    """Return whether this is a worker. There the second chunk is one C function that does not end,
    in the worker's helper or in the worker itself."""
    global done_here
    if multiprocessing.parent_process() is None:
        time.sleep(0.02)
        return False
    done_here += 1
    if done_here > 1:
        with contextlib.suppress(OutOfTime):
            bounded(pow, 7, 10**9, limit_s=rows[0].number % 2 * 600.0 or 0.1)
        pow(7, 10**9)
    return True


def stop_early() -> None:
    use_small_chunks()
    stream = tokenize.run(rows(10_000), compute_for_ever, workers=2)
    while not next(stream):
        pass
    time.sleep(3)
    stream.close()
    print("closed")


def test_workers_are_ended_whatever_they_do():
    assert run_apart(stop_early) == "closed\n"
