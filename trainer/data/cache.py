"""Write tokenized chunks into a folder once; documents.py maps that folder ever after (C10).

Beside the columns, `report.json` has the counts and every file's size. `rejects.jsonl` lists the
rows left out for a fault, `filtered.jsonl` those that the recipe's filters leave out. The folder is
written aside and renamed (trainer/utils/staged_build.py): if it has its final name, it is complete.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from packhorse.trainer.data.digest import folder_digest, json_digest
from packhorse.trainer.data.documents import (
    COLUMNS,
    FILES,
    Documents,
    map_columns,
    open_documents,
)
from packhorse.trainer.datatypes import BadInput, LeftOut, Tokenized
from packhorse.trainer.utils.files import write_json
from packhorse.trainer.utils.progress import WorkProgress
from packhorse.trainer.utils.staged_build import ResumableFiles, Stopped, build_once

VERSION = 6  # part of every key: raise it when the files of a folder change

BLOCK_DOCUMENTS = 4096  # in memory while some are left out

REJECTS, FILTERED = "rejects.jsonl", "filtered.jsonl"

# Counted for each source and in total. `cut` rows were truncated or split; `lost_trained_tokens`
# is what that cost. `apart` rows have a document for each trained answer, which costs
# `repeated_tokens`.
COUNTED = (
    *("rows", "documents", "tokens", "trained_tokens", "rejected", "filtered", "duplicates"),
    *("cut", "lost_trained_tokens", "apart", "repeated_tokens"),
)
LONGEST = "longest_reject"  # tokens of the longest row that was too long; 0: none was
# Rows counted by a text: why they are rejected or filtered, and names in them that nobody reads.
BY_TEXT = ("reasons", "filter_reasons", "unread")
MAX_UNREAD = 200  # names of a source: rows may have keys of their own, each another


def prepare(
    folder: Path,
    chunks: Callable[[int], Generator[Tokenized, None, None]],
    *,
    sources: list[str],
    files: list[str],
    what: str,
    max_rejects: float,
    limit: str = "max_length",
    drop_duplicates: bool = False,
    total_rows: Callable[[], int | None] = lambda: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Documents:
    """Open the documents in `folder`; if it is missing, the first process to come builds it.

    Args:
        folder: named by a key of everything that shapes its content.
        chunks: `chunks(done)` tokenizes the rows after the first `done`. The documents do not
            depend on how the rows are cut into chunks.
        sources, files, what: names, for reports and messages.
        limit: the key that limits an example's length, with its value, for messages.
        drop_duplicates: keep only the first of the rows that are equal, token by token.
        total_rows: for the remaining time; called only if there is something to build.

    Raises:
        BadInput: no row is left, too many rows are rejected, or the folder cannot be written.
        Stopped: `stopping()` became true; the rows done so far are kept for the next start.
    """
    doing = f"preparing {what}"

    def build(staging: Path, leftovers: list[Path], check: Callable[[], None]) -> None:
        with (
            closing(_CacheWriter(staging, leftovers, sources, files)) as writer,
            closing(WorkProgress(doing, writer.state["rows"], total_rows())) as progress,
            closing(chunks(writer.state["rows"])) as stream,
        ):
            for chunk in stream:
                check()
                writer.append(chunk)
                rows = writer.state["rows"]
                progress.show(rows, f", {writer.state['tokens']:,} tokens")
                if stopping():
                    writer.save()
                    raise Stopped(f"stopped {doing} after {rows} rows, which are kept")
            writer.finish(drop_duplicates)

    build_once(folder, build, doing, stopping)
    documents = open_documents(folder)
    _check_rejects(documents, what, max_rejects, limit)
    return documents


def _check_rejects(documents: Documents, what: str, max_rejects: float, limit: str) -> None:
    """Raise BadInput if no row is left, or if more than `max_rejects` of the wanted rows are bad.

    Rows that the filters leave out are not wanted.
    """
    report = documents.report
    rows, rejected, filtered = report["rows"], report["rejected"], report["filtered"]
    if not rows:
        raise BadInput(
            f"{what}: there are no rows; name a source that has some, or change data.eval_fraction"
        )
    wanted, listed, remedy = rows - filtered, REJECTS, ""
    reasons = Counter(report["reasons"])
    if filtered and rejected == wanted:
        problem, listed = f"the filters leave no row of {rows}", FILTERED
        reasons += Counter(report["filter_reasons"])
    elif rejected == rows:
        problem = f"no row is left of {rows}"
    elif rejected / wanted > max_rejects:
        problem = (
            f"{rejected} of {wanted} rows ({rejected / wanted:.1%}) are rejected, more than "
            f"data.max_rejects ({max_rejects:.1%})"
        )
        remedy = ", mend the data or raise data.max_rejects"
    else:
        return
    if report[LONGEST]:
        remedy += (
            f"; the longest of the rows that are too long has {report[LONGEST]:,} tokens: raise "
            f"{limit}, or set data.too_long to truncate or split"
        )
    common = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
    raise BadInput(f"{what}: {problem}: {common}; see {documents.folder / listed}{remedy}")


# ----------------------------------------------------------------------------------------- building


class _CacheWriter:
    """Write the files of a cache, chunk by chunk, so that a killed build can be resumed."""

    def __init__(
        self, staging: Path, leftovers: list[Path], sources: list[str], files: list[str]
    ) -> None:
        self._file_names = files
        counts = [
            {
                "name": name,
                **dict.fromkeys((*COUNTED, LONGEST), 0),
                **{counted: {} for counted in BY_TEXT},
            }
            for name in sources
        ]
        state = {"rows": 0, "tokens": 0, "sources": counts}
        names = [*FILES.values(), REJECTS, FILTERED]
        self._files = ResumableFiles(staging, leftovers, names, state)
        self.close, self.save = self._files.close, self._files.save
        self.state = self._files.state  # that of an earlier start, if there was one
        self._sources: list[dict[str, Any]] = self.state["sources"]

    def append(self, chunk: Tokenized) -> None:
        starts = self.state["tokens"] + np.cumsum(chunk.lengths) - chunk.lengths
        for name, dtype in COLUMNS.items():
            column = starts if name == "offsets" else getattr(chunk, name)
            assert column.dtype == dtype, name
            self._files.append(FILES[name], column.tobytes())
        self._files.append_lines(REJECTS, map(self._line, chunk.rejects))
        self._files.append_lines(FILTERED, map(self._line, chunk.filtered))
        self._count(chunk)
        self.state["tokens"] += len(chunk.input_ids)
        self.state["rows"] = sum(counts["rows"] for counts in self._sources)
        self._files.save_if_due()

    def _line(self, row: LeftOut) -> dict[str, Any]:
        line = {"source": self._file_names[row.file], "row": row.row, "reason": row.reason}
        return {**line, "tokens": row.tokens} if row.tokens else line

    def _count(self, chunk: Tokenized) -> None:
        for (source, name), count in chunk.counts.items():
            self._sources[source][name] += count
        for name, reasons, rows in (
            ("rejected", "reasons", chunk.rejects),
            ("filtered", "filter_reasons", chunk.filtered),
        ):
            for row in rows:
                counts = self._sources[row.source]
                counts[name] += 1
                counts[reasons][row.reason] = counts[reasons].get(row.reason, 0) + 1
                counts[LONGEST] = max(counts[LONGEST], row.tokens)
        for (source, name), rows in chunk.unread.items():
            counts = self._sources[source]["unread"]
            name = name if name in counts or len(counts) < MAX_UNREAD else "others"
            counts[name] = counts.get(name, 0) + rows

    def finish(self, drop_duplicates: bool) -> None:
        """Write the end of the last document, find the duplicates, and last of all the report."""
        self._files.append(FILES["offsets"], np.int64(self.state["tokens"]).tobytes())
        self._files.flush()
        folder = self._files.folder
        columns = map_columns(folder)
        repeated = self._find_duplicates(columns)
        if drop_duplicates and repeated.any():
            aside = {file: folder / f"{file}.aside" for file in FILES.values()}
            for name, blocks in _kept_columns(columns, ~repeated):
                with aside[FILES[name]].open("wb") as new:
                    new.writelines(blocks)
            self._files.replace(aside)
        _write_report(folder, self._files.sync(), self._sources)
        self._files.forget()

    def _find_duplicates(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Count the rows whose digest an earlier row has; return which documents (n,) are theirs.

        The chance that any two different rows of ten million share a digest is 1 in 370,000.
        """
        files, rows = (np.diff(columns[name], prepend=-1) != 0 for name in ("files", "rows"))
        firsts = np.flatnonzero(files | rows)  # the first document of each row
        repeated = np.ones(len(firsts), np.bool_)
        repeated[np.unique(columns["row_digests"][firsts], return_index=True)[1]] = False
        for source, counts in enumerate(self._sources):
            of_source = columns["sources"][firsts] == source
            counts["duplicates"] = int(np.count_nonzero(repeated & of_source))
        return np.repeat(repeated, np.diff(firsts, append=len(columns["rows"])))


