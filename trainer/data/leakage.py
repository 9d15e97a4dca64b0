"""Rows of the held-out side that train holds too, or nearly: found by MinHash, proved by their true
similarity.

Both prepared sides enter; leakage.jsonl leaves, a pair of rows a line, in a cache folder of its
own. A comparison that was stopped or killed is gone on with at the train row that it had come to.
What is compared is what was said: the texts of all turns but the system's, as sets of sequences of
three words. One changed word among a hundred leaves a similarity of 0.94, so 0.8 is another wording
of the same row, and not of the same question.
"""

from __future__ import annotations

import heapq
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from rensa import RMinHash, RMinHashLSH  # pyright: ignore[reportAttributeAccessIssue] - it has no stubs

from trainer.config.recipe import Recipe
from trainer.data import tokenize
from trainer.data.cache import Progress
from trainer.data.prepare import Prepared, SplitRows, cache_folder, tokenizer_of_rows, workers_of
from trainer.data.tokenize import Row
from trainer.datatypes import BadInput, Conversation, RowError
from trainer.dist import log
from trainer.utils.files import Stopped, build_once, write_synced

VERSION = 1  # part of every key: raise it when the same rows give other pairs

WHAT = "comparing data.eval with data.train"
SEQUENCE_WORDS = 3
HASHES = 128  # of a signature
SEED = 0
MOST_MISSED = 1e-3  # chance that a pair just similar enough is not looked at
NAMED = 3  # pairs in a message
SAVE_EVERY_S = 5.0  # between points that a next start can go on from

# A word; or one sign, in the scripts that write no space between words: Thai to Burmese, Khmer,
# Chinese, Japanese.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[^\W{_UNSPACED}]+|\w")


# --------------------------------------------------------------------------------------- similarity


def conversation_text(conversation: Conversation) -> str:
    """What was said in a row. System prompts and tool schemas are not: all rows of a source may
    share them.
    """
    if conversation.text is not None:
        return conversation.text
    texts = []
    for message in conversation.messages:
        if message.role not in ("system", "developer"):
            calls = (
                json.dumps(call["function"], sort_keys=True, ensure_ascii=False)
                for call in message.tool_calls
            )
            texts += [message.reasoning_content or "", message.content, *calls]
    return "\n".join(texts)


def sequences(text: str) -> set[str]:
    """Every three words in a row; all there is, where there are fewer."""
    words = WORD.findall(text.lower()) or [text]
    shifted = (words[start:] for start in range(SEQUENCE_WORDS))
    return set(map(" ".join, zip(*shifted, strict=False))) or {" ".join(words)}


def similarity(one: set[str], other: set[str]) -> float:
    """Jaccard: what both hold, as a share of what either holds."""
    return len(one & other) / len(one | other)


