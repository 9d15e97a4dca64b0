"""Find evaluation rows that the training data has too, exactly or as near-duplicates.

Both prepared sides enter. leakage.jsonl leaves, a pair of rows a line, in a cache folder of its
own. MinHash proposes pairs; their true Jaccard similarity decides. A comparison that was stopped or
killed is resumed at the train row that it had reached.

The texts of all turns but the system's are compared, as sets of sequences of three words. Changing
one word of a hundred leaves a similarity of 0.94. So 0.8 finds other wordings of the same row, and
not other answers to the same question.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rensa import RMinHash, RMinHashLSH  # pyright: ignore[reportAttributeAccessIssue] - it has no stubs

from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.data import tokenize
from packhorse.trainer.data.digest import json_digest
from packhorse.trainer.data.prepare import (
    Prepared,
    cache_folder,
    row_tokenizer,
    workers_of,
)
from packhorse.trainer.data.split import SplitRows
from packhorse.trainer.data.tokenize import Row
from packhorse.trainer.datatypes import BadInput, Conversation, RowError
from packhorse.trainer.utils.files import ResumableFiles, Stopped, build_once, write_json
from packhorse.trainer.utils.progress import WorkProgress

VERSION = 1  # part of every key: raise it when the same rows give other pairs

WHAT = "comparing data.eval with data.train"
PAIRS = "leakage.jsonl"
SEQUENCE_WORDS = 3
HASHES = 128  # of a signature
SEED = 0
MOST_MISSED = 1e-3  # chance that a pair just similar enough is never compared
NAMED = 3  # pairs in a message

# A word; or one sign, in the scripts that write no space between words: Thai to Burmese, Khmer,
# Chinese, Japanese.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[^\W{_UNSPACED}]+|\w")


# --------------------------------------------------------------------------------------- similarity


def conversation_text(conversation: Conversation) -> str:
    """Return the text to compare: all turns, with their reasoning and tool calls.

    System prompts and tool schemas are left out, as all rows of a source may share them.
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
    """Return all sequences of SEQUENCE_WORDS words; the whole text, if it has fewer words."""
    words = WORD.findall(text.lower()) or [text]
    shifted = (words[start:] for start in range(SEQUENCE_WORDS))
    return set(map(" ".join, zip(*shifted, strict=False))) or {" ".join(words)}


def similarity(one: set[str], other: set[str]) -> float:
    """Return the Jaccard similarity: the size of the intersection over that of the union."""
    return len(one & other) / len(one | other)


class Index:
    """Texts, searchable for those similar to another text (MinHash with LSH). Picklable."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        # The MinHash estimate of a similarity s has a standard deviation of
        # sqrt(s (1 - s) / HASHES). Four of them below the threshold, a pair need not be compared.
        deviation = (threshold * (1 - threshold) / HASHES) ** 0.5
        self._least_estimate = threshold - 4 * deviation
        self._texts: list[str] = []
        self._minhashes: list[RMinHash] = []
        self._buckets = RMinHashLSH(threshold, HASHES, bands(threshold))

    def add(self, texts: list[str]) -> None:
        minhashes = RMinHash.from_token_sets(map(sequences, texts), HASHES, SEED)
        for text, minhash in zip(texts, minhashes, strict=True):
            self._buckets.insert(len(self._texts), minhash)
            self._texts.append(text)
            self._minhashes.append(minhash)

    def near(self, texts: list[str]) -> Iterator[list[tuple[int, float]]]:
        """For each text, yield its near-duplicates in the index: their numbers and similarities."""
        sets = [sequences(text) for text in texts]
        minhashes = RMinHash.from_token_sets(sets, HASHES, SEED)
        for own, minhash in zip(sets, minhashes, strict=True):
            alike = sorted(
                number
                for number in self._buckets.query(minhash)
                if minhash.jaccard(self._minhashes[number]) >= self._least_estimate
            )
            exact = ((number, similarity(own, sequences(self._texts[number]))) for number in alike)
            yield [(number, similar) for number, similar in exact if similar >= self._threshold]


def bands(threshold: float) -> int:
    """Return the number of bands that signatures are cut into for LSH.

    Texts that agree in one band are compared. So it is the smallest number that misses a pair at
    the threshold with a chance of at most MOST_MISSED: (1 - t ** rows) ** bands, see Leskovec,
    Rajaraman and Ullman, Mining of Massive Datasets, section 3.4.2.
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
    """Compare held-out rows with train rows; return the held-out data with `leakage` in its report.

    `leakage` has: `rows`, the held-out rows; `leaked_rows`, those with a near-duplicate in train;
    `pairs`, the number of such pairs; `closest`, the most similar ones; `path`, the file of all.
    The result is kept in the cache.

    Raises:
        BadInput: the share of leaked rows is above data.max_leakage.
        Stopped (packhorse.trainer.utils.files): `stopping()` became true.
    """
    sides = (side.documents.folder.name for side in (train, held_out))
    key = json_digest([VERSION, recipe.data.near_duplicate, *sides])
    folder = cache_folder(recipe.data) / f"leakage-{key}"

    def build(staging: Path, leftovers: list[Path], check: Callable[[], None]) -> None:
        with closing(ResumableFiles(staging, leftovers, [PAIRS], {"rows": 0, "pairs": 0})) as files:

            def check_and_stop() -> None:
                check()
                if stopping():
                    files.save()
                    rows = files.state["rows"]
                    raise Stopped(f"stopped while {WHAT} after {rows} rows, which are kept")

            rows = _compare(recipe, tokenizer, train, held_out, files, check_and_stop)
            files.sync()
            found = {"rows": rows, "pairs": files.state["pairs"]}
            write_json(staging / "report.json", found | _summarize_pairs(staging / PAIRS))
            files.forget()

    build_once(folder, build, WHAT, stopping)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    report["path"] = str(folder / PAIRS)
    _refuse_leak(report, recipe.data.max_leakage)
    return replace(held_out, leakage=report)


