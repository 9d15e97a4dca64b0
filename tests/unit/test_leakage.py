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
from packhorse.trainer.data.leakage import check_leakage, conversation_text, prompt_text
from packhorse.trainer.data.near_duplicates import (
    HASHES,
    MOST_MISSED,
    Index,
    bands,
    sequences,
    similarity,
)
from packhorse.trainer.data.prepare import Prepared, prepare
from packhorse.trainer.datatypes import BadInput, Conversation, Message
from packhorse.trainer.utils.staged_build import Stopped

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
        assert HASHES % count == 0
        assert (1 - threshold ** (HASHES / count)) ** count <= MOST_MISSED


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
    return both(of, tokenizer, stopping)[1]


def both(of: Recipe, tokenizer: Any, stopping=lambda: False) -> tuple[Prepared, Prepared]:
    return check_leakage(
        of, prepare(of, tokenizer, "train"), prepare(of, tokenizer, "eval"), stopping
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
        "leaked.int64",
        "prompts.jsonl",
        "report.json",
    ]


@pytest.mark.parametrize("name", ["report.json", *leakage.FILES])
def test_a_kept_comparison_that_has_changed_is_not_believed(tmp_path, tokenizer, name):
    of = leaky(tmp_path)
    kept = checked(of, tokenizer).leakage
    assert kept
    path = Path(kept["path"]).with_name(name)
    whole = path.read_bytes()
    # another number of leaked rows, or another row that is dropped; one less; nonsense
    last_digit = whole.rfind(b"2") if name == "report.json" else -1
    damages = [whole[:last_digit] + b"0" + whole[last_digit:][1:], whole[8:], b"[" * 99_999]
    for damaged in damages:
        if damaged == whole:  # no prompts are alike
            continue
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match=r"the data cache is damaged .* delete this folder"):
            checked(of, tokenizer)
    path.unlink()
    with pytest.raises(BadInput, match="the data cache is damaged"):
        checked(of, tokenizer)


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
    split["train"] = [{"path": str(path), "group_by": "topic"}]
    by_topic = checked(recipe(tmp_path, **split), tokenizer)
    assert by_topic.leakage
    assert by_topic.leakage["rows"] > 50
    assert by_topic.leakage["pairs"] == 0


def as_question(question: str, answer: str) -> dict[str, Any]:
    return {"question": question, "answer": answer}


def as_instruction(question: str, answer: str) -> dict[str, Any]:
    return {"instruction": "Answer this.", "input": question, "output": answer}


def as_turns(question: str, answer: str) -> dict[str, Any]:
    """A conversation of which only the user's turns are the same in all samples."""
    said = [("system", "Be kind."), ("user", "Hello"), ("assistant", answer[:40])]
    said += [("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": text} for role, text in said], "id": question}


