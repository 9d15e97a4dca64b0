"""A final answer against its reference, and nothing that hangs."""

import json
import logging
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    assert math_verdict("#### 18 of 20", "18") == "failed"


def fail(answer, reference):
    raise MemoryError


def test_without_the_library_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'math-verify\[antlr4-13-2\]'"):
        math_answers.check_installed("`math_answer`")


# ------------------------------------------------------- without the library, the same verdict


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, str]]:
    """What the library is asked: answer and reference."""
    found = []

    def bounded(function, answer, reference, **_):
        found.append((answer, reference))
        return function(answer, reference)

    monkeypatch.setattr(math_answers, "bounded", bounded)
    return found


def by_library(answer: str, reference: str) -> str:
    """The verdict of the library alone, on what this module calls the final answer."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    def read(text: str, alone: bool) -> list:
        final = text.rpartition("####")[2].strip()
        if ("####" in text or alone) and "\\boxed" not in final and "$" not in final:
            final = f"\\boxed{{{final}}}"
        return parse(final, parsing_timeout=0)

    right, given = read(reference, True), read(answer, False)
    if not right:
        return "no reference"
    return "right" if verify(right, given, timeout_seconds=0) else "wrong"


def test_real_answers_have_the_librarys_verdict_without_it(shared, asked):
    lines = (shared / "data/gsm8k_train.jsonl").read_text().split("\n")
    answers = [json.loads(line)["answer"] for line in lines if line]
    references = [answer.rpartition("####")[2].strip() for answer in answers]
    others = [*references[1:], references[0]]
    # without the dollars, any of which may begin a formula
    boxed = [f"{answer.rpartition('####')[0]}So it is \\boxed{{{right}}}.".replace("$", "")
             for answer, right in zip(answers, references, strict=True)]  # fmt: skip
    for form in (answers, boxed):
        assert {*map(math_verdict, form, references)} == {"right"}
        assert Counter(map(math_verdict, form, others)) == {"wrong": 7398, "right": 75}
    assert len(asked) <= 6, "three hold a [ or speak of their final answer"
    every = slice(None, None, 250)
    for n in range(len(answers))[every]:
        for answer in (answers[n], boxed[n]):
            for reference in (references[n], others[n]):
                assert math_verdict(answer, reference) == by_library(answer, reference), answer


NUMBERS = st.one_of(
    st.from_regex(math_answers.NUMBER, fullmatch=True),
    st.integers(-(10**9), 10**9).map("{:,}".format),
    st.decimals(-2000, 2000, places=4).map(str),
    st.integers(0, 3).map(str),
)
# few numbers, so that many are equal however they are written
LATEX = st.one_of(
    st.from_regex(math_answers.VALUE, fullmatch=True),
    st.builds(
        str.format,
        st.sampled_from(
            ["{0}", "-{0}", "\\${0}.00", "-\\${0}", "{0}\\%", "{0}.0%", "{0}.5 \\%", "{0}00\\%",
             "\\frac{{{0}}}{{{1}}}", "-\\dfrac{{{1}}}{{{0}}}", "\\tfrac{{-{1}}}{{{0}}}", "0.{0}",
             "0.0{0}", "{0}\\text{{ dollars}}", "{0}\\,\\text{{cm}}^2", "{0} \\text{{T and d}}",
             "{0}^{{\\circ}}", "{0}{{,}}000", "{0}/{1}", "${0}$", "$\\frac{{{0}}}{{{1}}}$",
             "0.3333", "0.333333", "\\frac{{1}}{{3}}", "-{0}\\%", "{0} km", "{0}\\text{{ percent}}"]
        ),
        st.integers(1, 6),
        st.integers(1, 6),
    ),
)  # fmt: skip


@given(LATEX, LATEX)
@settings(deadline=None, max_examples=80)
def test_values_in_latex_have_the_librarys_verdict(answer, reference):
    for form in (f"#### {answer}", f"So \\(x + 5\\) is $\\boxed{{{answer.strip('$')}}}$."):
        assert math_verdict(form, reference) == by_library(form, reference), form


@given(NUMBERS, NUMBERS, st.sampled_from(["", ".0", "0", "1", "00", "-"]))
@settings(deadline=None, max_examples=150)
def test_plain_numbers_have_the_librarys_verdict(one, other, change):
    for answer in (other, one, one + change, change + one, one.replace(",", "")):
        assert math_verdict(f"#### {answer}", one) == by_library(f"#### {answer}", one), answer


WORDS = st.lists(
    st.sampled_from(["18", "$18", "= 3", "is", "answer:", "The", "final", "answer", "\\frac{1}{2}",
                     "\\boxed{17}", "\\boxed{x}", "[2]", "\\(5\\)", "}", "{", "and", "%", "$",
                     "\\[", "\\]", "\\(", "\\)", "$x$", "percent", "final answer is", "I hope",
                     "\\fbox{3}"]),
    max_size=6,
).map(" ".join)  # fmt: skip


@given(WORDS, WORDS, st.one_of(NUMBERS, LATEX), st.sampled_from(["", "$", "\\["]))
@settings(deadline=None, max_examples=80)
def test_a_value_in_a_box_among_others_has_the_librarys_verdict(before, after, value, opening):
    closing = opening.replace("[", "]")
    answer = f"{before} {opening}\\boxed{{{value.strip('$')}}}{closing}{after}"
    for reference in (value, "17", "\\frac{1}{2}"):
        assert math_verdict(answer, reference) == by_library(answer, reference), answer


@pytest.mark.parametrize(
    ("answer", "reference", "verdict"),
    [
        ("So $\\frac{6}{12}$ is left: \\[\\boxed{\\frac{6}{12}}\\]", "50%", "right"),
        ("Of $5 [each], the final answer is: $\\boxed{-\\tfrac{1}{2}}$.", "-0.5", "asks"),
        ("The final answer is $\\boxed{-\\tfrac{1}{2}}$.", "\\frac{-1}{2}", "right"),
        ("\\(2 + 3\\) makes $\\boxed{\\$1{,}200.50}$", "$1,200.5$", "right"),
        ("#### 12\\text{ dollars}", "$12", "right"),
        ("#### 90^\\circ", "9\\%", "wrong"),
        ("#### 9\\%", "9", "right"),
        ("#### 9%", "0.09", "right"),
        ("#### 0.333333", "1/3", "asks"),
        ("#### 12\\text{percent}", "0.12", "asks"),
    ],
)
def test_plain_latex_does_not_ask_the_library(answer, reference, verdict, asked):
    found = math_verdict(answer, reference)
    assert found == by_library(answer, reference)
    assert ("asks" if asked else found) == verdict
