"""The plan of a streaming source is a function of its log, whenever its shards arrived and
whichever rank asked first.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packhorse.trainer.config.recipe import Recipe, load_recipe, parse_recipe
from packhorse.trainer.data import arrow_fields, streaming
from packhorse.trainer.data.batch_plan import Plan
from packhorse.trainer.data.loader import Loader
from packhorse.trainer.data.prepare import train_plan
from packhorse.trainer.data.shard_log import LOG, ShardLog
from packhorse.trainer.data.streaming import StreamingData, prepare_now
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.load import load_tokenizer
from packhorse.trainer.run_folder import open_run_folder
from packhorse.trainer.utils.staged_build import Stopped
from tests.ranks import ROOT

STEPS = 12
SHARD_COUNTS = {"number": 0, "bytes": 9, "sequences": 3, "first_step": 1}
SHARD = {**SHARD_COUNTS, **dict.fromkeys(("file", "digest", "documents", "rejects"), "a")}
SHARD |= {"report": {}, "stream": {"rows": [1, 2], "state": {}}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(load_recipe(ROOT / "recipes" / "debug.yaml").model)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


class Ground:
    """A folder that files are added to, and run folders of recipes that train on it."""

    def __init__(self, root: Path, cache: Path, tokenizer: Any) -> None:
        self.folder, self.root, self._cache, self._tokenizer = (
            root / "folder",
            root,
            cache,
            tokenizer,
        )
        self.folder.mkdir()
        self.run_dir = root / "run"

    def add(self, name: str, rows: int) -> Path:
        lines = [
            {"question": f"{name} {n}", "answer": "four words of answer " * (1 + n % 3)}
            for n in range(rows)
        ]
        aside = self.root / name  # renamed when it is whole, as a producer must
        aside.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return aside.rename(self.folder / name)

    def recipe(self, **data: Any) -> Recipe:
        sections = {
            "model": {"name": "x"},
            "data": {
                "train": [{"path": str(self.folder), "streaming": True}],
                "cache": str(self._cache),
                **data,
            },
            "batch": {"seq_len": 128, "global_batch_size": 3},
            "train": {"steps": STEPS},
            "run": {"dir": str(self.run_dir)},
        }
        return parse_recipe(sections)

    def open(self, **data: Any) -> tuple[StreamingData, Plan]:
        """Open data and plan as rank 0 does at a start, unless the test makes this another rank."""
        self.run_dir.mkdir(exist_ok=True)
        recipe = self.recipe(**data)
        opened = StreamingData(recipe, self._tokenizer)
        return opened, train_plan(recipe, opened)

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / LOG).read_text().splitlines()]

    def uses(self) -> list[str]:
        return [line["file"] for line in self.log()]


@pytest.fixture
def ground(tmp_path: Path, cache: Path, tokenizer: Any) -> Ground:
    return Ground(tmp_path, cache, tokenizer)


def all_steps(plan: Plan) -> list[Any]:
    return [plan.step(step) for step in range(plan.steps)]


def as_other_rank(monkeypatch: pytest.MonkeyPatch, is_other: bool) -> None:
    monkeypatch.setattr(streaming, "is_main", lambda: not is_other)
    monkeypatch.setattr("packhorse.trainer.data.prepare.is_main", lambda: not is_other)


# ----------------------------------------------------------------------------------------- the plan


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    arrivals=st.lists(st.integers(0, STEPS - 1), min_size=5, max_size=5),
    lag=st.integers(0, 3),
)
@settings(max_examples=20, deadline=None)
def test_every_shards_sequences_come_once_and_in_order_whenever_it_came(
    cache, tokenizer, sizes, arrivals, lag
):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        ground = Ground(Path(folder), cache, tokenizer)
        coming = sorted(zip(arrivals, sizes[1:], strict=False))
        ground.add("s0.jsonl", sizes[0])
        _, plan = ground.open()
        as_other_rank(monkeypatch, True)
        _, other = ground.open()
        for step in range(STEPS + lag):
            while coming and coming[0][0] <= step:
                ground.add(f"s{9 - len(coming)}.jsonl", coming.pop(0)[1])
            if step < STEPS:
                as_other_rank(monkeypatch, False)
                plan.step(step)
            if step >= lag:  # the other rank asks behind, and for what rank 0 has asked for
                as_other_rank(monkeypatch, True)
                assert other.step(step - lag) == plan.step(step - lag)

        seen: dict[int, list[int]] = {}
        sizes_of: dict[int, set[int]] = {}
        for step in all_steps(plan):
            numbers = [number for micro_batch in step.micro_batches for number in micro_batch]
            seen.setdefault(step.epoch, []).extend(numbers)
            sizes_of.setdefault(step.epoch, set()).add(len(numbers))
        log = ground.log()
        assert list(seen) == [line["number"] for line in log], (
            "shards are used in the order of the log"
        )
        for number, sequences in seen.items():
            whole = range(log[number]["sequences"])
            assert sequences == list(whole)[: len(sequences)]
            assert len(sequences) == len(whole) or number == len(log) - 1, (
                "only the last may be cut by train.steps"
            )
            assert max(sizes_of[number]) - min(sizes_of[number]) <= 1

        as_other_rank(monkeypatch, False)
        assert all_steps(ground.open()[1]) == all_steps(plan), (
            "and a later start reads the same plan from the log"
        )
        assert ground.log() == log


def test_a_rank_that_is_ahead_waits_for_rank_0(ground, monkeypatch):
    ground.add("a.jsonl", 20)
    as_other_rank(monkeypatch, True)
    _, ahead = ground.open()
    found = []
    thread = threading.Thread(target=lambda: found.append(ahead.step(0)))
    thread.start()
    time.sleep(3 * streaming.POLL_S)
    assert not found
    as_other_rank(monkeypatch, False)
    _, plan = ground.open()
    thread.join(10)
    assert found == [plan.step(0)]


def test_a_loader_that_is_closed_waits_for_no_shard(ground, monkeypatch):
    ground.add("a.jsonl", 20)
    as_other_rank(monkeypatch, True)
    data, ahead = ground.open()
    loader = Loader(data, ahead, 0, 1, pin=False)
    waiting = loader._thread.submit(ahead.step, 0)
    time.sleep(2 * streaming.POLL_S)
    loader.close()
    with pytest.raises(Stopped, match="waiting for shard 0"):
        waiting.result(10)
    as_other_rank(monkeypatch, False)
    _, plan = ground.open()
    with Loader(data, ahead, 0, 1, pin=False) as again:
        assert again.step(0)
    assert ahead.step(0) == plan.step(0)


def test_new_shards_come_first_and_known_ones_take_turns(ground):
    ground.add("b.jsonl", 2)
    ground.add("c.jsonl", 2)
    _, plan = ground.open()
    for step in range(5):
        plan.step(step)
    ground.add("a.jsonl", 2)
    all_steps(plan)
    assert ground.uses() == [f"{name}.jsonl" for name in "bcbcbacabcab"[:STEPS]]


def test_a_shard_that_comes_again_is_packed_and_noised_afresh(ground):
    ground.add("a.jsonl", 30)
    data, plan = ground.open()
    all_steps(plan)
    assert ground.uses()[:2] == ["a.jsonl", "a.jsonl"]
    assert plan.pieces(0, [0]).tolist() != plan.pieces(1, [0]).tolist()
    with Loader(data, plan, 0, 1, pin=False) as loader:
        keys = [
            key
            for step in range(STEPS)
            for batch in loader.step(step)
            for key in batch.document_keys
        ]
    assert len(keys) == len(set(keys)), "no two uses of a document share their noise"


def test_batches_are_made_of_their_shards_documents(ground, tokenizer):
    ground.add("a.jsonl", 5)
    ground.add("b.jsonl", 5)
    data, plan = ground.open()
    with Loader(data, plan, 0, 1, pin=False) as loader:
        for step in map(plan.step, range(STEPS)):
            text = "".join(tokenizer.decode(batch.input_ids) for batch in loader.step(step.step))
            here = ground.uses()[step.epoch]
            assert here in text
            assert ({"a.jsonl", "b.jsonl"} - {here}).pop() not in text


def test_the_number_of_ranks_is_checked_against_the_first_shard(ground):
    ground.add("a.jsonl", 2)
    _, plan = ground.open()
    with pytest.raises(
        BadInput,
        match=r"only 1 micro-batches: start 1 \(by the first shard; the others are not known\)",
    ):
        plan.check_world(2, allow_idle_ranks=False)
    assert len(ground.log()) == 1, "nothing was decided for it"


def test_the_report_counts_every_known_shard_once(ground):
    ground.add("a.jsonl", 5)
    ground.add("b.jsonl", 7)
    data, plan = ground.open()
    all_steps(plan)
    assert len(ground.log()) > 2
    assert (data.report["rows"], data.report["shards"]) == (12, 2)
    assert data.report["tokens"] == sum(line["report"]["tokens"] for line in ground.log()[:2])


def test_rejects_are_counted_by_shard_and_together(ground):
    for name in ("a.jsonl", "b.jsonl"):
        ground.add(name, 4)
        with (ground.folder / name).open("a") as file:
            file.write('{"question": "?", "answer": null}\n')
            file.write(json.dumps({"question": "?", "answer": "long " * 200}) + "\n")
    data, plan = ground.open(max_rejects=0.5)
    all_steps(plan)
    reasons = {"no answer": 1, "longer than max_length": 1}
    longest = ground.log()[1]["report"]["longest_reject"]
    assert ground.log()[1]["report"]["reasons"] == reasons
    assert data.report["reasons"] == {reason: 2 * count for reason, count in reasons.items()}
    assert data.report["longest_reject"] == longest > 200, "the longest, and not their sum"
    assert "no answer" in Path(ground.log()[1]["rejects"]).read_text()


# ------------------------------------------------------------------------------------------ the log


def test_a_torn_last_line_is_dropped(ground):
    ground.add("a.jsonl", 20)
    _, plan = ground.open()
    whole = all_steps(plan)
    path = ground.run_dir / LOG
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) >= 2
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:-9])
    assert all_steps(ground.open()[1]) == whole
    assert path.read_bytes() == b"".join(lines)


def test_a_damaged_line_is_refused(ground):
    ground.add("a.jsonl", 20)
    ground.open()
    with (ground.run_dir / LOG).open("a") as file:
        file.write('{"number": 1}\n')
    with pytest.raises(BadInput, match=r"shards.jsonl: line 2 is damaged"):
        ground.open()


@pytest.mark.parametrize(
    "changed",
    [
        *({key: value} for key in SHARD_COUNTS for value in (-1, True, 1.0, "1", None, 10**400)),
        *({key: None} for key in ("file", "digest", "documents", "report", "rejects")),
        {"number": 1},
        {"first_step": 0},
        {"stream": {"rows": [1], "state": {}}},
        {"stream": {"rows": [1, "2"], "state": {}}},
        {"stream": []},
        {"unknown": 1},
    ],
)
def test_a_line_of_other_values_is_refused_in_a_sentence(tmp_path, changed):
    (tmp_path / LOG).write_text(json.dumps(SHARD) + "\n")
    assert [asdict(shard) for shard in ShardLog(tmp_path / LOG).shards] == [SHARD]
    (tmp_path / LOG).write_text(json.dumps({**SHARD, **changed}) + "\n")
    with pytest.raises(BadInput, match=r"line 1 is damaged \(.*\); restore the file, or give"):
        ShardLog(tmp_path / LOG)


@pytest.mark.parametrize("line", ["[" * 99_999, "[]", "7", '{"number": 0}', "9" * 5_000])
def test_a_line_of_another_shape_is_refused_in_a_sentence(tmp_path, line):
    (tmp_path / LOG).write_text(line + "\n")
    with pytest.raises(BadInput, match=r"line 1 is damaged \(.*\); restore the file, or give"):
        ShardLog(tmp_path / LOG)


def test_the_fingerprint_is_of_the_log_up_to_the_step(ground):
    ground.add("a.jsonl", 60)
    data, plan = ground.open()
    early = data.fingerprint_at(2)
    (first,) = ground.log()
    all_steps(plan)
    later = ground.log()[1]["first_step"]
    assert data.fingerprint_at(2) == early == ground.open()[0].fingerprint_at(2), (
        "what comes later does not matter"
    )
    assert data.fingerprint_at(later - 1) == early
    assert data.fingerprint_at(later) != early
    (ground.run_dir / LOG).write_text(json.dumps({**first, "digest": "another"}) + "\n")
    assert ground.open()[0].fingerprint_at(2) != early


def test_the_log_of_a_changed_recipe_is_begun_anew(ground):
    ground.add("a.jsonl", 20)
    open_run_folder(ground.recipe(), ground.run_dir)
    ground.open()
    open_run_folder(ground.recipe(), ground.run_dir)
    assert ground.uses()
    open_run_folder(ground.recipe(train_on="all"), ground.run_dir)
    assert not (ground.run_dir / LOG).exists()


def test_another_recipes_log_is_refused(ground):
    ground.add("a.jsonl", 20)
    all_steps(ground.open()[1])
    recipe = ground.recipe()
    other = recipe.model_copy(
        update={"batch": recipe.batch.model_copy(update={"global_batch_size": 1})}
    )
    with pytest.raises(BadInput, match="it is the log of another recipe"):
        all_steps(train_plan(other, StreamingData(other, ground._tokenizer)))


# -------------------------------------------------------------------------------------------- files


def test_a_shard_that_changed_after_its_use_is_refused_by_name(ground):
    path = ground.add("a.jsonl", 4)
    _, plan = ground.open()
    plan.step(0)
    path.write_text(path.read_text().replace("words", "WORDS"))
    with pytest.raises(BadInput, match=r"a\.jsonl: the file has changed since it was used"):
        all_steps(plan)


def test_a_shard_that_grew_after_its_use_is_refused_before_it_is_needed_again(ground):
    path = ground.add("a.jsonl", 4)
    _, plan = ground.open()
    ground.add("b.jsonl", 4)
    with path.open("a") as file:
        file.write('{"question": "new", "answer": "lost"}\n')
    with pytest.raises(
        BadInput, match=r"a\.jsonl: the file has changed since it was used; .* into a new file"
    ):
        all_steps(plan)


def test_past_shards_may_go_and_are_missed_only_when_they_are_needed(ground):
    past = ground.add("a.jsonl", 30)
    _, plan = ground.open()
    ground.add("b.jsonl", 30)
    first = next(step.step for step in map(plan.step, range(STEPS)) if step.epoch == 1)
    whole = plan.step(first)
    past.unlink()
    _, resumed = ground.open()
    assert resumed.step(first) == whole
    assert resumed.micro_batch_counts().min() > 0
    assert resumed.fill(1) == plan.fill(1)
    with pytest.raises(
        BadInput, match=r"a\.jsonl: shards.jsonl names this shard, which is needed again"
    ):
        resumed.step(0)


def test_files_that_are_being_written_are_no_shards(ground):
    ground.add("a.jsonl", 4)
    ground.add(".b.jsonl", 4)
    ground.add("c.jsonl.part", 4)
    all_steps(ground.open()[1])
    assert set(ground.uses()) == {"a.jsonl"}


def test_too_many_rejects_in_a_shard_stop_the_run_at_it(ground):
    ground.add("a.jsonl", 4)
    (ground.folder / "b.jsonl").write_text(
        '{"question": "?", "answer": null}\n{"question": "?", "answer": "!"}\n'
    )
    with pytest.raises(BadInput, match=r"1 of 2 rows \(50.0%\) are rejected"):
        all_steps(ground.open()[1])
    assert ground.uses() == ["a.jsonl"]


def test_a_shard_that_holds_a_held_out_row_stops_the_run_at_it(ground):
    first = ground.add("a.jsonl", 3)
    held = ground.root / "held.jsonl"
    held.write_text(
        '{"question": "What is the capital of France?", "answer": "It is Paris, on the Seine."}\n'
    )
    _, plan = ground.open(eval=[{"path": str(held)}])
    plan.step(0)
    (ground.folder / "b.jsonl").hardlink_to(held)
    with pytest.raises(BadInput, match=r"data\.eval: 1 of 1 rows .*b\.jsonl:1 \(1\.00\)"):
        all_steps(plan)
    assert ground.uses() == [first.name]


def test_rows_cannot_be_held_out_of_a_streaming_source(ground):
    with pytest.raises(
        BadInput, match=r"data\.eval_fraction: rows of a later shard cannot be held out"
    ):
        ground.recipe(eval_fraction=0.1)


def test_a_file_is_not_a_folder(ground):
    recipe = ground.recipe(train=[{"path": str(ground.add("a.jsonl", 2)), "streaming": True}])
    with pytest.raises(BadInput, match="a streaming source must be a folder"):
        StreamingData(recipe, ground._tokenizer)


def test_preparing_what_is_there_decides_nothing(ground, tokenizer):
    ground.add("a.jsonl", 4)
    ground.add("b.jsonl", 5)
    assert [shard.report["rows"] for shard in prepare_now(ground.recipe(), tokenizer)] == [4, 5]
    assert not ground.run_dir.exists()


# ------------------------------------------------------------------------------------------ streams


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(streaming, "SHARD_ROWS", 7)


def stream(ground: Ground) -> dict[str, Any]:
    """A local dataset that is read as a stream, files of other sizes than the shards."""
    return {"train": [{"name": str(ground.folder), "streaming": True}]}


def test_a_stream_gives_every_row_once_and_then_repeats(ground):
    files = {"a.jsonl": 10, "b.jsonl": 3, "c.jsonl": 4}
    for name, rows in files.items():
        ground.add(name, rows)
    _, plan = ground.open(**stream(ground))
    all_steps(plan)
    log = ground.log()
    assert [line["stream"]["rows"] for line in log[:3]] == [[1, 7], [8, 14], [15, 17]]
    assert log[3]["file"] == log[0]["file"]
    taken = [
        json.loads(x)["question"]
        for f in ground.uses()[:3]
        for x in (ground.run_dir / "shards" / f).open()
    ]
    assert taken == [
        f"{name} {n}"
        for name, rows in (("a.jsonl", 10), ("b.jsonl", 3), ("c.jsonl", 4))
        for n in range(rows)
    ]


def test_a_stream_resumes_where_it_stood(ground):
    ground.add("a.jsonl", 10)
    ground.add("b.jsonl", 25)
    _, plan = ground.open(**stream(ground))
    whole, log = all_steps(plan), ground.log()
    lines = (ground.run_dir / LOG).read_text().splitlines(keepends=True)
    for kept in range(1, 5):
        ground.run_dir = (
            ground.root / f"run-{kept}"
        )  # without the rows of the past, which are not needed
        ground.run_dir.mkdir()
        (ground.run_dir / LOG).write_text("".join(lines[:kept]))
        _, resumed = ground.open(**stream(ground))
        first = log[kept]["first_step"] - 1
        assert resumed.step(first) == whole[first]
        again, before = ground.log()[kept], log[kept]
        assert again["stream"]["rows"] == before["stream"]["rows"]
        assert again["digest"] == before["digest"]


def test_parquet_files_are_a_stream_too(ground):
    """A run killed after its first shard resumes inside a file, from the log alone."""
    for first in (0, 10):
        rows = [
            {"question": f"{n}", "answer": "four words of answer"} for n in range(first, first + 10)
        ]
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), ground.folder / f"{first:02d}.parquet"
        )
    _, plan = ground.open(**stream(ground))
    first = plan.step(0)
    (line,) = (ground.run_dir / LOG).read_text().splitlines(keepends=True)
    _, whole = ground.open(**stream(ground))
    steps = all_steps(whole)
    assert steps[0] == first
    log = ground.log()
    assert [shard["stream"]["rows"] for shard in log[:3]] == [[1, 7], [8, 14], [15, 20]]
    assert [shard["file"] for shard in log[3:5]] == [shard["file"] for shard in log[:2]], (
        "and then it repeats"
    )

    ground.run_dir = ground.root / "killed"
    (ground.run_dir / "shards").mkdir(parents=True)
    (ground.run_dir / LOG).write_text(line)
    shutil.copy(ground.root / "run" / "shards" / "000000.jsonl", ground.run_dir / "shards")
    assert all_steps(ground.open(**stream(ground))[1]) == steps
    assert [shard["digest"] for shard in ground.log()] == [shard["digest"] for shard in log]


def test_nulls_inside_a_streams_rows_are_taken_out(ground):
    notes = [{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {"b": 2}}]
    lines = [{"question": "?", "answer": "!", "notes": [note]} for note in notes]
    (ground.folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ground.open(**stream(ground))
    taken = [json.loads(line) for line in (ground.run_dir / "shards" / "000000.jsonl").open()]
    assert taken == lines


def test_a_row_of_a_stream_that_cannot_be_read_is_a_broken_line(ground):
    """Text that is not UTF-8, among rows that are."""
    answers = pyarrow.array([b"four words of answer", b"\xff", b"four words of answer"] * 4)
    table = {"question": [f"{n}" for n in range(12)], "answer": answers.view(pyarrow.string())}
    pyarrow.parquet.write_table(pyarrow.table(table), ground.folder / "a.parquet")
    said = r"000000\.jsonl:2: a value that cannot be read, as text .*data\.broken_lines: reject"
    with pytest.raises(BadInput, match=said):
        ground.open(**stream(ground))
    data, _ = ground.open(**stream(ground), broken_lines="reject", max_rejects=0.5)
    assert (data.report["rows"], data.report["rejected"]) == (7, 2)


def test_what_rows_of_a_stream_share_is_checked_once(ground, monkeypatch):
    """Each row of a stream comes with all messages of its row group."""
    messages = [
        [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "four words"}]
        for n in range(20)
    ]
    table = pyarrow.table({"messages": messages})
    pyarrow.parquet.write_table(table, ground.folder / "a.parquet", row_group_size=10)
    checks, is_sound = [], arrow_fields._is_sound

    def counted(batch: Any, *, full: bool) -> bool:
        checks.append(full)
        return is_sound(batch, full=full)

    monkeypatch.setattr(arrow_fields, "_is_sound", counted)
    monkeypatch.setattr(streaming, "SHARD_ROWS", 20)
    (shard,) = prepare_now(ground.recipe(**stream(ground)), ground._tokenizer)
    assert shard.report["rows"] == shard.report["documents"] == 20
    assert (len(checks), sum(checks)) == (20, 2), "one for each row group"


def test_a_streams_first_shard_can_be_prepared_alone(ground, tokenizer):
    ground.add("a.jsonl", 10)
    (shard,) = prepare_now(ground.recipe(**stream(ground)), tokenizer)
    assert shard.report["rows"] == 7
    assert not ground.run_dir.exists()
