"""A batch has the shifted labels of its own documents. The batches of a run train every trained
token exactly once an epoch.
"""

import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packhorse.trainer.config.recipe import BatchSection, LossSection, Recipe, TrainSection
from packhorse.trainer.data import tokenize
from packhorse.trainer.data.batch_plan import Corpus, Plan
from packhorse.trainer.data.cache import prepare as prepare_documents
from packhorse.trainer.data.documents import COLUMNS, FILES
from packhorse.trainer.data.eval_plan import eval_plan
from packhorse.trainer.data.loader import Loader, filler_batch
from packhorse.trainer.data.mask import Masker
from packhorse.trainer.data.pack import pack
from packhorse.trainer.data.prepare import (
    Prepared,
    documents_of,
    held_out_prompts,
    prepare,
    train_plan,
)
from packhorse.trainer.data.tokenize import LengthPolicy, tokenize_rows
from packhorse.trainer.datatypes import BadInput, Batch, Example, Piece, Row

SEQ_LEN = 16
PACKINGS = ("none", "bfd", "bfd_split", "wrapped", "greedy")


def made_up(number: int, longest: int) -> Example:
    """Make a document whose token ids no other document has."""
    rng = np.random.default_rng(number)
    length = int(rng.integers(2, longest + 1))
    trained = rng.random(length) < 0.6
    trained[0], trained[-1] = False, True
    return Example(number * 1000 + np.arange(length, dtype=np.int32), trained)


