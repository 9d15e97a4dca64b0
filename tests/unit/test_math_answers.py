"""A final answer against its reference, and nothing that hangs."""

import pytest

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils import math_answers
from packhorse.trainer.utils.math_answers import math_verdict


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


def test_what_no_computer_finishes_takes_too_long_and_the_next_row_has_a_verdict(monkeypatch):
    monkeypatch.setattr(math_answers, "LIMIT_S", 1.0)
    assert math_verdict("\\boxed{9^{9^{9^{9^{9}}}} - 9^{9^{9^{9}}}}", "18") == "too long"
    assert math_verdict("#### 18", "18") == "right"


def test_a_fault_of_the_library_is_not_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(math_answers, "_verdict", fail)
    assert math_verdict("#### 18", "18") == "failed"


def fail(answer, reference, alone):
    raise MemoryError


def test_without_the_library_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'math-verify\[antlr4_13_2\]'"):
        math_answers.check_installed("`math_answer`")
