"""The experiments: their runs, their data and their tables."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from packhorse.trainer.config.recipe import Recipe, load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.math_answers import math_verdict
from tests.ranks import ROOT

FOLDER = ROOT / "recipes" / "experiments"
sys.path[:0] = [str(FOLDER), str(ROOT / "recipes" / "quickstart"), str(ROOT / "benchmarks")]

import catalogue  # noqa: E402 - scripts of a recipe, not a package
import common  # noqa: E402 - the benchmarks'
import make_data  # noqa: E402
import make_problems  # noqa: E402
import tables  # noqa: E402
from catalogue import EXPERIMENTS, Run  # noqa: E402

RUNNER = runpy.run_path(str(FOLDER / "run.py"), run_name="runner")
RIGHT = re.compile(r"<think>(\d+ [-+*/] \d+ = \d+\. ?){1,2}</think><answer>\d+</answer>")

# ---------------------------------------------------------------------------------- what is trained


def of(run: Run, base: str) -> Recipe:
    """Return the recipe of a run."""
    path = FOLDER / base
    return load_recipe(path, catalogue.overrides(run, load_recipe(path), Path("runs/x")))


@pytest.mark.parametrize("base", ["base.yaml", "full.yaml"])
def test_every_run_is_a_recipe_at_either_size_and_no_two_are_the_same(base: str) -> None:
    recipes = [of(run, base) for run in catalogue.runs(EXPERIMENTS)]
    assert (
        len(
            {
                json.dumps([recipe.fixed(), recipe.eval.model_dump(mode="json")])
                for recipe in recipes
            }
        )
        == 27
    )
    assert len({recipe.run.dir for recipe in recipes}) == 27


def test_a_run_that_several_experiments_look_at_is_trained_once() -> None:
    wanted = catalogue.runs(EXPERIMENTS)
    assert len(wanted) == len(set(wanted)) == 27
    looking = [number for number, one in EXPERIMENTS.items() if "baseline" in one.arms]
    assert looking == [2, 3, 4, 6]
    assert [run.name for run in catalogue.runs([4, 2])] == [
        *(
            "baseline-seed0",
            "neftune-seed0",
            "prompt-learned-seed0",
            "baseline-seed1",
            "prompt-learned-seed1",
        )
    ]


def test_experiments_1_2_3_and_6_have_two_seeds() -> None:
    assert {number for number, one in EXPERIMENTS.items() if len(one.seeds) == 2} == {1, 2, 3, 6}


def test_all_runs_are_expected_to_fit_into_three_hours_with_a_fifth_to_spare() -> None:
    arms = catalogue.arms(load_recipe(FOLDER / "base.yaml"))
    assert sum(arms[run.arm].expected_s for run in catalogue.runs(EXPERIMENTS)) < 0.8 * 3 * 3600


def test_adapters_take_ten_times_the_learning_rate_of_their_base_recipe() -> None:
    for base in ("base.yaml", "full.yaml"):
        full, adapter = (of(Run(arm, 0), base).optim.lr for arm in ("baseline", "lora-r8"))
        assert adapter == pytest.approx(10 * full)


def test_packed_and_alone_every_step_holds_all_rows() -> None:
    for arm in ("packed", "alone"):
        recipe = of(Run(arm, 0), "base.yaml")
        assert recipe.data.train[0].rows == recipe.batch.global_batch_size == 40
    assert of(Run("alone", 0), "base.yaml").batch.seq_len == 100, (
        "so that the fill is that of padding to 100"
    )


def test_an_experiment_that_is_not_there_is_refused() -> None:
    numbers_of = RUNNER["parse_numbers"]
    assert numbers_of("4, 1,4") == [1, 4]
    with pytest.raises(BadInput, match="--only 1,8: give numbers from 1 to 7"):
        numbers_of("1,8")


# --------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def problems() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return make_data.word_problems()


def test_the_problems_are_the_quickstarts_and_more_held_out_ones(
    problems: Any, tmp_path: Path
) -> None:
    make_problems.write(tmp_path)
    theirs = [
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    ]
    train, heldout = problems
    assert train == theirs[0]
    assert heldout[:64] == theirs[1]
    assert len({row["question"] for row in [*train, *heldout]}) == 628


def test_a_page_replaces_no_other_file(tmp_path: Path) -> None:
    page, require = tmp_path / "page.md", RUNNER["require_own_page"]
    require(page)
    page.write_text(RUNNER["PAGE"].read_text())
    require(page)
    page.write_text("mine")
    with pytest.raises(BadInput, match="is no page of the experiments"):
        require(page)


def test_a_result_of_a_benchmark_replaces_no_other_file(tmp_path: Path) -> None:
    out = tmp_path / "new" / "result.md"
    common.write_result(out, "# Memory\n1\n")
    common.write_result(out, "# Memory\n2\n")
    assert out.read_text() == "# Memory\n2\n"
    with pytest.raises(SystemExit, match="is no result of this benchmark"):
        common.write_result(out, "# Time\n3\n")
    assert out.read_text() == "# Memory\n2\n"


def test_half_of_the_traces_are_wrong_and_verifying_takes_out_exactly_those(problems: Any) -> None:
    train = problems[0]
    traces = make_data.traces(train, 0.5, seed=0)
    wrong = {
        i
        for i, (trace, row) in enumerate(zip(traces, train, strict=True))
        if trace["answer"] != row["answer"]
    }
    assert len(wrong) == 250
    assert {
        i
        for i, trace in enumerate(traces)
        if math_verdict(trace["answer"], trace["solution"]) == "wrong"
    } == wrong
    assert make_data.traces(train, 0.5, seed=0) == traces != make_data.traces(train, 0.5, seed=1)


def test_a_wrong_trace_has_the_form_of_a_right_one_and_reckons_right(problems: Any) -> None:
    for row in problems[0]:
        mistaken = make_data.wrong(row["answer"])
        if mistaken is not None:
            assert RIGHT.fullmatch(mistaken), mistaken
            for term, result in re.findall(r"(\d+ [-+*/] \d+) = (\d+)", mistaken):
                assert eval(term) == int(result), (
                    mistaken
                )  # digits and one operator, by the pattern above
            value = make_data.final(mistaken)
            assert mistaken.endswith(f"= {value}.</think><answer>{value}</answer>")


@pytest.mark.parametrize(
    ("right", "mistaken"),
    [
        (
            "<think>4 * 9 = 36.</think><answer>36</answer>",
            "<think>4 + 9 = 13.</think><answer>13</answer>",
        ),
        (
            "<think>5 + 9 = 14.</think><answer>14</answer>",
            "<think>9 - 5 = 4.</think><answer>4</answer>",
        ),
        ("<think>2 * 2 = 4.</think><answer>4</answer>", None),  # as 2 + 2
        (
            "So 6*2=<<6*2=12>>12 pages.\nThat is 12 x 52 = <<12*52=624>>624 pages a year\n#### 624",
            "So 6*2=<<6*2=12>>12 pages.\nThat is 12+52 = <<12+52=64>>64 pages a year\n#### 64",
        ),
        (
            "She needs 100 - 30 - 15 = $<<100-30-15=55>>55 more.\n#### 55",
            None,
        ),  # the end of a longer formula
        ("It is 0.2*50 = <<0.2*50=10>>10.\n#### 10", None),  # no whole numbers
    ],
)
def test_a_wrong_trace_takes_another_operation(right: str, mistaken: str | None) -> None:
    assert make_data.wrong(right) == mistaken


def test_more_wrong_answers_than_can_be_made_are_refused() -> None:
    with pytest.raises(ValueError, match="only 0 of 1 answers can be made wrong, and 1 should be"):
        make_data.traces([{"question": "?", "answer": "<answer>1</answer>"}], 1.0, seed=0)


def test_sheets_hold_every_problem_once(problems: Any) -> None:
    sheets = make_data.sheets(problems[0])
    assert len(sheets) == 300
    assert sheets[:250] == problems[0][:250]
    lines = [
        line.partition(". ")[2] for sheet in sheets[250:] for line in sheet["answer"].splitlines()
    ]
    assert lines == [row["answer"] for row in problems[0][250:]]


# ------------------------------------------------------------------------------------------- tables


Evaluations = dict[
    int, tuple[float, set[int]]
]  # after so many steps: the loss, and the prompts answered right


def finished(
    out: Path,
    run: Run,
    *,
    right: set[int],
    n: int = 40,
    steps: int = 10,
    before: Evaluations | None = None,
) -> None:
    """Write a run folder as a finished run leaves it.

    Args:
        right: of `n` prompts, those answered right at the end.
    """
    folder = out / run.name
    folder.mkdir(parents=True)
    recipe = of(run, "base.yaml")
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    (folder / "summary.json").write_text("{}")
    (folder / "data.json").write_text(json.dumps({"train": {"documents": 500}}))
    step = {
        "train/loss": 1.0,
        "perf/tokens_per_s": 400.0,
        "perf/step_s": 2.0,
        "pack/fill": 0.9,
        "mem/host_peak_gib": 4,
    }
    lines: list[dict[str, Any]] = [
        {"step": i, **step, "train/grad_norm": 1.0 + i % 2 if i > 1 else 99.0}
        for i in range(1, steps + 1)
    ]
    samples = []
    for at, (loss, answered) in {**(before or {}), steps: (0.05, right)}.items():
        lines.append({"step": at, "eval/loss": loss})
        for i in range(n):
            scores = {"format_accuracy": True, "answer_accuracy": i in answered}
            samples.append(
                {
                    "step": at,
                    "prompt": f"question {i}",
                    "answer": "",
                    "reference": "",
                    "scores": scores,
                }
            )
    for name, objects in (("metrics", lines), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in objects))


def test_a_table_compares_arms_prompt_by_prompt(tmp_path: Path) -> None:
    for seed in (0, 1):
        finished(tmp_path, Run("baseline", seed), right=set(range(20)))
        finished(tmp_path, Run("prompt-learned", seed), right=set(range(8)))
    text = tables.block(2, tmp_path)
    assert (
        "| `baseline` | 50.0% (35.2 to 64.8): 50.0%, 50.0% |  | 100.0% (91.2 to 100.0): 100.0%, "
        "100.0% |" in text
    )
    assert (
        "20.0% (10.5 to 34.8): 20.0%, 20.0% | -30.0 points (-43.6 to -14.3), p 0.00049: worse |"
        in text
    )
    assert "40 prompts. Each seed's value" in text


def test_a_difference_that_the_seeds_do_not_share_is_none(tmp_path: Path) -> None:
    finished(tmp_path, Run("baseline", 0), right=set(range(10)))
    finished(tmp_path, Run("baseline", 1), right=set(range(20)))
    finished(tmp_path, Run("prompt-learned", 0), right=set(range(40)))
    finished(tmp_path, Run("prompt-learned", 1), right=set(range(19)))
    assert re.search(
        r"\+36\.2 points \(.*\), p 0\.0001: no difference seen", tables.block(2, tmp_path)
    )


def test_a_difference_that_chance_could_make_is_none(tmp_path: Path) -> None:
    finished(tmp_path, Run("baseline", 0), right=set(range(20)))
    finished(tmp_path, Run("neftune", 0), right=set(range(25)))
    assert "+12.5 points (+1.2 to +23.0), p 0.062: no difference seen" in tables.block(4, tmp_path)


def test_the_spread_of_gradient_norms_leaves_the_warm_up_out(tmp_path: Path) -> None:
    for arm in EXPERIMENTS[1].arms:
        for seed in (0, 1):
            finished(tmp_path, Run(arm, seed), right={0})
    row = next(line for line in tables.block(1, tmp_path).splitlines() if "sheets-example" in line)
    assert "| 0.365, 0.365 | 2.00, 2.00 |" in row, (
        "of 1 and 2, nine of them; the first step's 99 is warm-up"
    )


def test_packing_is_compared_step_by_step(tmp_path: Path) -> None:
    for arm in EXPERIMENTS[5].arms:
        finished(tmp_path, Run(arm, 0), right=set(), steps=6)
    log = tmp_path / "alone-seed0" / "metrics.jsonl"
    log.write_text(log.read_text().replace('"train/loss": 1.0', '"train/loss": 1.001', 1))
    text = tables.block(5, tmp_path)
    assert "| `alone-float32` | 400 | 1.000000 | 1.000000 | 0.0e+00 | 0.0e+00 | 90.0% |" in text
    assert "| `alone` | 400 | 1.001000 | 1.000000 | 1.0e-03 | 0.0e+00 | 90.0% |" in text
    assert "| `packed` | 400 | 1.000000 | 1.000000 |  |  | 90.0% |" in text


def test_one_half_of_the_prompts_chooses_the_checkpoint_and_the_other_judges(
    tmp_path: Path,
) -> None:
    even, odd = set(range(0, 40, 2)), set(range(1, 40, 2))
    before = {
        0: (0.01, set()),
        5: (0.02, {1, 3}),
        10: (0.03, even | {5}),
    }  # the lowest loss is before training
    finished(tmp_path, Run("few-rows", 0), right=odd, steps=15, before=before)
    finished(tmp_path, Run("fewer-rows", 0), right={1}, steps=5, before={})
    text = tables.block(7, tmp_path)
    assert "| 5 | 0.0200 | 0.0% (0.0 to 16.1) | 10.0% (2.8 to 30.1) | lowest loss |" in text
    assert "| 10 | 0.0300 | 100.0% (83.9 to 100.0) | 5.0% (0.9 to 23.6) | best metric |" in text
    assert "chosen by loss: -5.0 points (-25.8 to +15.5), p 1: no difference seen" in text
    assert text.endswith("Both rules choose the same checkpoint."), "the second arm's"


def test_an_experiment_without_all_its_runs_has_no_table(tmp_path: Path) -> None:
    finished(tmp_path, Run("baseline", 0), right={1})
    assert tables.block(4, tmp_path) == "Not run yet: 1 of its 2 runs are done."


# ----------------------------------------------------------------------------------------- the page


def test_the_page_has_a_place_for_each_experiment_and_keeps_its_prose() -> None:
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    filled = tables.fill(
        page, {"where": "here", **{str(number): f"table {number}" for number in EXPERIMENTS}}
    )
    for number, experiment in EXPERIMENTS.items():
        assert f"## {number}. {experiment.title}\n" in page
        assert f"<!-- {number} -->\ntable {number}\n<!-- end -->" in filled
    prose = re.compile(r"(<!-- (?:where|\d) -->\n).*?(?=<!-- end -->)", re.DOTALL)
    assert prose.sub(r"\1", filled) == prose.sub(r"\1", page)
    assert tables.fill(filled, {"1": "table 1"}) == filled


def test_a_finished_run_is_not_done_again_and_one_of_another_recipe_is_refused(
    tmp_path: Path,
) -> None:
    is_done, run = RUNNER["is_done"], Run("neftune", 0)
    assert not is_done(of(run, "base.yaml"), tmp_path / run.name)
    finished(tmp_path, run, right={1})
    assert is_done(of(run, "base.yaml"), tmp_path / run.name)
    with pytest.raises(BadInput, match="holds a finished run of another recipe: remove it"):
        is_done(of(Run("baseline", 0), "base.yaml"), tmp_path / run.name)


def test_the_time_to_go_follows_the_pace_of_the_runs_so_far(tmp_path: Path) -> None:
    base = load_recipe(FOLDER / "base.yaml")
    pace_of, about = RUNNER["measure_pace"], RUNNER["about"]
    assert pace_of(tmp_path, base) == 1
    expected_s = catalogue.arms(base)["baseline"].expected_s
    lines = [
        {"run": "baseline-seed0", "code": 75, "seconds": 9000, "commit": "x"},
        {"run": "baseline-seed0", "code": 0, "seconds": 2 * expected_s, "commit": "x"},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert pace_of(tmp_path, base) == 2
    assert about(1950, 2) == "about 1 h 05 min"
    other = base.model_copy(update={"model": base.model.model_copy(update={"name": "other"})})
    assert (
        about(1950, pace_of(tmp_path / "elsewhere", other))
        == "a time that is known after the first run"
    )
