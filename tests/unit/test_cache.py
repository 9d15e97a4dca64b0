"""The cache of documents is complete or absent, the same however it was built, and its report
counts every row that was left out.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from packhorse.trainer.data import cache, tokenize
from packhorse.trainer.data.cache import prepare
from packhorse.trainer.data.documents import FILES, Documents
from packhorse.trainer.data.kept_packing import keep_packed
from packhorse.trainer.data.tokenize import LengthPolicy, RowResult, tokenize_rows
from packhorse.trainer.datatypes import BadInput, Example, Filtered, Packed, Row, RowError
from packhorse.trainer.utils import lease
from packhorse.trainer.utils.staged_build import Stopped

LIMITS = LengthPolicy(100, "reject", packing_cuts=False)


def fake_example(number: int) -> Example:
    ids = np.arange(number, number + 3 + number % 4, dtype=np.int32)
    return Example(ids, np.arange(len(ids)) % 2 == 1)


def fake_tokenize(rows: list[Row]) -> list[RowResult]:
    """A row's fields are None, the reason of a reject, or what is raised."""
    faults = [RowError(row.fields) if isinstance(row.fields, str) else row.fields for row in rows]
    return [fault or (fake_example(row.number),) for fault, row in zip(faults, rows, strict=True)]


def rows(count: int, bad: Mapping[int, str | RowError] | None = None) -> list[Row]:
    return [
        Row(number % 2, number % 2, number, (bad or {}).get(number))
        for number in range(1, count + 1)
    ]


def made(
    folder: Path,
    all_rows: list[Row],
    *,
    max_rejects: float = 1.0,
    seen: list[int] | None = None,
    **more,
) -> Documents:
    def chunks(done: int):
        if seen is not None:
            seen.append(done)
        return tokenize_rows(islice(all_rows, done, None), fake_tokenize, LIMITS, workers=1)

    return prepare(
        folder,
        chunks,
        sources=["a", "b"],
        files=["a.jsonl", "b.jsonl"],
        what="data.train",
        max_rejects=max_rejects,
        **more,
    )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tokenize, "CHUNK_ROWS", 4)


def test_documents_are_what_was_tokenized(tmp_path):
    documents = made(tmp_path / "d", rows(30))
    assert len(documents.lengths) == 30
    for document in range(30):
        expected = fake_example(document + 1)
        assert np.array_equal(documents.example(document).input_ids, expected.input_ids)
        assert np.array_equal(documents.example(document).trained, expected.trained)
        assert documents.trained_counts[document] == expected.trained.sum()
    assert documents.rows.tolist() == list(range(1, 31))
    assert documents.sources.tolist() == documents.files.tolist() == [1, 0] * 15
    assert documents.offsets[-1] == len(documents.input_ids)


def test_tokens_stay_on_disk(tmp_path):
    documents = made(tmp_path / "d", rows(5))
    for column in (documents.input_ids, documents.trained, documents.example(2).input_ids):
        while not isinstance(column, np.memmap):
            column = column.base
            assert column is not None, "copied into memory"


def test_trained_tokens_are_counted_where_they_are_predicted(tmp_path):
    documents = made(tmp_path / "d", rows(30))
    for document in (0, 2, 29):
        trained = documents.example(document).trained
        for start in range(len(trained)):
            for stop in range(start + 1, len(trained) + 1):
                counted = documents.count_trained(
                    np.array([document]), np.array([start]), np.array([stop])
                )
                assert counted.tolist() == [trained[start + 1 : stop + 1].sum()]


def test_a_second_start_reads_nothing(tmp_path):
    seen: list[int] = []
    first = made(tmp_path / "d", rows(30), seen=seen)
    second = made(tmp_path / "d", rows(30), seen=seen)
    assert seen == [0]
    assert second.fingerprint == first.fingerprint