def sampled(tmp_path: Path, form, group_by: str | None = None, **data) -> Recipe:
    """Eight answers to each of 30 questions, of which a tenth of the rows is held out."""
    path = tmp_path / "sampled.jsonl"
    rows = [form(text(n, words=30), text(1000 + 8 * n + k)) for n in range(30) for k in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = [{"path": str(path), "group_by": group_by}]
    split = {"train": train, "eval_fraction": 0.1, "max_leakage": 0.01}
    return recipe(tmp_path, **{**split, **data})


@pytest.mark.parametrize(
    ("form", "group"), [(as_question, "question"), (as_instruction, "input"), (as_turns, "id")]
)
def test_sampled_answers_split_by_row_leak_by_their_prompt(tmp_path, tokenizer, form, group):
    message = (
        r"data\.eval: (\d+) of \1 rows \(100\.0%\) have a prompt that rows of data\.train have, "
        r"too, .*sampled.jsonl:\d+ and .*prompts.jsonl: .* data\.train\[\]\.group_by, .* "
        r"data\.max_leakage: drop"
    )
    with pytest.raises(BadInput, match=message):
        checked(sampled(tmp_path, form), tokenizer)
    grouped = checked(sampled(tmp_path, form, group_by=group), tokenizer).leakage
    assert grouped
    assert grouped["rows"] >= 8
    assert grouped["leaked_rows"] == grouped["prompts"]["leaked_rows"] == 0


def test_prompts_are_counted_apart_and_similar_ones_do_not_stop_the_run(tmp_path, tokenizer):
    train = [text(n, words=60) for n in range(3)] + ["3 + 4 = ?", "Say this."]
    asked = [
        *(train[0], f"  {train[0].upper()}\n", train[0]),  # the same prompt, three times
        changed(train[1], words=1),
        "3 - 4 = ?",  # the same words, and another question
        "Another one.",
    ]
    for name, prompts in {"train": train, "held": asked}.items():
        rows = [as_question(prompt, text(100 * len(name) + n)) for n, prompt in enumerate(prompts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sides = {
        "train": [{"path": str(tmp_path / "train.jsonl")}],
        "eval": [{"path": str(tmp_path / "held.jsonl")}],
    }
    found = checked(recipe(tmp_path, **sides), tokenizer).leakage
    assert found
    assert (found["rows"], found["leaked_rows"]) == (6, 0)
    prompts = found["prompts"]
    assert (prompts["leaked_rows"], prompts["exact_rows"], prompts["pairs"]) == (5, 3, 3)
    assert Path(prompts["path"]).read_text().count('"eval_rows": 3') == 1
    # at 3 of 6 rows it may pass, although 5 of 6 have a similar prompt in train
    assert checked(recipe(tmp_path, **sides, max_leakage=0.5), tokenizer)
    with pytest.raises(BadInput, match="3 of 6 rows"):
        checked(recipe(tmp_path, **sides, max_leakage=0.4), tokenizer)


def test_a_plain_text_has_no_prompt():
    assert prompt_text(Conversation(text="To be")) is None
    assert prompt_text(Conversation(messages=(Message("assistant", "Hello."),))) is None


def test_training_rows_that_leak_are_dropped_if_the_recipe_says_so(tmp_path, tokenizer):
    of = sampled(tmp_path, as_question, max_leakage="drop")
    whole, held_out = prepare(of, tokenizer, "train"), prepare(of, tokenizer, "eval")
    train, compared = both(of, tokenizer)
    assert compared.fingerprint == held_out.fingerprint, "evaluation is what it was"

    rows = [json.loads(line) for line in (tmp_path / "sampled.jsonl").read_text().splitlines()]

    def questions(side: Prepared) -> list[str]:
        return [rows[number - 1]["question"] for number in side.documents.rows]

    asked = set(questions(held_out))
    kept = [n for n, question in enumerate(questions(whole)) if question not in asked]
    assert questions(train) == [questions(whole)[n] for n in kept]
    assert 0 < len(kept) < len(questions(whole))
    for number, document in enumerate(kept):
        was, now = whole.documents.example(document), train.documents.example(number)
        assert was.input_ids.tolist() == now.input_ids.tolist()
        assert was.trained.tolist() == now.trained.tolist()
    report, (source,) = train.report, train.report["sources"]
    assert report["leaked"] == source["leaked"] == len(questions(whole)) - len(kept)
    assert report["documents"] == source["documents"] == len(kept)
    assert report["tokens"] == source["tokens"] == int(train.documents.lengths.sum())
    assert train.fingerprint != whole.fingerprint
    assert both(of, tokenizer)[0].fingerprint == train.fingerprint, "found again"


def test_a_drop_drops_near_duplicates_too_and_nothing_where_nothing_leaks(tmp_path, tokenizer):
    train, _ = both(leaky(tmp_path, max_leakage="drop"), tokenizer)
    assert sorted({*range(1, 101)} - set(train.documents.rows.tolist())) == [6, 41, 61, 91]
    assert (train.report["leaked"], train.report["rejected"]) == (3, 1)
    (tmp_path / "clean").mkdir()
    clean = sampled(tmp_path / "clean", as_question, max_leakage="drop", group_by="question")
    assert both(clean, tokenizer)[0].fingerprint == prepare(clean, tokenizer, "train").fingerprint


def test_a_drop_that_leaves_nothing_is_refused(tmp_path, tokenizer):
    same = [{"path": written(tmp_path / "same.jsonl", [text(1), text(2)])}]
    with pytest.raises(BadInput, match="no row is left, as all 2 leaked"):
        checked(recipe(tmp_path, train=same, eval=same, max_leakage="drop"), tokenizer)


def test_gsm8k_does_not_leak(shared, tmp_path, tokenizer):
    sources = {
        "train": [{"path": str(shared / "data/gsm8k_train.jsonl"), "rows": 2000}],
        "eval": [{"path": str(shared / "data/gsm8k_test.jsonl"), "rows": 500}],
    }
    report = checked(recipe(tmp_path, **sources), tokenizer).leakage
    assert report
    assert report["pairs"] == report["prompts"]["pairs"] == 0


def test_repeated_rows_of_a_real_file_are_found(shared, tmp_path, tokenizer):
    split = {
        "train": [{"path": str(shared / "data/wwdc25_prompt_completion.jsonl")}],
        "eval_fraction": 0.1,
    }
    with pytest.raises(BadInput, match=r"25 of 195 rows \(12\.8%\)"):
        checked(recipe(tmp_path, **split, max_leakage=0.01), tokenizer)
