"""Held-out rows are one step a source; the sources' losses add up to the loss of all rows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.data.eval_plan import EvalPlan, eval_plan, source_names
from packhorse.trainer.data.loader import Loader
from packhorse.trainer.data.prepare import Prepared, prepare
from packhorse.trainer.datatypes import Batch
from packhorse.trainer.eval.evaluator import Losses, held_out_losses, mean_losses


def recipe(tmp_path: Path, *sources: dict[str, Any], **batch: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": "x"},
            "data": {
                "train": [{"path": str(tmp_path / "train.jsonl")}],
                "eval": list(sources),
                "cache": str(tmp_path / "cache"),
                "max_rejects": 1.0,
            },
            "batch": {"seq_len": 128, "global_batch_size": 2, "micro_batch_size": 3, **batch},
            "run": {"dir": str(tmp_path / "run")},
        }
    )


@pytest.fixture
def planned(tmp_path: Path, shared: Path) -> tuple[Prepared, EvalPlan]:
    """Return three sources, of 20, 5 and no good rows."""
    for name, count in (("math", 20), ("chat", 5), ("empty", 1)):
        answer = None if name == "empty" else "It is so. "
        rows = [
            {"question": f"{name} {n}?", "answer": answer and answer * (n % 3 + 1)}
            for n in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    names = ("math", "empty", "chat")
    of = recipe(tmp_path, *({"path": str(tmp_path / f"{name}.jsonl")} for name in names))
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/smollm2")
    prepared = prepare(of, tokenizer, "eval")
    return prepared, eval_plan(of, prepared)


def test_held_out_rows_are_one_step_a_source(planned: tuple[Prepared, EvalPlan]) -> None:
    prepared, made = planned
    assert made.sources == ("math", "chat")
    found, of_source = prepared.documents, prepared.documents.sources
    expected = [int(found.trained_counts[of_source == source].sum()) for source in (0, 2)]
    assert made.trained_tokens == expected
    for step, source in enumerate((0, 2)):
        plan = made.plan.step(step)
        assert {len(micro_batch) for micro_batch in plan.micro_batches[:-1]} <= {3}
        numbers = [number for micro_batch in plan.micro_batches for number in micro_batch]
        documents = made.plan.pieces(step, numbers)[:, 0]
        assert sorted(documents) == [d for d, its in enumerate(of_source) if its == source]


class Engine:
    """Gives each trained token the loss (its id mod 7), so that sums are known."""

    def evaluate(self, batch: Batch) -> torch.Tensor:
        return (batch.weights.double() * (batch.targets % 7)).sum()


def test_the_loss_of_all_rows_is_the_mean_over_all_tokens(
    planned: tuple[Prepared, EvalPlan],
) -> None:
    prepared, made = planned
    quiet: Any = SimpleNamespace(beat=lambda where: None, poll=lambda: False)
    with Loader(prepared, made.plan, 0, 1, pin=False) as loader:
        found = held_out_losses(Engine(), loader, quiet, quiet)  # type: ignore[arg-type]
    assert found is not None
    losses = mean_losses(found, made)
    documents = prepared.documents
    values: dict[int, list[int]] = {0: [], 2: []}
    for number, source in enumerate(documents.sources):
        example = documents.example(number)
        values[source] += (example.input_ids[example.trained] % 7).tolist()
    every = values[0] + values[2]
    assert losses.whole == pytest.approx(sum(every) / len(every), rel=1e-6)
    assert losses.by_source == {
        "math": pytest.approx(sum(values[0]) / len(values[0]), rel=1e-6),
        "chat": pytest.approx(sum(values[2]) / len(values[2]), rel=1e-6),
    }


def test_one_source_has_no_loss_of_its_own(planned: tuple[Prepared, EvalPlan]) -> None:
    assert mean_losses([1.5], planned[1]) == Losses(1.5, {})


def test_names_are_short_and_differ(tmp_path: Path) -> None:
    paths = ("a/math.jsonl.gz", "b/chat.jsonl", "c/chat.jsonl", "folder/", "b/chat.jsonl")
    made = recipe(tmp_path, *({"path": path} for path in paths), {"name": "org/set"})
    assert source_names(made.data) == [
        "math",
        "b_chat.jsonl",
        "c_chat.jsonl",
        "folder",
        "b_chat.jsonl-2",
        "set",
    ]