class Index:
    """Texts, to be asked for those that are like another one. Picklable."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._unlike = (
            threshold - 4 * (threshold * (1 - threshold) / HASHES) ** 0.5
        )  # four standard deviations
        self._texts: list[str] = []
        self._minhashes: list[RMinHash] = []
        self._buckets = RMinHashLSH(threshold, HASHES, bands(threshold))

    def add(self, texts: list[str]) -> None:
        for text, minhash in zip(texts, _minhashes(map(sequences, texts)), strict=True):
            self._buckets.insert(len(self._texts), minhash)
            self._texts.append(text)
            self._minhashes.append(minhash)

    def near(self, texts: list[str]) -> Iterator[list[tuple[int, float]]]:
        """For each text, the numbers of the texts that are at least as similar as the threshold,
        and how similar.
        """
        sets = [sequences(text) for text in texts]
        for own, minhash in zip(sets, _minhashes(sets), strict=True):
            alike = sorted(
                n
                for n in self._buckets.query(minhash)
                if minhash.jaccard(self._minhashes[n]) >= self._unlike
            )
            proved = ((number, similarity(own, sequences(self._texts[number]))) for number in alike)
            yield [(number, similar) for number, similar in proved if similar >= self._threshold]


def _minhashes(sets: Iterable[set[str]]) -> list[RMinHash]:
    return RMinHash.from_token_sets(sets, HASHES, SEED)


def bands(threshold: float) -> int:
    """Into how many bands signatures are cut: as few as may be, since rows that agree in one of
    them are compared.
    """
    for count in (16, 32, 64):
        if (1 - threshold ** (HASHES // count)) ** count <= MOST_MISSED:
            return count
    return HASHES


# ---------------------------------------------------------------------------------------- two sides


def check_leakage(
    recipe: Recipe,
    tokenizer: Any,
    train: Prepared,
    held_out: Prepared,
    stopping: Callable[[], bool] = lambda: False,
) -> Prepared:
    """The held-out data with `leakage` in its report: `leaked_rows` of its `rows` have a
    near-duplicate in train, in `pairs` pairs; the `closest` are there, all are in the file `path`.
    Found once, like all in the cache.

    Raises:
        BadInput: a larger share than data.max_leakage has one.
        Stopped (trainer.utils.files): `stopping()` became true.
    """
    parts = [
        VERSION,
        recipe.data.near_duplicate,
        *(side.documents.folder.name for side in (train, held_out)),
    ]
    folder = (
        cache_folder(recipe.data)
        / f"leakage-{xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())}"
    )

    def build(staging: Path, leftovers: list[Path], check: Callable[[], None]) -> None:
        staging.mkdir()
        with closing(_Pairs(staging, leftovers)) as pairs:

            def train_from_checkpoint() -> None:
                check()
                if stopping():
                    pairs.save()
                    raise Stopped(f"stopped while {WHAT} after {pairs.rows} rows, which are kept")

            rows = _compare(recipe, tokenizer, train, held_out, pairs, train_from_checkpoint)
            write_synced(staging / "report.json", json.dumps({"rows": rows, **pairs.finish()}))

    build_once(folder, build, WHAT, stopping)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    report["path"] = str(folder / "leakage.jsonl")
    _refuse_leak(report, recipe.data.max_leakage)
    return replace(held_out, leakage=report)


class _Pairs:
    """The pairs that are found, by the train row's place, in a file. Every few seconds they are
    made safe, with the number of train `rows` that they are of."""

    def __init__(self, staging: Path, leftovers: list[Path]) -> None:
        self._folder = staging
        self.rows = self.count = 0
        self._file = (staging / "leakage.jsonl").open("wb+")
        self._go_on_from(leftovers)
        self._saved_at = time.monotonic()

    def close(self) -> None:
        self._file.close()

    def append(self, rows: int, lines: list[dict[str, Any]]) -> None:
        """The pairs of the next `rows` train rows."""
        self._file.writelines(
            json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines
        )
        self.rows, self.count = self.rows + rows, self.count + len(lines)
        if time.monotonic() - self._saved_at > SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Make what is written so far a point to go on from."""
        state = {"rows": self.rows, "pairs": self.count, "bytes": self._sync()}
        write_synced(self._folder / "progress.json", json.dumps(state))
        self._saved_at = time.monotonic()

    def finish(self) -> dict[str, Any]:
        """What has been found, counted from the file."""
        self._sync()
        (self._folder / "progress.json").unlink(missing_ok=True)
        leaked: set[str] = set()
        closest: list[dict[str, Any]] = []
        self._file.seek(0)
        for pair in map(json.loads, self._file):
            leaked.add(pair["eval"])
            closest = heapq.nlargest(NAMED, [*closest, pair], key=lambda pair: pair["similarity"])
        return {"leaked_rows": len(leaked), "pairs": self.count, "closest": closest}

    def _sync(self) -> int:
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def _go_on_from(self, leftovers: list[Path]) -> None:
        """Copy what a stopped or killed comparison had made safe: the one thought dead may still
        write.
        """
        paths = [path for folder in leftovers if (path := folder / "progress.json").is_file()]
        states = [(json.loads(path.read_text(encoding="utf-8")), path.parent) for path in paths]
        if not states:
            return
        state, folder = max(states, key=lambda found: found[0]["rows"])
        with (folder / "leakage.jsonl").open("rb") as old:
            self._file.write(old.read(state["bytes"]))
        assert self._file.tell() == state["bytes"], f"{folder}: the file is shorter than it was"
        self.rows, self.count = state["rows"], state["pairs"]
        log.info("%s goes on after the %d rows that an earlier start compared", WHAT, self.rows)