@pytest.fixture(scope="module", params=PACKINGS)
def packing(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def prepared(packing, tmp_path_factory) -> Prepared:
    longest = SEQ_LEN if packing in ("none", "bfd", "greedy") else 3 * SEQ_LEN
    rows = [Row(0, 0, number, None) for number in range(1, 61)]

    def chunks(done):
        return tokenize_rows(
            rows[done:],
            lambda rows: [(made_up(row.number, longest),) for row in rows],
            LengthPolicy(99, "split", packing_cuts=True),
            workers=1,
        )

    folder = tmp_path_factory.mktemp("cache") / packing
    documents = prepare_documents(
        folder, chunks, sources=["a"], files=["a"], what="data.train", max_rejects=0.0
    )
    return Prepared(documents, (1.0,), ("a.jsonl",))


def plan_of(
    prepared: Prepared, packing: str, global_batch_size=6, micro_batch_size=1, epochs=1, **loss
) -> Plan:
    count = prepared.documents.count_trained
    return Plan(
        Corpus(
            prepared.documents.lengths,
            prepared.documents.trained_counts,
            prepared.documents.sources,
            prepared.weights,
            count,
        ),
        lambda lengths, *others: pack(lengths, SEQ_LEN, packing, *others),
        BatchSection.model_validate(
            {
                "seq_len": SEQ_LEN,
                "global_batch_size": global_batch_size,
                "micro_batch_size": micro_batch_size,
            }
        ),
        TrainSection.model_validate({"epochs": epochs}),
        LossSection.model_validate(loss),
    )


def batches_of(prepared: Prepared, plan: Plan, world: int = 1) -> list[list[Batch]]:
    """Build the batches of all ranks, step by step."""
    loaders = [Loader(prepared, plan, rank, world, pin=False) for rank in range(world)]
    steps = [
        [batch for loader in loaders for batch in loader.step(step)] for step in range(plan.steps)
    ]
    for loader in loaders:
        loader.close()
    return steps


def check_batch(batch: Batch, prepared: Prepared, plan: Plan) -> None:
    """Compare a batch with the documents, token by token."""
    ends = batch.cu_seqlens.tolist()
    assert ends[0] == 0
    assert ends[-1] == len(batch.input_ids) == batch.tokens
    assert list(batch.lengths) == batch.cu_seqlens.diff().tolist()
    targets = dict(zip(batch.trained_positions.tolist(), batch.targets.tolist(), strict=True))
    epoch = batch.document_keys[0][0]
    pieces = [Piece(*piece) for piece in plan.pieces(epoch, batch.sequence_ids).tolist()]
    assert len(pieces) == len(ends) - 1 == len(batch.document_keys)
    for begin, piece, key in zip(ends, pieces, batch.document_keys, strict=False):
        assert key[1:] == (piece.document, piece.piece)
        document = prepared.documents.example(piece.document)
        for offset in range(piece.stop - piece.start):
            place, position = begin + offset, piece.start + offset
            assert batch.input_ids[place] == document.input_ids[position]
            assert batch.position_ids[place] == offset
            learned = position + 1 < len(document.input_ids) and document.trained[position + 1]
            assert targets.get(place) == (document.input_ids[position + 1] if learned else None)


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_a_batch_is_its_documents_shifted_labels(prepared, packing, micro_batch_size):
    plan = plan_of(prepared, packing, micro_batch_size=micro_batch_size)
    for step in batches_of(prepared, plan):
        for batch in step:
            check_batch(batch, prepared, plan)


@given(
    world=st.integers(1, 5),
    global_batch_size=st.integers(1, 12),
    micro_batch_size=st.integers(1, 3),
)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_trained_token_is_learned_once_with_any_number_of_ranks(
    prepared, packing, world, global_batch_size, micro_batch_size
):
    plan = plan_of(prepared, packing, global_batch_size, micro_batch_size)
    learned = Counter()
    for number, step in enumerate(batches_of(prepared, plan, world)):
        real = [batch for batch in step if not batch.is_filler]
        assert sum(batch.trained_tokens for batch in real) == plan.step(number).trained_tokens
        total = sum(float(batch.weights.double().sum()) for batch in step)
        assert total == pytest.approx(1 if plan.step(number).trained_tokens else 0, abs=1e-6)
        for batch in real:
            learned.update(batch.targets.tolist())
    documents = prepared.documents
    assert learned == Counter(documents.input_ids[documents.trained].tolist())


def test_ranks_and_micro_batch_size_change_no_weight(prepared, packing):
    def weights_of_targets(world: int, micro_batch_size: int) -> list[dict[int, float]]:
        plan = plan_of(prepared, packing, 6, micro_batch_size, weighting="example")
        steps = batches_of(prepared, plan, world)
        real = [[batch for batch in step if not batch.is_filler] for step in steps]
        return [
            {
                t: w
                for batch in step
                for t, w in zip(batch.targets.tolist(), batch.weights.tolist(), strict=True)
            }
            for step in real
        ]

    first = weights_of_targets(1, 1)
    for world, micro_batch_size in ((2, 1), (4, 1), (3, 2)):
        assert weights_of_targets(world, micro_batch_size) == first


def test_shapes_and_types_are_those_of_batch(prepared, packing):
    plan = plan_of(prepared, packing)
    for batch in [*batches_of(prepared, plan)[0], filler_batch()]:
        assert (
            batch.input_ids.dtype
            == batch.position_ids.dtype
            == batch.trained_positions.dtype
            == torch.int64
        )
        assert batch.targets.dtype == torch.int64
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.weights.dtype == torch.float32
        assert batch.input_ids.shape == batch.position_ids.shape
        assert batch.trained_positions.shape == batch.targets.shape == batch.weights.shape


def test_a_filler_is_two_tokens_of_weight_zero():
    batch = filler_batch(epoch=3)
    assert batch.is_filler
    assert (len(batch.input_ids), batch.tokens, batch.trained_tokens) == (2, 0, 0)
    assert batch.trained_positions.tolist() == [0]
    assert batch.weights.tolist() == [0.0]
    assert batch.lengths == (2,)
    assert batch.sequence_ids == ()


# --------------------------------------------------------------------------------------- the thread


@pytest.fixture
def bfd(tmp_path) -> tuple[Prepared, Plan]:
    def chunks(done):
        rows = [Row(0, 0, number, None) for number in range(1, 61)]
        limits = LengthPolicy(SEQ_LEN, "reject", packing_cuts=False)
        return tokenize_rows(
            rows, lambda rows: [(made_up(row.number, SEQ_LEN),) for row in rows], limits, workers=1
        )

    documents = prepare_documents(
        tmp_path / "d", chunks, sources=["a"], files=["a"], what="x", max_rejects=0.0
    )
    prepared = Prepared(documents, (1.0,), ("a.jsonl",))
    return prepared, plan_of(prepared, "bfd", epochs=2)


def same(one: Batch, other: Batch) -> bool:
    return one.document_keys == other.document_keys and torch.equal(one.input_ids, other.input_ids)


def test_steps_can_be_asked_for_in_any_order(bfd):
    prepared, plan = bfd
    with Loader(prepared, plan, 0, 2, pin=False) as loader:
        in_order = [loader.step(step) for step in range(plan.steps)]
        for step in (plan.steps - 1, 0, 3, 3, 1):
            assert all(same(a, b) for a, b in zip(loader.step(step), in_order[step], strict=True))


def test_streaming_a_step_gives_the_same_batches(bfd):
    prepared, plan = bfd
    with Loader(prepared, plan, 1, 2, pin=False) as loader:
        assert all(same(a, b) for a, b in zip(loader.stream(2), loader.step(2), strict=True))


def test_the_next_steps_are_built_before_they_are_asked_for(bfd, monkeypatch):
    prepared, plan = bfd
    with Loader(prepared, plan, 0, 1, pin=False) as loader:
        built = []
        build = loader._build_step
        monkeypatch.setattr(
            loader, "_build_step", lambda step: (built.append(step), build(step))[1]
        )
        loader.step(0)
        deadline = time.monotonic() + 5
        while built != [0, 1, 2] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert built == [0, 1, 2]
        loader.step(1)
    assert Counter(built).most_common(1)[0][1] == 1, "nothing is built twice"


@pytest.mark.parametrize("column", ["input_ids", "trained", "offsets", "digests"])
def test_a_document_that_changed_since_the_start_is_not_trained_on(bfd, column):
    """The cache is mapped: the batch would hold what the disk or another process put there."""
    (prepared, plan), last = bfd, bfd[1].steps - 1
    documents = prepared.documents
    with Loader(prepared, plan, 0, 1, pin=False) as loader:
        document = loader.step(last)[0].document_keys[0][1]
        by_token = column in ("input_ids", "trained")
        place = documents.offsets[document] if by_token else document
        written = np.memmap(documents.folder / FILES[column], COLUMNS[column], "r+")
        written[place] ^= True
        with pytest.raises(BadInput, match=rf"damaged \(document {document} has changed.*delete"):
            loader.step(last)


def test_an_error_in_the_thread_reaches_the_loop_at_its_step(bfd, monkeypatch):
    prepared, plan = bfd
    with Loader(prepared, plan, 0, 1, pin=False) as loader:
        build = loader._build_step

        def faulty(step):
            if step == 1:
                raise OSError("the disk went away")
            return build(step)

        monkeypatch.setattr(loader, "_build_step", faulty)
        loader.step(0)
        with pytest.raises(OSError, match="went away"):
            loader.step(1)


def test_closing_ends_the_thread(bfd):
    prepared, plan = bfd
    loader = Loader(prepared, plan, 0, 1, pin=False)
    loader.step(0)
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


# ----------------------------------------------------------------------------------- the real rooms


def recipe(tmp_path: Path, rows: list[dict] | None = None, **data) -> Recipe:
    train = tmp_path / "train.jsonl"
    if rows is not None:
        train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {
        "model": {"name": "x"},
        "data": {
            "train": [{"path": str(train)}],
            "cache": str(tmp_path / "cache"),
            "max_rejects": 1.0,
            **data,
        },
        "batch": {"seq_len": 256, "global_batch_size": 4},
        "run": {"dir": str(tmp_path / "run")},
    }
    return Recipe.model_validate(sections)


@pytest.fixture(scope="module")
def tokenizer(shared):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "tokenizers/smollm2")