def _kept_columns(
    columns: Mapping[str, np.ndarray], kept: np.ndarray
) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield the columns of the documents that are `kept`, (n,) bool, each by its name and in
    blocks, as a whole one may not fit into memory."""
    offsets = columns["offsets"]

    def blocks(column: np.ndarray, by_token: bool) -> Iterator[bytes]:
        for start in range(0, len(kept), BLOCK_DOCUMENTS):
            stop = min(start + BLOCK_DOCUMENTS, len(kept))
            chosen, values = kept[start:stop], column[start:stop]
            if by_token:
                chosen = np.repeat(chosen, np.diff(offsets[start : stop + 1]))
                values = column[offsets[start] : offsets[stop]]
            yield values[chosen].tobytes()

    for name, dtype in COLUMNS.items():
        if name == "offsets":
            ends = np.cumsum(np.diff(offsets)[kept], dtype=dtype)
            yield name, iter([np.append(dtype.type(0), ends).tobytes()])
        else:
            yield name, blocks(columns[name], name in ("input_ids", "trained"))


def _write_report(folder: Path, sizes: dict[str, int], sources: list[dict[str, Any]]) -> None:
    """Write report.json, last of all: the counts of each source and of all, files' sizes, and the
    digests that are checked when the folder is opened.

    What the columns themselves say, documents and tokens, is counted here.
    """
    columns = map_columns(folder)
    lengths = np.diff(columns["offsets"])
    for source, counts in enumerate(sources):
        of_source = columns["sources"] == source
        counts["documents"] = int(np.count_nonzero(of_source))
        counts["tokens"] = int(lengths[of_source].sum())
        counts["trained_tokens"] = int(columns["trained_counts"][of_source].sum())
    # of all columns, which are the documents wherever they were built
    fingerprint = folder_digest(folder, FILES.values())
    report = {**sum_counts(sources), "sources": sources}
    record = {"fingerprint": fingerprint, "sizes": sizes, "report": report}
    write_json(folder / "report.json", {**record, "digest": json_digest([record])})


def sum_counts(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up the counts of several sources or shards, and their counts by text."""
    total: dict[str, Any] = {}
    for key, value in chain.from_iterable(part.items() for part in parts):
        if isinstance(value, dict):
            total[key] = dict(Counter(total.get(key, {})) + Counter(value))
        elif key == LONGEST:
            total[key] = max(value, total.get(key, 0))
        elif key != "name":
            total[key] = total.get(key, 0) + value
    return total


