"""Near-duplicates between train and held-out rows are found: all above the threshold, no others."""

import json
import random
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.data import leakage, tokenize
from packhorse.trainer.data.leakage import (
    Index,
    bands,
    check_leakage,
    conversation_text,
    sequences,
    similarity,
)
from packhorse.trainer.data.prepare import Prepared, prepare
from packhorse.trainer.datatypes import BadInput, Conversation, Message
from packhorse.trainer.utils.files import Stopped

WORDS = [f"word{n}" for n in range(500)]


def text(seed: int, words: int = 160) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def changed(original: str, words: int, seed: int = 0) -> str:
    """The text with so many of its words replaced."""
    parts, rng = original.split(), random.Random(seed)
    for place in rng.sample(range(len(parts)), words):
        parts[place] = f"other{rng.random()}"
    return " ".join(parts)


# --------------------------------------------------------------------------------------- similarity


def test_the_text_leaves_out_what_rows_of_a_source_share():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    conversation = Conversation(
        messages=(
            Message("system", "Be kind."),
            Message("user", "Is it cold?"),
            Message("assistant", "", reasoning_content="I had better look.", tool_calls=(call,)),
            Message("tool", "-3"),
            Message("assistant", "Yes."),
        ),
        tools=({"type": "function", "function": {"name": "schema", "parameters": {}}},),
    )
    found = conversation_text(conversation)
    assert all(
        part in found
        for part in ("Is it cold?", "I had better look.", "weather", "Oslo", "-3", "Yes.")
    )
    assert "kind" not in found
    assert "schema" not in found
    assert conversation_text(Conversation(text="To be")) == "To be"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("It is, as I said, cold.", "it is as I said cold"),  # neither case nor punctuation counts
        ("Yes", "yes!"),  # fewer words than a sequence has
        ("?!", "?!"),  # none at all
    ],
)
def test_alike(one, other):
    assert similarity(sequences(one), sequences(other)) == 1


@pytest.mark.parametrize(
    ("one", "other"), [("?!", "!?"), ("", "a"), ("one two", "two one"), (text(1), text(2))]
)
def test_unlike(one, other):
    assert similarity(sequences(one), sequences(other)) < 0.05


@pytest.mark.parametrize(
    "sentence",
    ["我们今天去公园散步吧", "きょうはこうえんへさんぽにいきます", "วนนเราไปเดนเลนทสวนกน"],
)
def test_scripts_without_spaces_are_compared_sign_by_sign(sentence):
    assert 0.2 < similarity(sequences(sentence), sequences(sentence[:-1])) < 1


@given(st.text(), st.text())
def test_similarity_is_a_share_and_one_for_the_same_text(one, other):
    assert similarity(sequences(one), sequences(one)) == 1
    assert (
        0
        <= similarity(sequences(one), sequences(other))
        == similarity(sequences(other), sequences(one))
        <= 1
    )


# ---------------------------------------------------------------------------------------- the index


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
def test_the_index_finds_what_comparing_all_with_all_finds(threshold):
    texts = [text(n) for n in range(100)]
    asked = [changed(texts[n], words=n % 20, seed=n) for n in range(100)]
    index = Index(threshold)
    index.add(texts[:37])
    index.add(texts[37:])
    sets = list(map(sequences, texts))
    compared = [
        [(n, similarity(sequences(one), other)) for n, other in enumerate(sets)] for one in asked
    ]
    truth = [
        [(number, similar) for number, similar in row if similar >= threshold] for row in compared
    ]
    assert sum(map(len, truth)) >= 5, "else there is nothing to find"
    assert list(index.near(asked)) == truth


def test_bands_let_hardly_a_pair_at_the_threshold_go_by():
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        count = bands(threshold)
        assert leakage.HASHES % count == 0
        assert (1 - threshold ** (leakage.HASHES / count)) ** count <= leakage.MOST_MISSED


# ---------------------------------------------------------------------------------------- two sides


