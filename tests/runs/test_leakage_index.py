"""Of 10,000 training rows only near-duplicates are compared with an evaluation row, text by text.

Comparing all pairs would take 2 x 10^7 comparisons; the index leaves about one for a leaked row.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from unittest import mock

import pytest

from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.data import leakage, near_duplicates
from packhorse.trainer.data.prepare import Prepared, prepare

TRAIN_ROWS, HELD_OUT_ROWS, PLANTED = 10_000, 2_000, 200
ROW_TOKENS = 200


@pytest.mark.runs
def test_few_of_many_rows_are_compared(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models/smollm2_tokenizer")
    recipe = written(tmp_path, shared / "data/gsm8k_train.jsonl", tokenizer)

    counted = mock.Mock(wraps=near_duplicates.similarity)
    monkeypatch.setattr(near_duplicates, "similarity", counted)
    train, held_out = both(recipe, tokenizer)
    report = leakage.check_leakage(recipe, train, held_out)[1].leakage
    assert abs(train.report["tokens"] / TRAIN_ROWS - ROW_TOKENS) < 20
    assert report
    assert (report["rows"], report["leaked_rows"], report["pairs"]) == (
        HELD_OUT_ROWS,
        PLANTED,
        PLANTED,
    )
    # of rows and of prompts: the planted ones, and what is alike by chance
    assert PLANTED <= counted.call_count <= 3 * PLANTED


def both(recipe: Recipe, tokenizer: object) -> tuple[Prepared, Prepared]:
    return prepare(recipe, tokenizer, "train"), prepare(recipe, tokenizer, "eval")


def written(folder: Path, words_of: Path, tokenizer: object) -> Recipe:
    """Write rows of a real text's words, drawn at random; planted are train rows with two words
    changed.
    """
    rng = random.Random(0)
    with words_of.open(encoding="utf-8") as file:
        words = [
            word for line in file for text in json.loads(line).values() for word in text.split()
        ]
    per_row = words_that_make(ROW_TOKENS - 40, words, tokenizer)
    train = [rng.choices(words, k=per_row) for _ in range(TRAIN_ROWS)]
    held_out = [rng.choices(words, k=per_row) for _ in range(HELD_OUT_ROWS)]
    for number in range(PLANTED):
        held_out[number] = train[number * (TRAIN_ROWS // PLANTED)].copy()
        for place in rng.sample(range(per_row), 2):
            held_out[number][place] = "altered"
    for name, rows in (("train", train), ("held", held_out)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for row in rows:
                row = {"question": " ".join(row[:50]), "answer": " ".join(row[50:])}
                file.write(json.dumps(row) + "\n")
    return Recipe.model_validate(
        {
            "model": {"name": "x"},
            "data": {
                "train": [{"path": str(folder / "train.jsonl")}],
                "eval": [{"path": str(folder / "held.jsonl")}],
                "max_leakage": 1.0,
                "workers": 1,
                "cache": str(folder / "cache"),
            },
            "batch": {"seq_len": 4096},
            "run": {"dir": str(folder / "run")},
        }
    )


def words_that_make(tokens: int, words: list[str], tokenizer: object) -> int:
    sample = random.Random(1).choices(words, k=10_000)
    return round(tokens / len(tokenizer(" ".join(sample)).input_ids) * len(sample))  # pyright: ignore
