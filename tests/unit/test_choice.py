"""`parallel.sequence: auto`: the fewest ranks with which a step fits, and why."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import pytest
import torch

from packhorse.trainer import build_engine
from packhorse.trainer.config.recipe import Recipe, load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.estimate import choice
from packhorse.trainer.estimate import model as estimated_model
from packhorse.trainer.estimate.choice import (
    choose_sequence,
    largest_micro_batch,
    memory_by_mode,
    predict_memory,
)
from packhorse.trainer.estimate.memory import GIB, Cluster
from tests.models.shrunk import config_of
from tests.ranks import ROOT
from tests.unit.test_batch_plan import make_plan, some_flags

TOKENS = 2**18


def recipe(*overrides: str) -> Recipe:
    full = "model.activation_checkpointing=full"
    return load_recipe(
        ROOT / "recipes" / "debug.yaml",
        [f"model.name={ROOT / 'recipes/debug/model'}", full, f"batch.seq_len={TOKENS}", *overrides],
    )


def chosen(room: float, *overrides: str, fewest: int = 8) -> tuple[int, str]:
    made, why = choose_sequence(
        recipe("parallel.sequence=auto", *overrides),
        Cluster(4, 4, room),
        *(TOKENS, TOKENS, fewest),
    )
    return made.parallel.ranks_a_sequence, why


def test_the_fewest_ranks_with_which_a_step_fits() -> None:
    needed = {
        size: memory_by_mode(
            recipe(f"parallel.sequence={size}"), Cluster(4, 4, math.inf), TOKENS, TOKENS, "liger"
        )["full"].gpu_total
        for size in (1, 2, 4)
    }
    assert needed[1] > needed[2] > needed[4]
    for size, room in needed.items():
        number, why = chosen(room)
        assert number == size
        assert f"{size} of 4 ranks share each packed sequence, the fewest with which a step" in why
        assert f"{room / GIB:.1f} of {room / GIB:.1f} GiB" in why
    with pytest.raises(BadInput, match=r"auto: .* even if all of them share it: use more GPUs or"):
        chosen(needed[4] - 1)


def test_a_model_that_cannot_be_planned_needs_a_number() -> None:
    by_length = "model.rope_scaling={rope_type: dynamic, factor: 4.0}"
    with pytest.raises(BadInput, match=r"^parallel.sequence: auto: .* set parallel.sequence to a"):
        chosen(1000 * GIB, by_length)


@pytest.mark.parametrize(
    ("family", "error"),
    [
        *(("falcon", "KeyError"), ("gptj", "KeyError"), ("deepseek_v32", "TypeError")),
        *(("dbrx", "NotImplementedError"), ("mpt", "AttributeError"), ("xmod", "ValueError")),
        ("bart", ""),
    ],
)
def test_a_family_that_cannot_be_planned_is_not_predicted(
    family: str, error: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config_of(family).save_pretrained(tmp_path)
    caplog.set_level("INFO", "packhorse")
    assert predict_memory(recipe(f"model.name={tmp_path}"), 64, 64) == {}
    assert largest_micro_batch(recipe(f"model.name={tmp_path}"), 2**30) == 1
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert all("memory is not predicted: " in one and error in one for one in said)


def test_memory_errors_are_told_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError, torch.OutOfMemoryError):
        monkeypatch.setattr(estimated_model, "model_class", mock.Mock(side_effect=error))
        with pytest.raises(error):
            predict_memory(recipe(), 64, 64)


def test_no_group_is_without_a_micro_batch() -> None:
    """On a CPU that is all that counts, and nothing is predicted."""
    assert chosen(1000 * GIB, fewest=2)[0] == 2
    assert chosen(1000 * GIB, "parallel.allow_idle_ranks=true", fewest=2)[0] == 1
    with mock.patch.object(choice, "memory_by_mode") as predicted:
        assert [chosen(math.inf, fewest=fewest)[0] for fewest in (9, 3, 1)] == [1, 2, 4]
    predicted.assert_not_called()


def test_a_run_chooses_by_its_plan_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    plan = make_plan(some_flags(0, 40))
    with caplog.at_level("INFO"):
        made = build_engine.resolve_sequence(recipe("parallel.sequence=auto"), plan)
        kept = build_engine.resolve_sequence(recipe("parallel.sequence=3"), plan)
    assert (made.parallel.sequence, kept.parallel.sequence) == (1, 3)
    assert "parallel.sequence: 1 of 1 ranks share each packed sequence" in caplog.text


@pytest.mark.parametrize("wrong", ["0", "half", "1.5"])
def test_anything_else_is_refused(wrong: str) -> None:
    with pytest.raises(BadInput, match="it is `auto` or a whole number above 0"):
        recipe(f"parallel.sequence={wrong}")