@pytest.fixture(scope="module")
def tokenizer(shared):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "tokenizers/smollm2")


def written(path: Path, answers: list[Any]) -> str:
    rows = [
        {"question": f"Question {path.stem} {n}?", "answer": answer}
        for n, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe(tmp_path: Path, **data) -> Recipe:
    sections = {
        "model": {"name": "x"},
        "data": {"cache": str(tmp_path / "cache"), "max_rejects": 1.0, "max_leakage": 1.0, **data},
        "batch": {"seq_len": 8192},
        "run": {"dir": str(tmp_path / "run")},
    }
    return Recipe.model_validate(sections)


def leaky(tmp_path: Path, **data) -> Recipe:
    """Make 100 train rows and 20 held-out rows: one copies a train row, one nearly copies two."""
    train: list[str | None] = [text(n) for n in range(100)]
    train[60] = changed(text(5), words=2)
    train[90] = None  # rejected: what is not trained does not leak
    held_out = [
        train[40],
        changed(text(5), words=2, seed=1),
        text(90),
        *(text(n) for n in range(200, 217)),
    ]
    sources = {
        "train": [{"path": written(tmp_path / "train.jsonl", train)}],
        "eval": [{"path": written(tmp_path / "held.jsonl", held_out)}],
    }
    return recipe(tmp_path, **{**sources, **data})


def checked(of: Recipe, tokenizer: Any, stopping=lambda: False) -> Prepared:
    return check_leakage(
        of, tokenizer, prepare(of, tokenizer, "train"), prepare(of, tokenizer, "eval"), stopping
    )


def pairs(of: Recipe) -> list[dict[str, Any]]:
    (path,) = Path(of.data.cache).glob("leakage-*/leakage.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_pairs_are_written_and_the_rows_counted(tmp_path, tokenizer):
    of = leaky(tmp_path)
    report = checked(of, tokenizer).report["leakage"]
    assert (report["rows"], report["leaked_rows"], report["pairs"]) == (20, 2, 3)
    found = {
        (Path(pair["eval"]).name, Path(pair["train"]).name): pair["similarity"]
        for pair in pairs(of)
    }
    assert set(found) == {
        ("held.jsonl:1", "train.jsonl:41"),
        ("held.jsonl:2", "train.jsonl:6"),
        ("held.jsonl:2", "train.jsonl:61"),
    }
    assert all(0.8 <= similar <= 1 for similar in found.values())
    assert [pair["similarity"] for pair in report["closest"]] == sorted(
        found.values(), reverse=True
    )


def test_a_leak_stops_the_run_and_the_message_says_where(tmp_path, tokenizer):
    message = (
        r"2 of 20 rows \(10\.0%\) have a near-duplicate in data\.train, more than "
        r"data\.max_leakage \(1\.0%\); the most similar: .*held.jsonl:1 and .*train.jsonl:41 "
        r"\(0\.9\d\); .*; .*; all pairs are in .*leakage-.*/leakage.jsonl"
    )
    for _ in range(2):  # found in the cache it is the same
        with pytest.raises(BadInput, match=message):
            checked(leaky(tmp_path, max_leakage=0.01), tokenizer)
    assert checked(leaky(tmp_path, max_leakage=0.1), tokenizer).leakage


def test_the_threshold_is_the_recipes(tmp_path, tokenizer):
    report = checked(leaky(tmp_path, near_duplicate=0.95), tokenizer).leakage
    assert report
    assert report["leaked_rows"] == 1


def test_a_second_start_reads_nothing(tmp_path, tokenizer, monkeypatch):
    first = checked(leaky(tmp_path), tokenizer)
    monkeypatch.setattr(leakage, "_compare", None)
    assert checked(leaky(tmp_path), tokenizer).leakage == first.leakage


def test_processes_find_the_same_as_one(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    alone = leaky(tmp_path / "1", workers=1)
    checked(alone, tokenizer)
    monkeypatch.setattr(tokenize, "CHUNK_ROWS", 8)
    monkeypatch.setattr(tokenize, "POOL_FROM_CHUNKS", 2)
    many = leaky(tmp_path / "2", workers=2)
    checked(many, tokenizer)
    assert [pair["similarity"] for pair in pairs(many)] == [
        pair["similarity"] for pair in pairs(alone)
    ]


def test_it_stops_when_asked_to_and_the_next_start_resumes(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "whole").mkdir()
    whole = checked(leaky(tmp_path / "whole"), tokenizer).leakage
    monkeypatch.setattr(tokenize, "CHUNK_ROWS", 8)
    (tmp_path / "stopped").mkdir()
    of, near = leaky(tmp_path / "stopped", workers=1), leakage._FindNear.__call__
    asked = chain(
        [False] * 9, repeat(True)
    )  # not while waiting for its turn, but after some chunks of the train rows
    with pytest.raises(
        Stopped, match=r"stopped while comparing data\.eval with data\.train after 48 rows"
    ):
        checked(of, tokenizer, stopping=lambda: next(asked))
    assert all(".build-" in path.name for path in (tmp_path / "stopped/cache").glob("leakage-*")), (
        "nothing published"
    )
    (left,) = (tmp_path / "stopped/cache").glob("leakage-*")
    assert len((left / "leakage.jsonl").read_text().splitlines()) == 2
    with (left / "leakage.jsonl").open("a") as file:
        file.write("what a killed one wrote after it was last made safe")

    compared = []
    monkeypatch.setattr(
        leakage._FindNear, "__call__", lambda own, rows: compared.extend(rows) or near(own, rows)
    )
    report = checked(of, tokenizer).leakage
    assert [row.number for row in compared] == list(range(49, 101))
    assert len(pairs(of)) == 3
    assert report
    assert whole
    for found in (report, whole):
        assert (found["rows"], found["leaked_rows"], found["pairs"]) == (20, 2, 3)
    assert [pair["similarity"] for pair in report["closest"]] == [
        pair["similarity"] for pair in whole["closest"]
    ]
    assert sorted(path.name for path in Path(report["path"]).parent.iterdir()) == [
        "leakage.jsonl",
        "report.json",
    ]


def test_a_random_split_of_repeated_rows_is_a_leak_and_one_by_groups_is_not(tmp_path, tokenizer):
    """Ten wordings of each of 60 rows."""
    rows = [
        {
            "topic": topic,
            "question": f"Question {topic}?",
            "answer": changed(text(topic), words=2, seed=wording),
        }
        for topic in range(60)
        for wording in range(10)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = {"train": [{"path": str(path)}], "eval_fraction": 0.2, "max_leakage": 0.01}
    with pytest.raises(BadInput, match="near-duplicate"):
        checked(recipe(tmp_path, **split), tokenizer)
    by_topic = checked(recipe(tmp_path, **split, group_by="topic"), tokenizer)
    assert by_topic.leakage
    assert by_topic.leakage["rows"] > 50
    assert by_topic.leakage["pairs"] == 0


def test_gsm8k_does_not_leak(shared, tmp_path, tokenizer):
    sources = {
        "train": [{"path": str(shared / "data/gsm8k_train.jsonl"), "rows": 2000}],
        "eval": [{"path": str(shared / "data/gsm8k_test.jsonl"), "rows": 500}],
    }
    report = checked(recipe(tmp_path, **sources), tokenizer).leakage
    assert report
    assert report["pairs"] == 0


def test_repeated_rows_of_a_real_file_are_found(shared, tmp_path, tokenizer):
    split = {
        "train": [{"path": str(shared / "data/wwdc25_prompt_completion.jsonl")}],
        "eval_fraction": 0.1,
    }
    with pytest.raises(BadInput, match=r"25 of 195 rows \(12\.8%\)"):
        checked(recipe(tmp_path, **split, max_leakage=0.01), tokenizer)
