"""The guard's rules: what a spike is, and when the run stops after all."""

from __future__ import annotations

from pathlib import Path

import pytest

from packhorse.trainer.config.recipe import GuardSection
from packhorse.trainer.guard import Guard, StepNotApplied


def guard(folder: Path, recent: tuple[float, ...] = (1.0,) * 20, **section: object) -> Guard:
    return Guard(GuardSection.model_validate(section), folder, recent)


def test_a_spike_is_far_above_the_median(tmp_path: Path) -> None:
    watching = guard(tmp_path, spike_factor=3.0)
    assert watching.check_loss(2.9) is None
    assert watching.check_loss(3.1) == "its loss is 3.1000, 3.1 times the usual"


def test_a_spike_does_not_count_among_the_usual_losses(tmp_path: Path) -> None:
    watching = guard(tmp_path, (1.0,) * 10, spike_factor=3.0)
    for _ in range(20):
        assert watching.check_loss(100.0)
    assert watching.recent_losses == (1.0,) * 10


def test_a_loss_that_is_no_number_is_not_among_the_usual_ones(tmp_path: Path) -> None:
    watching = guard(tmp_path, (1.0,) * 10, spike_factor=3.0)
    assert watching.check_loss(float("nan")) is None
    assert watching.recent_losses == (1.0,) * 10


def test_beside_losses_of_zero_nothing_is_a_spike(tmp_path: Path) -> None:
    assert guard(tmp_path, (0.0,) * 10, spike_factor=3.0).check_loss(1e-9) is None


def test_the_first_losses_are_no_spikes(tmp_path: Path) -> None:
    watching = guard(tmp_path, (), spike_factor=2.0)
    assert [watching.check_loss(loss) for loss in (1.0, 100.0, 10000.0)] == [None] * 3


def test_nobody_is_asked_where_no_spike_is_looked_for(tmp_path: Path) -> None:
    assert not guard(tmp_path).looks_at_losses


def test_stop_is_the_rule_where_none_is_given(tmp_path: Path) -> None:
    with pytest.raises(
        StepNotApplied, match=r"step 7 was not applied: it burns; its rows: a\.jsonl:3"
    ):
        guard(tmp_path).decide(7, "it burns", "a.jsonl:3")
    assert not (tmp_path / "skipped_steps.jsonl").exists()


def test_each_fault_has_its_own_rule(tmp_path: Path) -> None:
    watching = guard(tmp_path, spike_factor=3.0, spike="skip", non_finite="rollback")
    watching.check_loss(9.0)
    assert watching.decide(1, "a spike", "") == "skip"
    watching.check_loss(1.0)
    assert watching.decide(2, "not finite", "") == "rollback"


def test_a_skipped_step_is_known_to_the_next_start(tmp_path: Path) -> None:
    guard(tmp_path, non_finite="skip").decide(3, "not finite", "a.jsonl:1")
    assert guard(tmp_path).skipped_steps == {2}
    assert [guard(tmp_path).applied(steps) for steps in (2, 3, 10)] == [2, 2, 9]


def test_a_damaged_line_is_set_aside(tmp_path: Path) -> None:
    lines = '{"step": 3}\nnull\n{"step": "x"}\n{"step": 5}\n{"st'
    (tmp_path / "skipped_steps.jsonl").write_text(lines)
    assert guard(tmp_path).skipped_steps == {2, 4}
    assert (tmp_path / "skipped_steps.jsonl.damaged").read_text() == 'null\n{"step": "x"}\n'
    assert guard(tmp_path).skipped_steps == {2, 4}


@pytest.mark.parametrize("step", ["Infinity", "NaN", "3.7", "true", '"3"', "0", "-1", "9" * 400])
def test_a_step_that_is_no_number_of_a_step_is_set_aside(tmp_path: Path, step: str) -> None:
    (tmp_path / "skipped_steps.jsonl").write_text(f'{{"step": {step}}}\n{{"step": 5}}\n')
    assert guard(tmp_path).skipped_steps == {4}
    aside = tmp_path / "skipped_steps.jsonl.damaged"
    assert aside.read_text() == f'{{"step": {step}}}\n'


def test_too_many_stop_the_run(tmp_path: Path) -> None:
    watching = guard(tmp_path, non_finite="skip", max_skipped_steps=1)
    watching.decide(3, "not finite", "")
    with pytest.raises(StepNotApplied, match="1 steps were skipped before"):
        watching.decide(4, "not finite", "")