def questions(count: int) -> list[dict]:
    return [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}."} for n in range(count)]


def cached(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").glob("*-*")}


def test_rows_become_batches(tmp_path, tokenizer):
    of = recipe(tmp_path, [*questions(40), {"question": "What?", "answer": None}])
    prepared = prepare(of, tokenizer, "train")
    assert prepared.report["rows"] == 41
    assert prepared.report["rejected"] == 1
    assert prepared.place(7) == (str(tmp_path / "train.jsonl"), 8)
    plan = train_plan(of, prepared)
    with Loader(prepared, plan, 0, 1, pin=False) as loader:
        texts = [
            tokenizer.decode(batch.targets)
            for step in range(plan.steps)
            for batch in loader.step(step)
        ]
    assert all(f"It is {2 * n}.<|im_end|>" in "".join(texts) for n in range(40))
    assert "What" not in "".join(texts)
    places = [
        place
        for step in range(plan.steps)
        for place in documents_of(plan, plan.step(step), prepared)
    ]
    assert sorted(places) == [(str(tmp_path / "train.jsonl"), row) for row in range(1, 41)]


def test_each_document_knows_its_file_in_a_folder(tmp_path, tokenizer):
    (tmp_path / "shards").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "shards" / name).write_text(
            "".join(json.dumps(row) + "\n" for row in questions(3))
        )
    prepared = prepare(
        recipe(tmp_path, train=[{"path": str(tmp_path / "shards")}]), tokenizer, "train"
    )
    assert [(Path(file).name, row) for file, row in map(prepared.place, range(6))] == [
        (name, row) for name in ("a.jsonl", "b.jsonl") for row in (1, 2, 3)
    ]


