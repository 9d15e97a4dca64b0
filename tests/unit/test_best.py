"""The best step by a rule: hand-made evaluations, and every rule that is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from packhorse.trainer import dist, train
from packhorse.trainer.checkpoint.best import (
    Best,
    best_step,
    choose,
    early_end,
    evaluations,
    final_step,
)
from packhorse.trainer.checkpoint.export_folder import describe_step
from packhorse.trainer.config.best import BestSection, Condition, EarlyStoppingSection
from packhorse.trainer.config.recipe import load_recipe, parse_recipe
from packhorse.trainer.datatypes import BadInput
from tests.ranks import ROOT

RULE = {
    "metric": "answer_accuracy",
    "subject_to": {"format_accuracy": ">= 0.98"},
    "tie": "eval_loss",
}


def line(
    step: int, eval_loss: float, answer: float | None, form: float | None = 1.0
) -> dict[str, Any]:
    """Return a line of evaluations.jsonl."""
    scores = {"answer_accuracy": answer, "format_accuracy": form}
    metrics = {
        name: {"value": value, "count": 8, "low": None, "high": None}
        for name, value in scores.items()
    }
    return {"step": step, "eval_loss": eval_loss, "metrics": metrics}


def best_of(*lines: dict[str, Any], **rule: Any) -> int | None:
    return choose(BestSection(**(rule or RULE)), {each["step"]: each for each in lines})["step"]


# ---------------------------------------------------------------------------------------- which one


def test_the_highest_metric_wins_whatever_the_loss_says():
    assert best_of(line(10, 0.5, 0.25), line(20, 0.9, 0.75), line(30, 0.1, 0.5)) == 20


def test_a_step_that_does_not_meet_a_condition_is_not_the_best():
    assert best_of(line(10, 0.5, 0.25), line(20, 0.5, 0.75, form=0.97)) == 10
    assert best_of(line(10, 0.5, 0.25), line(20, 0.5, 0.75, form=0.98)) == 20


def test_of_equal_ones_the_tie_decides_and_then_the_earlier_step():
    assert best_of(line(10, 0.5, 0.75), line(20, 0.4, 0.75), line(30, 0.6, 0.75)) == 20
    assert best_of(line(10, 0.5, 0.75), line(20, 0.5, 0.75)) == 10
    assert best_of(line(10, 0.4, 0.75), line(20, 0.5, 0.75), metric="format_accuracy") == 10
    by_score = {"metric": "eval_loss", "tie": "answer_accuracy"}
    assert best_of(line(10, 0.5, 0.25), line(20, 0.5, 0.75), **by_score) == 20, (
        "the higher score is the better one"
    )


def test_of_the_loss_the_lowest_wins():
    lines = line(10, 0.5, 0.2), line(20, 0.4, 0.1), line(30, 0.6, 0.0)
    assert best_of(*lines, metric="eval_loss") == 20


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (line(20, 0.5, None), "answer_accuracy is missing"),
        (line(20, 0.5, 0.9, form=None), "format_accuracy is missing"),
        (line(20, float("nan"), 0.9), "eval_loss is nan"),
        (line(20, 0.5, 0.9, form=0.5), "format_accuracy is 0.5, not >= 0.98"),
    ],
)
def test_a_step_without_all_numbers_of_the_rule_is_no_candidate_and_it_is_said_why(second, why):
    found = choose(BestSection(**RULE), {10: line(10, 0.5, 0.25), 20: second})
    assert found["step"] == 10
    assert [(c["step"], c["meets"], c.get("why_not")) for c in found["candidates"]] == [
        (10, True, None),
        (20, False, why),
    ]


def test_a_step_that_was_scored_by_other_scorers_is_no_candidate():
    assert best_of({"step": 20, "eval_loss": 0.5, "metrics": {}}) is None


def test_the_untrained_model_is_no_candidate_as_it_has_no_checkpoint():
    assert best_of(line(0, 0.1, 1.0), line(10, 0.5, 0.25)) == 10


@pytest.mark.parametrize(
    ("text", "met", "not_met"),
    [
        (">= 0.5", 0.5, 0.49),
        ("> 0.5", 0.51, 0.5),
        ("<=0.5", 0.5, 0.51),
        (" <  5e-1 ", 0.49, 0.5),
        ("> -.5", 0.0, -0.5),
    ],
)
def test_conditions(text, met, not_met):
    condition = Condition.parse(text)
    assert condition.holds(met)
    assert not condition.holds(not_met)


# -------------------------------------------------------------------------------- rules in a recipe


def tree(best: Any, every_steps: int | None = 5, **data: Any) -> dict[str, Any]:
    """Return the debug recipe, which has two scorers, with a rule."""
    made = yaml.safe_load((ROOT / "recipes" / "debug.yaml").read_text())
    made["eval"] |= {"best": best, "every_steps": every_steps}
    made["data"] |= data
    return made


def test_a_rule_reads_back_from_the_resolved_recipe(tmp_path):
    recipe = parse_recipe(tree(RULE))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml").eval.best == BestSection(**RULE)
    assert (
        str(recipe.eval.best)
        == "the highest answer_accuracy with format_accuracy >= 0.98, ties by eval_loss"
    )


def test_a_rule_may_change_on_a_resume():
    assert parse_recipe(tree(RULE)).fixed() == parse_recipe(tree(None)).fixed()


@pytest.mark.parametrize(
    ("best", "sentence"),
    [
        (
            {"metric": "answer_acuracy"},
            "`best.metric`: there is no scorer `answer_acuracy` in eval.generate",
        ),
        ({"metric": "answer_acuracy"}, "did you mean `answer_accuracy`?"),
        ({"metric": "eval_los"}, "did you mean `eval_loss`?"),
        ({"metric": "zzz"}, "names here: eval_loss, format_accuracy, answer_accuracy"),
        (
            {"metric": "answer_accuracy", "tie": "lenght"},
            "`best.tie`: there is no scorer `lenght`",
        ),
        (
            {"metric": "answer_accuracy", "subject_to": {"formt": "> 0"}},
            "`best.subject_to.formt`: there is no scorer",
        ),
        ({"metrics": "answer_accuracy"}, "did you mean `eval.best.metric`?"),
        ({}, "`eval.best.metric` is missing"),
        ({"maximize": "answer_accuracy"}, "`eval.best.maximize` is now `eval.best.metric`"),
        (
            {"metric": "answer_accuracy", "subject_to": {"format_accuracy": 0.98}},
            "`0.98` is no condition: write one of",
        ),
        (
            {"metric": "answer_accuracy", "subject_to": {"format_accuracy": "== 1"}},
            "`== 1` is no condition",
        ),
        (
            {"metric": "answer_accuracy", "subject_to": {"format_accuracy": ">= high"}},
            "`>= high` is no condition",
        ),
        (
            {"metric": "answer_accuracy", "subject_to": {"format_accuracy": ">= 1 or so"}},
            "is no condition",
        ),
        (
            {"metric": "answer_accuracy", "subject_to": {"format_accuracy": ">= nan"}},
            "is no condition",
        ),
        (
            {"metric": "answer_accuracy", "subject_to": {"format_accuracy": ">= 98"}},
            "scores go from 0 to 1",
        ),
        ({"metric": "answer_accuracy", "subject_to": ">= 98"}, "`eval.best.subject_to`"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(best, sentence):
    with pytest.raises(BadInput) as refused:
        parse_recipe(tree(best))
    assert sentence in str(refused.value)


def test_a_rule_needs_evaluations():
    with pytest.raises(BadInput, match="`best` needs `every_steps`"):
        parse_recipe(tree(RULE, every_steps=None))
    asks_nothing = tree({"metric": "eval_loss"}, eval=[])
    asks_nothing["eval"]["generate"] = None
    with pytest.raises(BadInput, match=r"eval\.best: there are no held-out rows"):
        parse_recipe(asks_nothing)


# ----------------------------------------------------------------------------------- a run's record


def write(run_dir: Path, *lines: dict[str, Any], best: Any = RULE) -> Path:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "recipe.yaml").write_text(parse_recipe(tree(best)).to_yaml())
    (run_dir / "evaluations.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return run_dir


def test_the_best_is_found_again_from_the_record_and_reported(tmp_path):
    write(tmp_path, line(10, 0.5, 0.25), line(20, 0.5, 0.75))
    best = Best(parse_recipe(tree(RULE)).eval, tmp_path)
    assert best.step == best_step(tmp_path) == 20
    report = json.loads((tmp_path / "best.json").read_text())
    assert report["rule"] == RULE
    assert report["step"] == 20
    assert [candidate["step"] for candidate in report["candidates"]] == [10, 20]
    assert report["candidates"][0]["metrics"]["answer_accuracy"]["count"] == 8
    write(tmp_path, line(10, 0.5, 0.25), line(20, 0.5, 0.75), line(30, 0.5, 0.8))
    assert best.step == 20
    best.update()
    assert best.step == 30
    summary = best.summary()
    assert summary
    assert summary["metrics"] == {"eval_loss": 0.5, "answer_accuracy": 0.8, "format_accuracy": 1.0}


def test_where_none_meets_the_conditions_there_is_no_best_and_it_is_said(tmp_path):
    write(tmp_path, line(10, 0.5, 0.25, form=0.5), line(20, 0.5, None))
    best = Best(parse_recipe(tree(RULE)).eval, tmp_path)
    assert best.step is None
    summary = best.summary()
    assert summary
    assert (
        summary["why"]
        == "step 10: format_accuracy is 0.5, not >= 0.98; step 20: answer_accuracy is missing"
    )
    assert json.loads((tmp_path / "best.json").read_text())["step"] is None
    with pytest.raises(
        BadInput, match=r"no best checkpoint: step 10: format_accuracy is 0\.5, not >= 0\.98"
    ):
        best_step(tmp_path)


@pytest.mark.parametrize(
    ("losses", "patience", "end"),
    [
        ([5, 4, 3], 1, None),
        ([5, 4, 4], 1, 30),  # no better than the best before
        ([5, 4, 4, 3], 1, None),  # a rule that came later ends no step of the past
        ([5, 4, 4, 4], 2, 40),
        ([5, 4, 4.5, 3, 3.5, 3.6], 2, 60),  # the better one at 40 starts the count anew
        ([math.nan, math.nan, math.nan], 2, None),
        ([5, math.nan, math.nan], 2, 30),
    ],
)
def test_a_run_ends_early_where_the_best_stays_the_same(losses, patience, end):
    rule = EarlyStoppingSection(metric="eval_loss", patience=patience)
    lines = {step: line(step, loss, 0.0) for step, loss in zip(range(10, 99, 10), losses)}
    assert early_end(rule, {0: line(0, 1.0, 0.0), **lines}) == end, "step 0 does not count"
    assert early_end(None, lines) is None


def test_an_early_end_is_found_again_from_the_record(tmp_path):
    write(tmp_path, line(10, 0.5, 0.25), line(20, 0.5, 0.25))
    section = parse_recipe(tree(RULE)).eval
    early = EarlyStoppingSection(metric="answer_accuracy", patience=1)
    section = section.model_copy(update={"early_stopping": early})
    assert Best(section, tmp_path).early_end == 20
    assert final_step(section, tmp_path, 90) == 20
    assert final_step(section, tmp_path / "nowhere", 90) == 90


def test_rank_0_says_whether_the_run_has_ended(tmp_path, monkeypatch):
    """On a shared file system another node may not see the last lines yet."""
    recipe = parse_recipe(
        {"model": {"name": "x"}, "data": {"train": [{"path": "x"}]}, "run": {"dir": "x"}}
    )
    prepared: Any = SimpleNamespace(recipe=recipe, run_dir=tmp_path, plan=SimpleNamespace(steps=90))
    (tmp_path / "summary.json").write_text('{"steps": 90}')
    assert train.has_ended(prepared, 90)
    assert not train.has_ended(prepared, 80)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(dist, "broadcast", lambda value: True)
    prepared.run_dir = tmp_path / "not seen yet"
    assert train.has_ended(prepared, 90)


def test_a_run_without_a_rule_has_no_best(tmp_path):
    write(tmp_path, line(10, 0.5, 0.25), best=None)
    (tmp_path / "best.json").write_text("of a rule that was taken out")
    best = Best(parse_recipe(tree(None)).eval, tmp_path)
    best.update()
    assert best.step is best.summary() is None
    assert not (tmp_path / "best.json").exists()
    with pytest.raises(BadInput, match=r"its recipe has no eval\.best"):
        best_step(tmp_path)
    with pytest.raises(BadInput, match="not a run folder"):
        best_step(tmp_path / "nowhere")


def test_half_a_line_is_no_evaluation(tmp_path):
    write(tmp_path, line(20, 0.5, 0.75), line(10, 0.5, 0.25))
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(line(30, 0.1, 1.0))[:-9])
    assert list(evaluations(tmp_path)) == [10, 20]
    assert evaluations(tmp_path / "nowhere") == {}


# ---------------------------------------------------------------------------------------- an export


@pytest.mark.parametrize(
    ("rule", "of_1", "of_2"),
    [
        (
            "{metric: eval_loss}",
            "not the last one, which is 2; not the best, which is 2, by the lowest eval_loss",
            "the last one; the best by the lowest eval_loss",
        ),
        (
            "{metric: eval_loss, subject_to: {eval_loss: '> 1.5'}}",
            "not the last one, which is 2; the best by the lowest eval_loss with eval_loss > 1.5",
            "the last one; not the best, which is 1, by the lowest eval_loss with eval_loss > 1.5",
        ),
        (
            "{metric: eval_loss, subject_to: {eval_loss: '> 9'}}",
            "not the last one, which is 2; none is the best by the lowest eval_loss with "
            "eval_loss > 9",
            "the last one; none is the best by the lowest eval_loss with eval_loss > 9",
        ),
        (
            "null",
            "not the last one, which is 2; which is best is not known, as its recipe has no "
            "eval.best",
            "the last one; which is best is not known, as its recipe has no eval.best",
        ),
    ],
)
def test_an_export_says_which_step_it_is(tmp_path: Path, rule: str, of_1: str, of_2: str) -> None:
    lines = [{"step": step, "eval_loss": 3.0 - step, "metrics": {}} for step in (1, 2)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "evaluations.jsonl").write_text(text)
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    recipe = load_recipe(ROOT / "recipes" / "debug.yaml", [f"eval.best={rule}"])
    for step, said in ((1, of_1), (2, of_2)):
        assert describe_step(tmp_path, recipe, step) == f"step {step} of {tmp_path}: {said}"