def keep_documents(
    folder: Path,
    documents: Documents,
    kept: np.ndarray,
    stopping: Callable[[], bool],
) -> Documents:
    """Return the documents that are `kept`, (n,) bool, from `folder`; the first process to come
    fills it. The report, and each of its `sources`, counts the other rows as `leaked`.

    It is a copy and no view: its columns are mapped, too, and its fingerprint is of what is
    trained.

    Raises:
        BadInput: none is kept.
    """
    if not kept.any():
        raise BadInput(f"data.train: no row is left, as all {documents.report['rows']} leaked")

    def build(staging: Path, leftovers: list[Path], check: Callable[[], None]) -> None:
        names = [*FILES.values(), REJECTS, FILTERED]
        with closing(ResumableFiles(staging, [], names, {})) as files:
            for name, blocks in _kept_columns(vars(documents), kept):
                check()
                for block in blocks:
                    files.append(FILES[name], block)
            for name in (REJECTS, FILTERED):
                files.append(name, (documents.folder / name).read_bytes())
            sizes = files.sync()
        sources = copy.deepcopy(documents.report["sources"])
        rows = np.stack([documents.sources, documents.files, documents.rows], 1)[~kept]
        rows = np.unique(rows, axis=0)  # each once, though it may have several documents
        for source, counts in enumerate(sources):
            counts["leaked"] = int(np.count_nonzero(rows[:, 0] == source))
        _write_report(staging, sizes, sources)

    build_once(folder, build, "leaving rows out of data.train", stopping)
    return open_documents(folder)