def test_what_shapes_the_documents_is_in_the_key(tmp_path, tokenizer):
    """A stale cache is never used, and what does not shape the documents makes no new one."""
    base = recipe(tmp_path, questions(20))
    prepare(base, tokenizer, "train")
    (first,) = cached(tmp_path)

    source = {"path": base.data.train[0].path}
    same = [
        {"train": [{**source, "weight": 0.5}]},
        {"packing": "wrapped"},
        {"max_rejects": 0.5},
        {"workers": 1},
        {"max_leakage": 0.5},
    ]
    for change in same:
        prepare(recipe(tmp_path, **change), tokenizer, "train")
        assert cached(tmp_path) == {first}, change
    other = [
        {"train": [{**source, "rows": 10}]},
        {"train": [source, source]},
        {"train": [{**source, "filters": {"answer_words": [1, 3]}}]},
        {"train": [{**source, "filters": {"pattern": "It"}}]},
        {"train_on": "all"},
        {"train_on_eot": False},
        {"max_length": 100},
        {"too_long": "truncate"},
        {"duplicates": "drop"},
        {"eval_fraction": 0.3},
        {"eval_fraction": 0.4},
        {"eval_fraction": 0.4, "train": [{**source, "group_by": "question"}]},
        {"too_long": "truncate_anywhere"},
        {"too_long": "split"},
        {"too_long": "split", "split_context": 3},
        {"train_on_eot": "with_newline"},
        {"control_tokens": "text"},
        {"control_tokens": "keep"},
    ]
    for number, change in enumerate(other, start=2):
        prepare(recipe(tmp_path, **change), tokenizer, "train")
        assert len(cached(tmp_path)) == number, change
    prepare(recipe(tmp_path, questions(21)), tokenizer, "train")
    assert len(cached(tmp_path)) == len(other) + 2


