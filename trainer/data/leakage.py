"""Find evaluation rows that the training data has too, exactly or as near-duplicates.

Both prepared sides enter and leave. Rows are compared twice: by the texts of all turns but the
system's, and by their prompts, which are the user's turns alone: of several sampled answers to one
question, some held out and some trained, no two are alike. Pairs of rows are written, one a line,
to a cache folder of their own. trainer/data/near_duplicates.py says what is alike. A comparison
that was stopped or killed is resumed at the train row that it had reached.

A row that is like a training row leaks, and so does one whose prompt a training row has word for
word. A prompt that is merely similar is counted and listed, no more: prompts of one source often
share long instructions and differ in what they ask.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from packhorse.trainer.config.data import DataSection, Filters
from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.data import tokenize
from packhorse.trainer.data.cache import keep_documents
from packhorse.trainer.data.digest import explained, folder_digest, json_digest, require_intact
from packhorse.trainer.data.near_duplicates import THRESHOLD, Index
from packhorse.trainer.data.prepare import (
    Prepared,
    cache_folder,
    prepare,
    require_rows,
    row_readers,
    workers_of,
)
from packhorse.trainer.data.rows import RowReader
from packhorse.trainer.data.split import SplitRows
from packhorse.trainer.datatypes import BadInput, Conversation, Row, RowError
from packhorse.trainer.dist import log
from packhorse.trainer.utils.files import write_json
from packhorse.trainer.utils.progress import WorkProgress
from packhorse.trainer.utils.staged_build import ResumableFiles, Stopped, build_once

VERSION = 3  # part of every key: raise it when the same rows give other files

WHAT = "comparing data.eval with data.train"
PAIRS = {"rows": "leakage.jsonl", "prompts": "prompts.jsonl"}  # what is compared -> its pairs
LEAKED = "leaked.int64"  # the training rows to drop, by `_code`, perhaps more than once
FILES = [*PAIRS.values(), LEAKED]
NAMED = 3  # pairs in a message


# -------------------------------------------------------------------------------- what is compared


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


def prompt_text(conversation: Conversation) -> str | None:
    """Return what the user asks, in all turns; None if there is no such turn."""
    asked = [message.content for message in conversation.messages if message.role == "user"]
    return "\n".join(asked) if asked else None


def _plain(text: str) -> str:
    """Return the text without differences in white space and capitals."""
    return " ".join(text.split()).casefold()


class _HeldOut:
    """The texts of the held-out rows, each once: its first row, and how many rows have it."""

    def __init__(self) -> None:
        self.index = Index(THRESHOLD)
        self.first: list[str] = []  # of each text of the index, as FILE:ROW
        self.rows: list[int] = []
        self._numbers: dict[str, int] = {}

    def add(self, texts: Iterable[tuple[str, str]]) -> None:
        """Add pairs of a text and the place of its row."""
        new = []
        for text, place in texts:
            number = self._numbers.setdefault(_plain(text), len(self.first))
            if number == len(self.first):
                self.first.append(place)
                self.rows.append(0)
                new.append(text)
            self.rows[number] += 1
        self.index.add(new)


# ---------------------------------------------------------------------------------------- two sides


def prepare_compared(
    recipe: Recipe, tokenizer: Any, stopping: Callable[[], bool] = lambda: False
) -> tuple[Prepared, Prepared | None]:
    """Prepare the training data, and the held-out rows, if the recipe has any, compared with it.

    Raises as `prepare` and `check_leakage` do.
    """
    train = prepare(recipe, tokenizer, "train", stopping)
    if not recipe.has_eval:
        return train, None
    return check_leakage(recipe, train, prepare(recipe, tokenizer, "eval", stopping), stopping)


def check_leakage(
    recipe: Recipe,
    train: Prepared,
    held_out: Prepared,
    stopping: Callable[[], bool] = lambda: False,
) -> tuple[Prepared, Prepared]:
    """Compare held-out rows with train rows; return both, the held-out data with `leakage` in its
    report, the training data without the rows that leak if the recipe wants them dropped.

    `leakage` has: `rows`, the held-out rows; `leaked_rows`, those with a near-duplicate in train;
    `exact_rows`, those with an equal there; `pairs`, how many lines the file `path` has, one for a
    held-out text and a train row; `closest`, the most similar ones; `prompts`, the same of prompts.
    The result is kept in the cache.

    Raises:
        BadInput: the share of leaked rows is above data.max_leakage; or nothing is left to train.
        Stopped (packhorse.trainer.utils.staged_build): `stopping()` became true.
    """
    sides = (side.documents.folder.name for side in (train, held_out))
    key = json_digest([VERSION, THRESHOLD, *sides])
    folder = cache_folder(recipe.data) / f"leakage-{key}"

    def build(staging: Path, leftovers: list[Path], check: Callable[[], None]) -> None:
        state = {"rows": 0, "pairs": 0}
        with closing(ResumableFiles(staging, leftovers, FILES, state)) as files:

            def check_and_stop() -> None:
                check()
                if stopping():
                    files.save()
                    rows = files.state["rows"]
                    raise Stopped(f"stopped while {WHAT} after {rows} rows, which are kept")

            rows = _compare(recipe.data, train, held_out, files, check_and_stop)
            files.sync()
            found = {kind: _summarize_pairs(staging / name) for kind, name in PAIRS.items()}
            report = {"rows": rows, **found["rows"], "prompts": found["prompts"]}
            fingerprint = folder_digest(staging, FILES)
            record = {"report": report, "fingerprint": fingerprint}
            write_json(staging / "report.json", {**record, "digest": json_digest([record])})
            files.forget()

    build_once(folder, build, WHAT, stopping)
    report = _read_report(folder)
    report["path"] = str(folder / PAIRS["rows"])
    report["prompts"]["path"] = str(folder / PAIRS["prompts"])
    if recipe.data.max_leakage == "drop":
        train = _drop_leaked(recipe, train, folder, stopping)
    else:
        _refuse_leak(report, recipe.data.max_leakage)
    return train, replace(held_out, leakage=report)


def _read_report(folder: Path) -> dict[str, Any]:
    """Return the kept result of a comparison; raise BadInput if it, or a file beside it, has
    changed: a leak would not be seen, or other rows left out."""
    with explained(folder):
        record = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        if record.pop("digest") != json_digest([record]):
            raise ValueError("report.json is not as it was written")
        require_intact(folder, FILES, record["fingerprint"])
    return record["report"]


def _summarize_pairs(path: Path) -> dict[str, Any]:
    # Read the file, as a resumed comparison has found only the later part of the pairs.
    leaked: dict[str, int] = {}
    exact: dict[str, int] = {}
    closest: list[dict[str, Any]] = []
    pairs = 0
    with path.open("rb") as file:
        for pair in map(json.loads, file):
            pairs += 1
            leaked[pair["eval"]] = pair["eval_rows"]
            if pair["exact"]:
                exact[pair["eval"]] = pair["eval_rows"]
            closest = heapq.nlargest(
                NAMED, [*closest, pair], key=lambda pair: (pair["exact"], pair["similarity"])
            )
    counts = {"leaked_rows": sum(leaked.values()), "exact_rows": sum(exact.values())}
    return {**counts, "pairs": pairs, "closest": closest}


def _compare(
    data: DataSection,
    train: Prepared,
    held_out: Prepared,
    files: ResumableFiles,
    check_and_stop: Callable[[], None],
) -> int:
    """Append the pairs of all train rows that are not done yet; return the number of held-out rows.

    Memory grows with the held-out side alone.
    """
    workers = workers_of(data)
    asked = {kind: _HeldOut() for kind in PAIRS}
    rows_held_out, kept = 0, _KeptRows(held_out)
    split_rows = SplitRows(data, "eval")
    read = _ReadTexts.of(data, "eval")
    with closing(tokenize.run(split_rows.rows(), read, workers, split_rows.files)) as chunks:
        for chunk in chunks:
            check_and_stop()
            chosen = [row for row in chunk if kept.has(row.file, row.number)]
            rows_held_out += len(chosen)
            for kind, texts in asked.items():
                texts.add(
                    (text, f"{held_out.files[row.file]}:{row.number}")
                    for row in chosen
                    if (text := row.texts[kind]) is not None
                )

    split_rows, kept, done = SplitRows(data, "train"), _KeptRows(train), files.state
    indexes = {kind: texts.index for kind, texts in asked.items()}
    find = _FindNear(_ReadTexts.of(data, "train"), indexes)
    rows_left = islice(split_rows.rows(), done["rows"], None)
    with (
        closing(WorkProgress(WHAT, done["rows"], split_rows.count_rows())) as progress,
        closing(tokenize.run(rows_left, find, workers, split_rows.files)) as chunks,
    ):
        for rows, matches in chunks:
            matches = [match for match in matches if kept.has(match.file, match.row)]
            for kind, name in PAIRS.items():
                found = [match for match in matches if match.kind == kind]
                files.append_lines(name, (_pair(match, asked[kind], train) for match in found))
            leaked = [_code(found.file, found.row) for found in matches if found.leaks]
            files.append(LEAKED, np.array(leaked, np.int64).tobytes())
            done["rows"] += rows
            done["pairs"] += len(matches)
            files.save_if_due()
            progress.show(done["rows"], f", {done['pairs']:,} pairs of rows or prompts alike")
            check_and_stop()
    return rows_held_out


def _pair(match: _Match, held_out: _HeldOut, train: Prepared) -> dict[str, Any]:
    return {
        "eval": held_out.first[match.text],
        "eval_rows": held_out.rows[match.text],
        "train": f"{train.files[match.file]}:{match.row}",
        "similarity": match.similarity,
        "exact": match.exact,
    }


def _refuse_leak(report: dict[str, Any], most: float) -> None:
    rows, prompts = report["rows"], report["prompts"]
    problems = []
    for found, leaked, what in (
        (report, report["leaked_rows"], "a near-duplicate in data.train"),
        (prompts, prompts["exact_rows"], "a prompt that rows of data.train have, too"),
    ):
        if leaked > most * rows:
            closest = "; ".join(
                f"{pair['eval']} and {pair['train']} ({pair['similarity']:.2f})"
                for pair in found["closest"]
            )
            problems.append(
                f"{leaked} of {rows} rows ({leaked / rows:.1%}) have {what}, more than "
                f"data.max_leakage ({most:.1%}); the most similar: {closest}; all pairs are in "
                f"{found['path']}"
            )
    if problems:
        raise BadInput(
            f"data.eval: {'; and '.join(problems)}: where data.eval_fraction holds rows out, keep "
            "those of one prompt together by data.train[].group_by, a column that they share (as "
            "`question`); or set data.max_leakage: drop, which leaves such rows out of the "
            "training data; or remove them yourself, or raise the share"
        )


def _drop_leaked(
    recipe: Recipe, train: Prepared, folder: Path, stopping: Callable[[], bool]
) -> Prepared:
    """Return the training data without the rows that `folder` lists.

    They go from the training side: fewer held-out rows would be another evaluation.
    """
    leaked = np.unique(np.fromfile(folder / LEAKED, np.int64))
    if not len(leaked):
        return train
    documents = train.documents
    kept = ~np.isin(_code(documents.files.astype(np.int64), documents.rows), leaked)
    key = json_digest([documents.folder.name, folder.name])
    name = cache_folder(recipe.data) / f"documents-{key}"
    documents = keep_documents(name, documents, kept, stopping)
    log.info(
        "data.max_leakage: drop: %d of %d training rows are left out, as evaluation rows are "
        "like them or have their prompts; they are listed in %s",
        *(documents.report["leaked"], documents.report["rows"], folder),
    )
    require_rows("data.train", train.weights, documents.report["sources"])
    return replace(train, documents=documents)


# ------------------------------------------------------------------------------------------ workers


class _TextRow(NamedTuple):
    file: int
    number: int
    texts: dict[str, str | None]  # by the keys of PAIRS


class _ReadTexts(NamedTuple):
    """Return the texts of a chunk of rows, without the rows that have no conversation."""

    readers: tuple[RowReader, ...]  # of each source

    @classmethod
    def of(cls, data: DataSection, which: Literal["train", "eval"]) -> _ReadTexts:
        """Read without the filters, which have decided already which rows are documents."""
        bare = {"filters": Filters()}
        readers = row_readers(data, which)
        return cls(tuple(replace(r, source=r.source.model_copy(update=bare)) for r in readers))

    def __call__(self, rows: list[Row]) -> list[_TextRow]:
        found = []
        for row in rows:
            with suppress(RowError):
                read = self.readers[row.source].conversation(row.fields)
                texts = {"rows": conversation_text(read), "prompts": prompt_text(read)}
                found.append(_TextRow(row.file, row.number, texts))
        return found


class _Match(NamedTuple):
    kind: str  # of PAIRS
    file: int
    row: int
    text: int  # number of the held-out text in its index
    similarity: float
    exact: bool

    @property
    def leaks(self) -> bool:
        return self.exact or self.kind == "rows"


class _FindNear(NamedTuple):
    """Return the number of rows, and their matches in the indexes."""

    read: _ReadTexts
    indexes: dict[str, Index]  # by the keys of PAIRS

    def __call__(self, rows: list[Row]) -> tuple[int, list[_Match]]:
        found, read = [], self.read(rows)
        for kind, index in self.indexes.items():
            texts = [(row, text) for row in read if (text := row.texts[kind]) is not None]
            near = index.near([text for _, text in texts])
            for (row, text), matches in zip(texts, near, strict=True):
                for number, similar in matches:
                    exact = _plain(text) == _plain(index.texts[number])
                    found.append(_Match(kind, row.file, row.number, number, similar, exact))
        return len(rows), found


def _code(file: Any, row: Any) -> Any:
    """Return one number for a file and a row of it."""
    return file << 40 | row


class _KeptRows:
    """The rows that became documents: rows that are rejected or dropped do not leak."""

    def __init__(self, data: Prepared) -> None:
        documents = data.documents
        self._codes = np.unique(_code(documents.files.astype(np.int64), documents.rows))

    def has(self, file: int, row: int) -> bool:
        code = _code(file, row)
        place = int(np.searchsorted(self._codes, code))
        return place < len(self._codes) and self._codes[place] == code
