"""A document of a hundred thousand tokens is tokenized, packed, cut and previewed in memory
and time that grow as it does. One of 1.75 million takes 8 s and 0.7 GiB.
"""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.data import preview
from packhorse.trainer.data.loader import Loader
from packhorse.trainer.data.prepare import masker_of, prepare, train_plan
from packhorse.trainer.datatypes import Conversation, Message
from packhorse.trainer.model.load import load_tokenizer
from tests.ranks import ROOT

WORDS = ("the", "sum", "of", "two", "numbers", "is", "seven", "answer", "think", "plus", "(a)")
LEAST = 90_000  # tokens
MOST_BYTES = 200  # of Python's and numpy's memory for each token, at the peak


def written(words: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def long_recipe(folder: Path, words: int = 10_000) -> Any:
    folder.mkdir(exist_ok=True)
    turns = [("user", written(words, 1)), ("assistant", written(5 * words // 2, 2))]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (folder / "long.jsonl").write_text(json.dumps(row))
    return load_recipe(
        ROOT / "recipes" / "debug.yaml",
        [
            f"model.name={ROOT / 'recipes/debug/model'}",
            f"data.train=[{{path: {folder / 'long.jsonl'}}}]",
            f"data.cache={folder / 'cache'}",
            *("data.eval=[]", "data.workers=1", "eval.generate=null"),
            *("batch.seq_len=1048576", "batch.global_batch_size=1"),
        ],
    )


def test_it_is_tokenized_packed_and_cut_in_little_memory(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path)
    tokenizer = load_tokenizer(recipe.model)
    prepare(long_recipe(tmp_path / "short", 10), tokenizer, "train")  # which imports what it needs
    tracemalloc.start()
    data = prepare(recipe, tokenizer, "train")
    plan = train_plan(recipe, data)
    with Loader(data, plan, 3, 4, False, 4) as loader:
        batches = loader.step(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    (batch,) = batches
    tokens = sum(batch.lengths)
    print(f"{tokens:,} tokens, {peak / tokens:.0f} bytes each at the peak")
    assert tokens > LEAST
    assert abs(batch.tokens - tokens / 4) <= 1
    assert len(batch.input_ids) == batch.tokens, "of a slice alone"
    assert peak < MOST_BYTES * tokens


@pytest.mark.parametrize("turns", [1, 200])
def test_its_preview_decodes_each_token_a_few_times(tmp_path: Path, turns: int) -> None:
    """Not all that stands before each turn once more, which took hours for thousands of turns."""
    recipe = long_recipe(tmp_path)
    tokenizer = load_tokenizer(recipe.model)
    masker = masker_of(recipe.data, tokenizer)
    texts = [written(20_000 // turns, seed) for seed in range(2 * turns)]
    roles = ("user", "assistant") * turns
    row = Conversation(tuple(Message(r, t) for r, t in zip(roles, texts, strict=True)))
    example = masker.example(row)
    starts = preview.role_starts(row, example, masker)
    with mock.patch.object(preview, "_decode", wraps=preview._decode) as decoded:
        shown = list(preview.spans(example, tokenizer, starts))
    tokens = len(example.input_ids)
    assert sum(len(call.args[1]) for call in decoded.call_args_list) < 2 * tokens
    assert "".join(run.text for run in shown) == preview._decode(
        tokenizer, example.input_ids.tolist()
    )
    assert [run.role for run in shown if run.role] == list(roles)