def _summarize_pairs(path: Path) -> dict[str, Any]:
    # Read the file, as a resumed comparison has found only the later part of the pairs.
    leaked: set[str] = set()
    closest: list[dict[str, Any]] = []
    with path.open("rb") as file:
        for pair in map(json.loads, file):
            leaked.add(pair["eval"])
            closest = heapq.nlargest(NAMED, [*closest, pair], key=lambda pair: pair["similarity"])
    return {"leaked_rows": len(leaked), "closest": closest}


def _compare(
    recipe: Recipe,
    tokenizer: Any,
    train: Prepared,
    held_out: Prepared,
    files: ResumableFiles,
    check_and_stop: Callable[[], None],
) -> int:
    """Append the pairs of all train rows that are not done yet; return the number of held-out rows.

    Memory grows with the held-out side alone.
    """
    workers = workers_of(recipe.data)
    index, kept = Index(recipe.data.near_duplicate), _KeptRows(held_out)
    places: list[str] = []  # of the index's texts
    read = _ReadTexts(row_tokenizer(recipe, tokenizer, "eval"))
    split_rows = SplitRows(recipe.data, "eval")
    with closing(tokenize.run(split_rows.rows(), read, workers, split_rows.files)) as chunks:
        for chunk in chunks:
            check_and_stop()
            chosen = [row for row in chunk if kept.has(row.file, row.number)]
            index.add([row.text for row in chosen])
            places += [f"{held_out.files[row.file]}:{row.number}" for row in chosen]

    split_rows, kept, done = SplitRows(recipe.data, "train"), _KeptRows(train), files.state
    find = _FindNear(_ReadTexts(row_tokenizer(recipe, tokenizer, "train")), index)
    rows_left = islice(split_rows.rows(), done["rows"], None)
    with (
        closing(WorkProgress(WHAT, done["rows"], split_rows.count_rows())) as progress,
        closing(tokenize.run(rows_left, find, workers, split_rows.files)) as chunks,
    ):
        for rows, matches in chunks:
            pairs = [
                {
                    "eval": places[text],
                    "train": f"{train.files[file]}:{number}",
                    "similarity": similar,
                }
                for file, number, text, similar in matches
                if kept.has(file, number)
            ]
            files.append_lines(PAIRS, pairs)
            done["rows"] += rows
            done["pairs"] += len(pairs)
            files.save_if_due()
            progress.show(done["rows"], f", {done['pairs']:,} near-duplicates")
            check_and_stop()
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
        f"data.train, more than data.max_leakage ({most:.1%}); the most similar: {closest}; all "
        f"pairs are in {report['path']}: remove the rows from one side, keep them together with "
        "data.group_by, or raise data.max_leakage"
    )


# ------------------------------------------------------------------------------------------ workers


class TextRow(NamedTuple):
    file: int
    number: int
    text: str


class _ReadTexts(NamedTuple):
    """Return the texts of a chunk of rows, without the rows that have no conversation."""

    tokenize: Any  # prepare.row_tokenizer

    def __call__(self, rows: list[Row]) -> list[TextRow]:
        read = ((row, self.tokenize.conversation(row)) for row in rows)
        return [
            TextRow(row.file, row.number, conversation_text(found))
            for row, found in read
            if not isinstance(found, RowError)
        ]


class _FindNear(NamedTuple):
    """Return the number of rows, and the matches: file, row, number in the index, similarity."""

    read: _ReadTexts
    index: Index

    def __call__(self, rows: list[Row]) -> tuple[int, list[tuple[int, int, int, float]]]:
        texts = self.read(rows)
        near = zip(texts, self.index.near([row.text for row in texts]), strict=True)
        return len(rows), [
            (row.file, row.number, *match) for row, matches in near for match in matches
        ]


class _KeptRows:
    """The rows that became documents: rows that are rejected or dropped do not leak."""

    def __init__(self, data: Prepared) -> None:
        documents = data.documents
        self._codes = np.unique(documents.files.astype(np.int64) << 40 | documents.rows)

    def has(self, file: int, row: int) -> bool:
        code = file << 40 | row
        place = int(np.searchsorted(self._codes, code))
        return place < len(self._codes) and self._codes[place] == code
