"""A final answer against its reference, and nothing that hangs."""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import pytest

from trainer.data import math_answers
from trainer.data.math_answers import math_verdict
from trainer.flow import BadInput


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 a day, at $2 each.\n#### 18", "18"),
        ("#### 1234", "#### 1,234"),
        ("It is $18.", "$18"),
        ("We get \\boxed{18}.", "18"),
        ("so x is 0.5", "1/2"),
        ("so x is \\boxed{0.5}", "\\frac{1}{2}"),
        ("so x is $\\frac{\\sqrt{8}}{2}$", "\\sqrt{2}"),
        ("\\boxed{1 + x}", "x + 1"),
        ("$\\{2, 1\\}$", "\\{1, 2\\}"),
        ("It is **\N{MINUS SIGN}3**.", "-3"),
        ("The answer is 5.0", "5"),
        ("#### Step 1\nAdd.\n#### The result\nSo it is \\boxed{18}.", "18"),
        ("<think>3 * 6 = 19? No.</think><answer>18</answer>", "18"),
        ("<think>\\boxed{19}</think>It is 18.", "18"),
    ],
)
def test_equal_values_are_right_however_they_are_written(answer, reference):
    assert math_verdict(answer, reference) == "right"


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("She makes $18 a day.\n#### 17", "18"),
        ("First 18, then \\boxed{17}", "18"),
        ("First 18, then 19.", "18"),
        ("#### 18\n\nNo:\n#### 19", "18"),
        ("<think>3 * 6 = 18</think><answer>19</answer>", "18"),
        ("<think>\\boxed{18}</think>It is 19.", "18"),
        ("<think>It is 18</think>", "18"),
        ("I do not know.", "18"),
        ("", "18"),
        ("the root of 2 is \\boxed{2}", "\\sqrt{2}"),
        ("\\boxed{x + 2}", "x + 1"),
    ],
)
def test_other_values_are_wrong(answer, reference):
    assert math_verdict(answer, reference) == "wrong"


@pytest.mark.parametrize("reference", ["", "   ", "####"])
def test_a_reference_without_a_value_is_named(reference):
    assert math_verdict("#### 18", reference) == "no reference"


SERVE = math_answers._serve


def _serve_endless(questions, limit_s):
    math_answers._verdict = lambda answer, reference: 7 ** (10**9)
    SERVE(questions, limit_s)


@pytest.mark.parametrize(
    ("serve", "answer"),
    [(SERVE, "\\boxed{9^{9^{9^{9^{9}}}} - 9^{9^{9^{9}}}}"), (_serve_endless, "")],
    ids=["a tower of powers", "one C function"],
)
def test_what_no_computer_finishes_takes_too_long_and_the_next_row_has_a_verdict(monkeypatch, serve, answer):
    """The limit is the kernel's: Python's own handlers wait while one long operation runs."""
    monkeypatch.setattr(math_answers, "_process", None)
    monkeypatch.setattr(math_answers, "LIMIT_S", 1.0)
    monkeypatch.setattr(math_answers, "_serve", serve)
    assert math_verdict(answer, "18") == "too long"
    monkeypatch.setattr(math_answers, "_serve", SERVE)
    assert math_verdict("#### 18", "18") == "right"


def _serve_failing(questions, limit_s):
    def fail(answer, reference):
        raise MemoryError

    math_answers._verdict = fail
    SERVE(questions, limit_s)


def test_a_fault_of_the_library_is_not_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(math_answers, "_process", None)
    monkeypatch.setattr(math_answers, "_serve", _serve_failing)
    assert math_verdict("#### 18", "18") == "failed"


def _fail_to_start(questions, limit_s):
    raise SystemExit("no such library")


def test_a_process_that_does_not_start_is_no_fault_of_the_rows(monkeypatch):
    monkeypatch.setattr(math_answers, "_process", None)
    monkeypatch.setattr(math_answers, "_serve", _fail_to_start)
    with pytest.raises(RuntimeError, match="did not start"):
        math_verdict("#### 18", "18")


def test_it_works_in_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(math_verdict("#### 18", "18")))
    thread.start()
    thread.join()
    assert found == ["right"]


def test_it_works_in_processes_and_ends_with_them():
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        assert list(pool.map(math_verdict, ["#### 18", "#### 17"] * 3, ["18"] * 6)) == ["right", "wrong"] * 3


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
    math_verdict("#### 18", "18")
    queue.put(multiprocessing.active_children()[0].pid)
    time.sleep(600)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_the_library_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'math-verify\[antlr4_13_2\]'"):
        math_answers.check_installed()