def _compare(
    recipe: Recipe,
    tokenizer: Any,
    train: Prepared,
    held_out: Prepared,
    pairs: _Pairs,
    train_from_checkpoint: Callable[[], None],
) -> int:
    """Find the pairs, and give back the number of held-out rows. Memory grows with the held-out
    side alone.
    """
    workers = workers_of(recipe.data)
    index, kept = Index(recipe.data.near_duplicate), _Kept(held_out)
    places: list[str] = []  # of the index's texts
    read = _Read(tokenizer_of_rows(recipe, tokenizer, "eval"))
    side = SplitRows(recipe.data, "eval")
    with closing(tokenize.run(side.rows(), read, workers, side.files)) as chunks:
        for chunk in chunks:
            train_from_checkpoint()
            chosen = [row for row in chunk if kept(row.file, row.number)]
            index.add([row.text for row in chosen])
            places += [f"{held_out.files[row.file]}:{row.number}" for row in chosen]

    side, kept = SplitRows(recipe.data, "train"), _Kept(train)
    near = _Near(_Read(tokenizer_of_rows(recipe, tokenizer, "train")), index)
    with (
        closing(Progress(WHAT, pairs.rows, side.count_rows())) as progress,
        closing(
            tokenize.run(islice(side.rows(), pairs.rows, None), near, workers, side.files)
        ) as chunks,
    ):
        for rows, matches in chunks:
            lines = [
                {
                    "eval": places[text],
                    "train": f"{train.files[file]}:{number}",
                    "similarity": similar,
                }
                for file, number, text, similar in matches
                if kept(file, number)
            ]
            pairs.append(rows, lines)
            progress.show(pairs.rows, f", {pairs.count:,} near-duplicates")
            train_from_checkpoint()
    return len(places)


def _refuse_leak(report: dict[str, Any], most: float) -> None:
    rows, leaked = report["rows"], report["leaked_rows"]
    if leaked <= most * rows:
        return
    closest = "; ".join(
        f"{pair['eval']} and {pair['train']} ({pair['similarity']:.2f})"
        for pair in report["closest"]
    )
    raise BadInput(
        f"data.eval: {leaked} of {rows} rows ({leaked / rows:.1%}) have a near-duplicate in "
        f"data.train, more than "
        f"data.max_leakage ({most:.1%}); the most similar: {closest}; all pairs are in "
        f"{report['path']}: take the rows "
        "out of one side, keep them together with data.group_by, or raise data.max_leakage"
    )


# ------------------------------------------------------------------------------------------ workers


class TextRow(NamedTuple):
    file: int
    number: int
    text: str


class _Read(NamedTuple):
    """A chunk of rows to what was said in those that have a conversation."""

    tokenize: Any  # loader.tokenizer_of_rows

    def __call__(self, rows: list[Row]) -> list[TextRow]:
        read = ((row, self.tokenize.conversation(row)) for row in rows)
        return [
            TextRow(row.file, row.number, conversation_text(found))
            for row, found in read
            if not isinstance(found, RowError)
        ]


class _Near(NamedTuple):
    """A chunk of rows to its size and its matches: file and row, the index's text that it is like,
    and how much.
    """

    read: _Read
    index: Index

    def __call__(self, rows: list[Row]) -> tuple[int, list[tuple[int, int, int, float]]]:
        own = self.read(rows)
        near = zip(own, self.index.near([row.text for row in own]), strict=True)
        return len(rows), [
            (row.file, row.number, *match) for row, matches in near for match in matches
        ]


class _Kept:
    """Whether a row became documents: what is rejected or dropped does not leak."""

    def __init__(self, data: Prepared) -> None:
        documents = data.documents
        self._codes = np.unique(documents.files.astype(np.int64) << 40 | documents.rows)

    def __call__(self, file: int, row: int) -> bool:
        code = file << 40 | row
        place = int(np.searchsorted(self._codes, code))
        return place < len(self._codes) and self._codes[place] == code