def test_the_fingerprint_is_that_of_the_documents(tmp_path):
    one, same, other = (
        made(tmp_path / "1", rows(30)),
        made(tmp_path / "2", rows(30)),
        made(tmp_path / "3", rows(29)),
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_the_report_counts_by_source_and_reason(tmp_path):
    documents = made(tmp_path / "d", rows(10, {3: "no answer", 4: "too odd", 5: "no answer"}))
    report = documents.report
    assert (report["rows"], report["documents"], report["rejected"]) == (10, 7, 3)
    assert report["reasons"] == {"no answer": 2, "too odd": 1}
    assert report["tokens"] == documents.lengths.sum()
    assert report["trained_tokens"] == documents.trained_counts.sum()
    a, b = report["sources"]
    assert (a["name"], a["rows"], a["rejected"], a["reasons"]) == ("a", 5, 1, {"too odd": 1})
    assert (b["name"], b["rows"], b["rejected"], b["reasons"]) == ("b", 5, 2, {"no answer": 2})
    lines = [
        json.loads(line) for line in (documents.folder / "rejects.jsonl").read_text().splitlines()
    ]
    assert lines[0] == {"source": "b.jsonl", "row": 3, "reason": "no answer"}
    assert len(lines) == 3


def repeating(folder: Path, **more) -> Documents:
    """Rows 1 to 30 of source b, then a; row n has the tokens of row n % 7, and is cut into two
    documents.
    """

    def tokenize_repeated(rows: list[Row]) -> list[RowResult]:
        ids = [np.arange(10, dtype=np.int32) + row.number % 7 * 100 for row in rows]
        return [(Example(each, np.arange(10) > 0),) for each in ids]

    def chunks(done: int):
        all_rows = [Row(int(n > 20), int(n > 20), n, None) for n in range(1, 31)]
        return tokenize_rows(
            all_rows[done:],
            tokenize_repeated,
            LengthPolicy(6, "split", packing_cuts=False),
            workers=1,
        )

    names = {
        "sources": ["a", "b"],
        "files": ["a.jsonl", "b.jsonl"],
        "what": "data.train",
        "max_rejects": 1.0,
    }
    return prepare(folder, chunks, **names, **more)


def test_duplicates_are_counted_by_source_and_kept(tmp_path):
    documents = repeating(tmp_path / "d")
    assert len(documents.lengths) == 60
    assert documents.report["duplicates"] == 23
    assert [source["duplicates"] for source in documents.report["sources"]] == [13, 10]


@pytest.mark.parametrize("block", [1, 3, 4096])
def test_duplicates_are_dropped_and_the_first_stays(tmp_path, monkeypatch, block):
    monkeypatch.setattr(cache, "BLOCK_DOCUMENTS", block)
    documents, whole = (
        repeating(tmp_path / "d", drop_duplicates=True),
        repeating(tmp_path / "whole"),
    )
    assert documents.rows.tolist() == [row for row in range(1, 8) for _ in range(2)]
    for document in range(14):
        for field in ("input_ids", "trained"):
            assert np.array_equal(
                getattr(documents.example(document), field), getattr(whole.example(document), field)
            )
    report = documents.report
    assert (report["rows"], report["duplicates"], report["rejected"]) == (30, 23, 0)
    assert (report["documents"], report["tokens"]) == (14, documents.lengths.sum())
    assert report["trained_tokens"] == documents.trained_counts.sum() == documents.trained.sum()
    assert [source["documents"] for source in report["sources"]] == [14, 0]
    assert documents.fingerprint != whole.fingerprint
    assert repeating(tmp_path / "d", drop_duplicates=True).fingerprint == documents.fingerprint


def test_rows_that_differ_in_what_is_trained_are_no_duplicates(tmp_path):
    def tokenize_alike(rows: list[Row]) -> list[RowResult]:
        ids = np.arange(5, dtype=np.int32)
        return [(Example(ids, ids >= row.number),) for row in rows]

    def chunks(done: int):
        return tokenize_rows(
            [Row(0, 0, n, None) for n in (1, 2, 3)][done:], tokenize_alike, LIMITS, workers=1
        )

    documents = prepare(
        tmp_path / "d", chunks, sources=["a"], files=["a"], what="x", max_rejects=0.0
    )
    assert documents.report["duplicates"] == 0


def test_too_many_rejects_stop_the_run_and_the_commonest_reasons_are_named(tmp_path):
    bad = {
        1: "e",
        2: "common",
        3: "common",
        4: "common",
        5: "second",
        6: "second",
        7: "third",
        8: "third",
    }
    counts = r"common \(3\), second \(2\), third \(2\)"
    message = (
        rf"8 of 20 rows \(40\.0%\) .* data.max_rejects \(10\.0%\): {counts}; see .*rejects.jsonl"
    )
    for _ in range(2):  # found in the cache it is the same
        with pytest.raises(BadInput, match=message):
            made(tmp_path / "d", rows(20, bad), max_rejects=0.1)
    seen: list[int] = []
    assert len(made(tmp_path / "d", rows(20, bad), max_rejects=0.4, seen=seen).lengths) == 12
    assert seen == [], "another bound needs no other tokens"


def test_filtered_rows_are_counted_apart_and_are_no_rejects(tmp_path):
    unwanted = dict.fromkeys(range(1, 9), Filtered("too short"))
    documents = made(
        tmp_path / "d", rows(10, {**unwanted, 9: Filtered("too long")}), max_rejects=0.0
    )
    report = documents.report
    assert (report["rows"], report["documents"], report["rejected"], report["filtered"]) == (
        10,
        1,
        0,
        9,
    )
    assert (report["reasons"], report["filter_reasons"]) == ({}, {"too short": 8, "too long": 1})
    assert [source["filtered"] for source in report["sources"]] == [4, 5]
    lines = [
        json.loads(line) for line in (documents.folder / "filtered.jsonl").read_text().splitlines()
    ]
    assert lines[0] == {"source": "b.jsonl", "row": 1, "reason": "too short"}
    assert len(lines) == 9
    assert (documents.folder / "rejects.jsonl").read_text() == ""


def test_the_share_of_rejects_is_of_the_rows_that_were_wanted(tmp_path):
    faults = {**dict.fromkeys(range(1, 9), Filtered("too short")), 9: "odd"}
    with pytest.raises(BadInput, match=r"1 of 2 rows \(50\.0%\) are rejected"):
        made(tmp_path / "d", rows(10, faults), max_rejects=0.4)


def test_filters_that_leave_nothing_are_named(tmp_path):
    with pytest.raises(
        BadInput,
        match=r"the filters leave no row of 3: too short \(2\), odd \(1\); see .*filtered\.jsonl",
    ):
        made(
            tmp_path / "d", rows(3, {1: Filtered("too short"), 2: "odd", 3: Filtered("too short")})
        )


def test_nothing_left_stops_the_run(tmp_path):
    with pytest.raises(BadInput, match=r"no row is left of 2: no answer \(2\)"):
        made(tmp_path / "d", rows(2, {1: "no answer", 2: "no answer"}))
    with pytest.raises(BadInput, match="there are no rows"):
        made(tmp_path / "e", [])


def test_a_damaged_cache_is_not_used(tmp_path):
    documents = made(tmp_path / "d", rows(30))
    with (documents.folder / "input_ids.int32").open("ab") as file:
        file.truncate(16)
    with pytest.raises(BadInput, match=r"the data cache is damaged .* delete this folder"):
        made(tmp_path / "d", rows(30))
    (documents.folder / "report.json").write_text("{")
    with pytest.raises(BadInput, match="damaged"):
        made(tmp_path / "d", rows(30))


@pytest.mark.parametrize("name", [*FILES.values(), "report.json"])
def test_a_flipped_bit_is_found_by_one_rank_of_a_node(tmp_path, name, monkeypatch):
    folder = made(tmp_path / "d", rows(30)).folder
    content = bytearray((folder / name).read_bytes())
    at = content.index(b"30") if name == "report.json" else len(content) // 2
    content[at] ^= 1  # 30 rows are 20
    (folder / name).write_bytes(content)
    with pytest.raises(BadInput, match=r"the data cache is damaged .* delete this folder"):
        made(tmp_path / "d", rows(30))
    if name in FILES.values():
        monkeypatch.setenv("LOCAL_RANK", "1")
        made(tmp_path / "d", rows(30))


def test_a_stopped_build_resumes_where_it_was_and_ends_the_same(tmp_path):
    whole = made(tmp_path / "whole", rows(30, {5: "bad"}))
    seen: list[int] = []
    with pytest.raises(Stopped, match="after 4 rows"):
        made(tmp_path / "d", rows(30, {5: "bad"}), seen=seen, stopping=lambda: bool(seen))
    documents = made(tmp_path / "d", rows(30, {5: "bad"}), seen=seen)
    assert seen == [0, 4]
    assert documents.fingerprint == whole.fingerprint
    assert documents.report == whole.report
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["d", "whole"]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"rows": 4', '"rows": 8', 1),  # four rows would be left out
        lambda text: text.replace('"tokens": ', '"tokens": 1', 1),
        lambda text: text.replace("offsets.", "../../other."),
        lambda text: text[:40],
        lambda _: "[" * 99_999,
        lambda _: "5",
    ],
)
def test_a_stopped_build_whose_state_was_damaged_begins_anew(tmp_path, change, caplog):
    other = tmp_path / "other.int64"
    other.write_text("of the user")
    whole = made(tmp_path / "whole", rows(30))
    seen: list[int] = []
    with pytest.raises(Stopped):
        made(tmp_path / "d", rows(30), seen=seen, stopping=lambda: bool(seen))
    (left,) = tmp_path.glob("d.build-*/progress.json")
    before = left.read_text()
    left.write_text(change(before))
    assert left.read_text() != before
    documents = made(tmp_path / "d", rows(30), seen=seen)
    assert seen == [0, 0]
    assert "progress.json: damaged" in caplog.text
    assert documents.fingerprint == whole.fingerprint
    assert other.read_text() == "of the user"


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    def no_room(self, chunk):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache._CacheWriter, "append", no_room)
    with pytest.raises(BadInput, match=r"the disk is full while preparing data\.train"):
        made(tmp_path / "d", rows(30))
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from itertools import islice
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import test_cache
from packhorse.trainer.data import cache, tokenize
from packhorse.trainer.utils import staged_build

