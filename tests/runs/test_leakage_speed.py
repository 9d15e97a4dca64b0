"""100,000 rows of 200 tokens against 2,000 held-out ones, tokenizing included: under three minutes
on two cores.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from trainer.config.recipe import Recipe
from trainer.data.leakage import check_leakage
from trainer.data.prepare import Prepared, prepare

TRAIN_ROWS, HELD_OUT_ROWS, PLANTED = 100_000, 2_000, 200
ROW_TOKENS = 200
MOST_S = 180.0


@pytest.mark.runs
def test_a_hundred_thousand_rows_are_prepared_and_compared_in_three_minutes(
    shared: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models/smollm2_tokenizer")
    recipe = written(tmp_path, shared / "data/gsm8k_train.jsonl", tokenizer)
    started = time.monotonic()
    train, held_out, prepared_s = *both(recipe, tokenizer), time.monotonic() - started
    report = check_leakage(recipe, tokenizer, train, held_out).leakage
    took_s = time.monotonic() - started
    tokens = train.report["tokens"]
    print(
        f"\n{tokens:,} tokens, {tokens / TRAIN_ROWS:.0f} a row: {prepared_s:.0f} s to prepare, "
        f"{took_s:.0f} s in all"
    )
    assert abs(tokens / TRAIN_ROWS - ROW_TOKENS) < 20
    assert report
    assert (report["rows"], report["leaked_rows"], report["pairs"]) == (
        HELD_OUT_ROWS,
        PLANTED,
        PLANTED,
    )
    assert took_s < MOST_S

    started = time.monotonic()
    again = check_leakage(recipe, tokenizer, *both(recipe, tokenizer))
    assert again.leakage == report
    assert time.monotonic() - started < 2


def both(recipe: Recipe, tokenizer: object) -> tuple[Prepared, Prepared]:
    return prepare(recipe, tokenizer, "train"), prepare(recipe, tokenizer, "eval")


def written(folder: Path, words_of: Path, tokenizer: object) -> Recipe:
    """Rows of a real text's words, drawn at random; the planted ones are train rows with two words
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
        held_out[number] = train[number * 400].copy()
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
                "workers": 2,
                "cache": str(folder / "cache"),
            },
            "batch": {"seq_len": 4096},
            "run": {"dir": str(folder / "run")},
        }
    )


def words_that_make(tokens: int, words: list[str], tokenizer: object) -> int:
    sample = random.Random(1).choices(words, k=10_000)
    return round(tokens / len(tokenizer(" ".join(sample)).input_ids) * len(sample))  # pyright: ignore