def test_names_that_nobody_reads_are_counted_and_can_be_ignored(tmp_path, tokenizer):
    rows = [
        {**row, "source": "web", **({"url": "x"} if n < 5 else {})}
        for n, row in enumerate(questions(20))
    ]
    report = prepare(recipe(tmp_path, rows), tokenizer, "train").report
    assert report["unread"] == {"source": 20, "url": 5} == report["sources"][0]["unread"]
    silent = recipe(tmp_path, rows, ignore_columns=["source", "url"])
    assert prepare(silent, tokenizer, "train").report["unread"] == {}


def test_a_row_that_is_flagged_in_unknown_words_stops_the_preparation(tmp_path, tokenizer):
    rows = [*questions(20), {**questions(1)[0], "no_loss": True}]
    with pytest.raises(BadInput, match=r"column `no_loss`.*data.ignore_columns=\[no_loss\]"):
        prepare(recipe(tmp_path, rows), tokenizer, "train")


def test_the_users_own_functions_are_in_the_key(tmp_path, tokenizer, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "shaping.py").write_text(
        "def read(row):\n"
        "    return [{'role': 'user', 'content': row['question']}, {'role': 'assistant', "
        "'content': row['answer']}]\n"
        "def keep(row, conversation):\n"
        "    return '3' not in row['answer'] or 'a three'\n"
    )
    source = {"path": write(tmp_path, questions(20))}
    plain = prepare(recipe(tmp_path, train=[source]), tokenizer, "train")
    mine = {**source, "function": "shaping:read", "filters": {"function": "shaping:keep"}}
    shaped = prepare(recipe(tmp_path, train=[mine]), tokenizer, "train")
    threes = sum("3" in row["answer"] for row in questions(20))
    assert shaped.report["filter_reasons"] == {"shaping:keep: a three": threes}
    assert shaped.documents.lengths.sum() < plain.documents.lengths.sum()
    with (tmp_path / "shaping.py").open("a") as file:
        file.write("# changed\n")
    prepare(recipe(tmp_path, train=[mine]), tokenizer, "train")
    assert len(cached(tmp_path)) == 3


def test_a_broken_line_ends_the_preparation_or_is_a_reject_that_is_named(tmp_path, tokenizer):
    path = tmp_path / "train.jsonl"
    of = recipe(tmp_path, questions(200), max_rejects=0.01)
    path.write_text(path.read_text() + '{"question": "cut o')
    with pytest.raises(BadInput, match=rf"{path}:201: broken JSON: .*; mend or delete the line"):
        prepare(of, tokenizer, "train")
    data = of.data.model_copy(update={"broken_lines": "reject"})
    prepared = prepare(of.model_copy(update={"data": data}), tokenizer, "train")
    assert (prepared.report["rows"], prepared.report["rejected"]) == (201, 1)
    (line,) = prepared.rejects_path.read_text().splitlines()
    reason = "broken JSON: Unterminated string starting at"
    assert json.loads(line) == {"source": str(path), "row": 201, "reason": reason}


def test_rows_that_are_too_long_are_told_with_the_limit_the_longest_and_the_key(
    tmp_path, tokenizer
):
    of = recipe(tmp_path, questions(20), max_rejects=0.0)
    longest = int(prepare(of, tokenizer, "train").documents.lengths.max())
    for changes, key in (({}, "batch.seq_len"), ({"max_length": longest - 1}, "data.max_length")):
        short = of.model_copy(
            update={
                "data": of.data.model_copy(update=changes),
                "batch": of.batch.model_copy(update={} if changes else {"seq_len": longest - 1}),
            }
        )
        with pytest.raises(BadInput) as refused:
            prepare(short, tokenizer, "train")
        assert (
            f"the longest of the rows that are too long has {longest} tokens: raise {key} "
            f"({longest - 1}), or set data.too_long to truncate or split"
        ) in str(refused.value)
    lenient = short.data.model_copy(update={"max_rejects": 0.99})
    prepared = prepare(short.model_copy(update={"data": lenient}), tokenizer, "train")
    listed = [json.loads(line) for line in prepared.rejects_path.read_text().splitlines()]
    assert {line["reason"] for line in listed} == {"longer than max_length"}
    assert {line["tokens"] for line in listed} == {longest}
    assert prepared.report["longest_reject"] == longest