def slow_tokenize(rows):
    if rows[0].number > 20:
        print("at row", rows[0].number, flush=True)
        time.sleep(600)
    return test_cache.fake_tokenize(rows)

def chunks(done):
    rows = islice(test_cache.rows(40, {5: "bad"}), done, None)
    return tokenize.tokenize_rows(rows, slow_tokenize, test_cache.LIMITS, workers=2)

if __name__ == "__main__":
    tokenize.CHUNK_ROWS, tokenize.POOL_FROM_CHUNKS, staged_build.SAVE_EVERY_S = 4, 2, 0.0
    names = {"sources": ["a", "b"], "files": ["a", "b"], "what": "x"}
    cache.prepare(Path(sys.argv[1]), chunks, **names, max_rejects=1.0)
"""


def test_a_killed_build_is_resumed_and_its_workers_die_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "STALE_S", 0.5)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    folder = tmp_path / "cache" / "d"
    here = Path(__file__).parent
    command = [sys.executable, str(script), str(folder), str(here), str(here.parents[1])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("at row")
    deadline = time.monotonic() + 10
    while not any(
        json.loads(p.read_text())["rows"] >= 12
        for p in folder.parent.glob("d.build-*/progress.json")
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    try:
        process.communicate(timeout=20)  # ends when the last process that holds the pipe has ended
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert not folder.exists()

    seen: list[int] = []
    documents = made(folder, rows(40, {5: "bad"}), seen=seen)
    assert seen[0] >= 12
    assert documents.fingerprint == made(tmp_path / "whole", rows(40, {5: "bad"})).fingerprint
    assert os.listdir(folder.parent) == ["d"]


def test_a_packing_is_made_once_and_mapped(tmp_path):
    packed = Packed(np.arange(8).reshape(2, 4), np.array([0, 2]))
    made_times = []
    for _ in range(2):
        kept = keep_packed(
            tmp_path / "p", lambda: made_times.append(1) or packed, "packing", lambda: False
        )
        assert np.array_equal(kept.pieces, packed.pieces)
        assert np.array_equal(kept.sequence_offsets, packed.sequence_offsets)
    assert made_times == [1]
    content = bytearray((tmp_path / "p" / "pieces.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "p" / "pieces.npy").write_bytes(content)
    with pytest.raises(BadInput, match="damaged"):
        keep_packed(tmp_path / "p", lambda: packed, "packing", lambda: False)