def test_a_weight_that_comes_to_no_row_is_refused_for_its_source(tmp_path, tokenizer):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in questions(10)))

    def mixed(weight: float) -> Recipe:
        first = {"path": str(tmp_path / "train.jsonl")}
        return recipe(tmp_path, questions(20), train=[first, {"path": str(few), "weight": weight}])

    message = r"data\.train\.1\.weight: 0\.04 x 10 documents of .*few\.jsonl .* raise it to 0\.1 or"
    with pytest.raises(BadInput, match=message):
        prepare(mixed(0.04), tokenizer, "train")
    assert prepare(mixed(0.1), tokenizer, "train").weights == (1.0, 0.1)


def test_sources_of_all_formats_are_trained_together(tmp_path, tokenizer):
    kinds = {
        "messages": [
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "It is 1."},
                ]
            }
        ],
        "sharegpt": [
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "It is 2."},
                ]
            }
        ],
        "instruction": [{"instruction": "a", "input": "", "output": "It is 3."}],
        "prompt_completion": [{"prompt": "a", "completion": "It is 4."}],
        "question_answer": questions(1),
        "text": [{"text": "It is 5."}],
    }
    sources = []
    for name, rows in kinds.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append({"path": str(tmp_path / f"{name}.jsonl")})
    prepared = prepare(recipe(tmp_path, train=sources), tokenizer, "train")
    trained = [prepared.documents.example(number) for number in range(len(kinds))]
    texts = [tokenizer.decode(example.input_ids[example.trained]) for example in trained]
    assert [text.replace("<|im_end|>", "") for text in texts[:5]] == [
        f"It is {n}." for n in (1, 2, 3, 4, 0)
    ]
    assert "is 5." in texts[5]
    assert [source["documents"] for source in prepared.report["sources"]] == [1] * 6


def test_filters_work_in_the_processes_that_tokenize(tmp_path, tokenizer, monkeypatch):
    rows = [{**row, "best": str(2 * n + n % 2)} for n, row in enumerate(questions(40))]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "early.py").write_text(
        "def keep(row, conversation): return row['best'] != '8' or 'an eight'"
    )
    filters = {"math_answer": "best", "function": "early:keep"}
    train = [{"path": write(tmp_path, rows), "filters": filters}]
    monkeypatch.setattr(tokenize, "CHUNK_ROWS", 8)
    monkeypatch.setattr(tokenize, "POOL_FROM_CHUNKS", 2)
    many = prepare(recipe(tmp_path, train=train, workers=2), tokenizer, "train")
    assert many.report["filter_reasons"] == {
        "math_answer: not the reference's value": 20,
        "early:keep: an eight": 1,
    }
    assert many.documents.rows.tolist() == [row for row in range(1, 41, 2) if row != 5]


def test_rows_that_are_cut_are_in_the_report(tmp_path, tokenizer):
    rows = [*questions(3), {"question": "Count.", "answer": " ".join(map(str, range(50)))}]
    whole = prepare(recipe(tmp_path, rows), tokenizer, "train").report
    cut = prepare(
        recipe(tmp_path, max_length=64, too_long="truncate_anywhere"), tokenizer, "train"
    ).report
    assert (whole["cut"], whole["lost_trained_tokens"]) == (0, 0)
    assert (cut["cut"], cut["rejected"], cut["documents"]) == (1, 0, 4)
    assert cut["lost_trained_tokens"] == whole["trained_tokens"] - cut["trained_tokens"] > 0
    assert cut["sources"][0]["cut"] == 1
    parted = prepare(
        recipe(tmp_path, max_length=64, too_long="split", split_context=8), tokenizer, "train"
    ).report
    assert (parted["cut"], parted["lost_trained_tokens"]) == (1, 0)
    assert parted["trained_tokens"] == whole["trained_tokens"]
    assert parted["documents"] > 4


@pytest.mark.parametrize(("policy", "rejected"), [("reject", 1), ("text", 0), ("keep", 0)])
def test_the_recipe_decides_about_control_tokens_in_a_text(tmp_path, tokenizer, policy, rejected):
    rows = [*questions(3), {"question": "What is <|im_end|>?", "answer": "The end."}]
    prepared = prepare(recipe(tmp_path, rows, control_tokens=policy), tokenizer, "train")
    assert prepared.report["rejected"] == rejected
    if not rejected:
        assert prepared.documents.example(3).input_ids.tolist().count(
            tokenizer.eos_token_id
        ) == 3 + (policy == "keep")


def test_a_cache_is_found_again_under_another_path_and_by_eval(tmp_path, tokenizer):
    first = prepare(recipe(tmp_path, questions(20)), tokenizer, "train")
    (tmp_path / "moved.jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes())
    moved = recipe(tmp_path, eval=[{"path": str(tmp_path / "moved.jsonl")}])
    again = prepare(moved, tokenizer, "eval")
    assert len(cached(tmp_path)) == 1
    assert again.fingerprint == first.fingerprint
    plan = eval_plan(moved, again).plan
    assert (plan.steps, plan.step(0).trained_tokens) == (1, again.documents.trained_counts.sum())


def rows_of(prepared: Prepared) -> set[int]:
    return set(prepared.documents.rows.tolist())


def test_each_row_is_on_one_side_and_stays_there_when_rows_are_added(tmp_path, tokenizer):
    of = recipe(tmp_path, questions(100), eval_fraction=0.2)
    train, held_out = (
        rows_of(prepare(of, tokenizer, "train")),
        rows_of(prepare(of, tokenizer, "eval")),
    )
    assert train | held_out == set(range(1, 101))
    assert not train & held_out
    assert 8 <= len(held_out) <= 32

    more = recipe(
        tmp_path,
        [*questions(100), *({"question": f"New {n}?", "answer": "No."} for n in range(50))],
    )
    more = more.model_copy(update={"data": of.data})
    assert rows_of(prepare(more, tokenizer, "train")) & set(range(1, 101)) == train
    turned = recipe(tmp_path, questions(100)[::-1]).model_copy(update={"data": of.data})
    assert {101 - row for row in rows_of(prepare(turned, tokenizer, "eval"))} == held_out


def test_held_out_rows_come_after_the_given_ones_and_all_of_them_count_once(tmp_path, tokenizer):
    given = write(tmp_path, [{"question": "Given?", "answer": "Yes."}])
    train = recipe(tmp_path, questions(50)).data.train[0].path
    of = recipe(
        tmp_path, train=[{"path": train, "weight": 0.5}], eval=[{"path": given}], eval_fraction=0.2
    )
    held_out = prepare(of, tokenizer, "eval")
    assert [source["name"] for source in held_out.report["sources"]] == [given, train]
    assert held_out.place(0) == (given, 1)
    assert held_out.place(1)[0] == train
    assert sum(eval_plan(of, held_out).trained_tokens) == held_out.documents.trained_counts.sum()
    prompts = held_out_prompts(of, Masker(tokenizer), 100)
    assert len(prompts) == len(held_out.documents.lengths)
    assert prompts[0].reference == "Yes."
    assert prompts[1].reference == f"It is {2 * (held_out.place(1)[1] - 1)}."


def test_a_share_so_small_that_no_row_is_held_out_is_refused(tmp_path, tokenizer):
    with pytest.raises(BadInput, match=r"data\.eval: there are no rows; .* data\.eval_fraction"):
        prepare(recipe(tmp_path, questions(3), eval_fraction=1e-9), tokenizer, "eval")


def test_duplicates_are_dropped_from_train_alone(tmp_path, tokenizer):
    twice = [*questions(10), *questions(10)]
    of = recipe(tmp_path, twice, duplicates="drop", eval=[{"path": write(tmp_path, twice)}])
    train, held_out = prepare(of, tokenizer, "train"), prepare(of, tokenizer, "eval")
    assert train.documents.rows.tolist() == list(range(1, 11))
    assert (train.report["duplicates"], held_out.report["duplicates"]) == (10, 10)
    assert len(held_out.documents.lengths) == 20
    assert (
        train_plan(of, train).steps
        == train_plan(
            recipe(tmp_path), prepare(recipe(tmp_path, rows=questions(10)), tokenizer, "train")
        ).steps
    )


def test_processes_tokenize_the_same_as_one(tmp_path, tokenizer, monkeypatch):
    train = [{"path": write(tmp_path, [*questions(60), {"question": "?", "answer": None}])}]
    alone = prepare(recipe(tmp_path / "1", train=train, workers=1), tokenizer, "train")
    monkeypatch.setattr(tokenize, "CHUNK_ROWS", 8)
    monkeypatch.setattr(tokenize, "POOL_FROM_CHUNKS", 2)
    many = prepare(recipe(tmp_path / "2", train=train, workers=2), tokenizer, "train")
    assert many.documents.folder != alone.documents.folder
    assert many.fingerprint == alone.fingerprint
    assert many.report == alone.report


def write(tmp_path: Path, rows: list[dict]) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_large_packings_are_kept_for_the_other_processes(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("packhorse.trainer.data.prepare.KEPT_FROM_DOCUMENTS", 10)
    of = recipe(tmp_path, questions(40))
    prepared = prepare(of, tokenizer, "train")
    plan = train_plan(of, prepared)
    assert len([name for name in cached(tmp_path) if name.startswith("packing-")]) == 1
    monkeypatch.setattr(
        "packhorse.trainer.data.pack.pack", None
    )  # the second process has nothing to pack
    again = train_plan(of, prepared)
    assert [again.step(s) for s in range(again.steps)] == [plan.step(s) for s in range(plan.steps)]
    with pytest.raises(TypeError):
        train_plan(
            of.model_copy(update={"train": TrainSection.model_validate({"seed": 1})}), prepared
        )


def test_held_out_prompts_end_before_the_answer(tmp_path, tokenizer):
    rows = [{"question": "What?", "answer": None}, *questions(5)]
    of = recipe(tmp_path, questions(1), eval=[{"path": write(tmp_path, rows)}])
    prompts = held_out_prompts(of, Masker(tokenizer), 3)
    assert [prompt.reference for prompt in prompts] == ["It is 0.", "It is 2.", "It is 4."]
    text = prompts[1].text
    assert text == tokenizer.decode(prompts[1].input_ids)
    assert "What is 1 + 1?" in text
    assert text.endswith("<|im_start|>assistant\n")


def test_held_out_prompts_are_filtered_as_the_rows_are(tmp_path, tokenizer):
    source = {"path": write(tmp_path, questions(5)), "filters": {"pattern": "[268]"}}
    prompts = held_out_prompts(recipe(tmp_path, questions(1), eval=[source]), Masker(tokenizer), 9)
    assert [prompt.reference for prompt in prompts] == ["It is 2.", "It is 6.", "It is 8."]


def test_held_out_rows_without_an_answer_are_refused(tmp_path, tokenizer):
    of = recipe(
        tmp_path, questions(1), eval=[{"path": write(tmp_path, [{"text": "To be or not to be"}])}]
    )
    with pytest.raises(BadInput, match="no row has a prompt and an answer"):
        held_out_prompts(of, Masker(tokenizer), 3)
