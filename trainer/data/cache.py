"""Write tokenized chunks into a folder once; memory-map that folder ever after (C10).

The folder holds the buffers of two Arrow lists, `input_ids` and `trained`, which share `offsets`,
and a column each for where a document came from. `report.json` has the counts and every file's
size. `rejects.jsonl` lists the rows left out for a fault, `filtered.jsonl` those that the recipe's
filters leave out. The folder is written aside and renamed (trainer/utils/files.py): if it has its
final name, it is complete.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from packhorse.trainer.data.digest import json_digest
from packhorse.trainer.data.intact import damaged, digest_of, explained, require_intact
from packhorse.trainer.datatypes import BadInput, Example, Tokenized
from packhorse.trainer.utils.files import ResumableFiles, Stopped, build_once, write_json
from packhorse.trainer.utils.progress import WorkProgress

VERSION = 5  # part of every key: raise it when the files of a folder change

BLOCK_DOCUMENTS = 4096  # in memory while duplicates are dropped

COLUMNS = {
    "input_ids": np.dtype(np.int32),  # (tokens,)
    "trained": np.dtype(np.bool_),  # (tokens,)
    "offsets": np.dtype(np.int64),  # (documents + 1,) where each document begins, and the end
    "trained_counts": np.dtype(np.int64),  # (documents,)
    "sources": np.dtype(np.int32),  # (documents,) number of the source in the recipe
    "files": np.dtype(np.int32),  # (documents,) number of the file
    "rows": np.dtype(np.int64),  # (documents,) row number in the file, from 1
    "digests": np.dtype(np.uint64),  # (documents,) of the tokens and flags of the whole row
}
FILES = {column: f"{column}.{dtype.name}" for column, dtype in COLUMNS.items()}
REJECTS, FILTERED = "rejects.jsonl", "filtered.jsonl"

# Counted for each source and in total. `cut` rows were truncated or split; `lost_trained_tokens`
# is what that cost. `apart` rows have a document for each trained answer, which costs
# `repeated_tokens`.
COUNTED = (
    "rows",
    "documents",
    "tokens",
    "trained_tokens",
    "rejected",
    "filtered",
    "duplicates",
    "cut",
    "lost_trained_tokens",
    "apart",
    "repeated_tokens",
)

LONGEST = "longest_reject"  # tokens of the longest row that was too long; 0: none was

# Rows counted by a text: why they are rejected or filtered, and names in them that nobody reads.
BY_TEXT = ("reasons", "filter_reasons", "unread")
MAX_UNREAD = 200  # names of a source: rows may have keys of their own, each another

Chunks = Callable[[int], Generator[Tokenized, None, None]]
"""chunks(done): tokenizes the rows after the first `done`. The documents do not depend on how the
rows are cut into chunks."""


@dataclass(frozen=True)
class Documents:
    """A complete cache of n documents. Its columns are memory-mapped, so that they need no memory.

    Only `lengths` is in memory, 8 bytes for each document.
    """

    folder: Path
    fingerprint: str  # of the content: equal wherever it was built
    report: dict[str, Any]  # the counts of COUNTED in total, and of each source under `sources`
    input_ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    trained_counts: np.ndarray
    sources: np.ndarray
    files: np.ndarray
    rows: np.ndarray
    digests: np.ndarray
    lengths: np.ndarray  # (n,) int64

    def example(self, document: int) -> Example:
        """Return a document's tokens and flags as views of the mapped files."""
        span = slice(self.offsets[document], self.offsets[document + 1])
        return Example(self.input_ids[span], self.trained[span])

    def count_trained(
        self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray
    ) -> np.ndarray:
        """Count the trained tokens (P,) that positions [start, stop) of the documents predict.

        Position p predicts token p + 1, so these are the tokens of [start + 1, stop].
        """
        begins = self.offsets[documents] + starts + 1
        ends = np.minimum(self.offsets[documents] + stops + 1, self.offsets[documents + 1])
        counts = [np.count_nonzero(self.trained[b:e]) for b, e in zip(begins, ends, strict=True)]
        return np.array(counts, np.int64)


def prepare(
    folder: Path,
    chunks: Chunks,
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
        sources, files, what: names, for reports and messages.
        limit: the key that limits an example's length, with its value, for messages.
        drop_duplicates: keep only the first of the rows that are equal, token by token.
        total_rows: for the remaining time; called only if there is something to build.

    Raises:
        BadInput: no row is left, too many rows are rejected, or the folder cannot be written.
        Stopped: `stopping()` became true; the rows done so far are kept for the next start.
    """

    def build(staging: Path, leftovers: list[Path], check: Callable[[], None]) -> None:
        with (
            closing(_CacheWriter(staging, leftovers, sources, files)) as writer,
            closing(
                WorkProgress(f"preparing {what}", writer.state["rows"], total_rows())
            ) as progress,
            closing(chunks(writer.state["rows"])) as stream,
        ):
            for chunk in stream:
                check()
                writer.append(chunk)
                rows = writer.state["rows"]
                progress.show(rows, f", {writer.state['tokens']:,} tokens")
                if stopping():
                    writer.save()
                    raise Stopped(f"stopped preparing {what} after {rows} rows, which are kept")
            writer.finish(drop_duplicates)

    build_once(folder, build, f"preparing {what}", stopping)
    return open_documents(folder, what, max_rejects, limit)


def open_documents(folder: Path, what: str, max_rejects: float, limit: str) -> Documents:
    """Map a complete cache, every byte of it checked by one rank of this node.

    Raises:
        BadInput: it has changed since it was written, or holds too few rows.
    """
    with explained(folder):
        record = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in record["sizes"]}
        if sizes != record["sizes"]:
            raise damaged(folder, "files have changed size since they were written")
        if record.pop("digest") != json_digest([record]):
            raise damaged(folder, "report.json is not as it was written")
        require_intact(folder, FILES.values(), record["fingerprint"])
        report = record["report"]
    _check_rejects(report, folder, what, max_rejects, limit)
    columns = _map_columns(folder)
    lengths = np.diff(columns["offsets"])
    return Documents(folder, record["fingerprint"], report, **columns, lengths=lengths)


def _check_rejects(
    report: dict[str, Any], folder: Path, what: str, max_rejects: float, limit: str
) -> None:
    """Raise BadInput if no row is left, or if more than `max_rejects` of the wanted rows are bad.

    Rows that the filters leave out are not wanted.
    """
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
    raise BadInput(f"{what}: {problem}: {common}; see {folder / listed}{remedy}")


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
        for name, rows in ((REJECTS, chunk.rejects), (FILTERED, chunk.filtered)):
            lines = (
                {"source": self._file_names[file], "row": row, "reason": reason}
                | ({"tokens": chunk.long_rows[file, row]} if (file, row) in chunk.long_rows else {})
                for _, file, row, reason in rows
            )
            self._files.append_lines(name, lines)
        self._count(chunk)
        self.state["tokens"] += len(chunk.input_ids)
        self.state["rows"] += sum(chunk.source_rows.values())
        self._files.save_if_due()

    def _count(self, chunk: Tokenized) -> None:
        for source, rows in chunk.source_rows.items():
            counts, of_source = self._sources[source], chunk.sources == source
            counts["rows"] += rows
            counts["documents"] += int(of_source.sum())
            counts["tokens"] += int(chunk.lengths[of_source].sum())
            counts["trained_tokens"] += int(chunk.trained_counts[of_source].sum())
        for count, reasons, rows in (
            ("rejected", "reasons", chunk.rejects),
            ("filtered", "filter_reasons", chunk.filtered),
        ):
            for source, _, _, reason in rows:
                counts = self._sources[source]
                counts[count] += 1
                counts[reasons][reason] = counts[reasons].get(reason, 0) + 1
        for source, file, row, _ in chunk.rejects:
            tokens = chunk.long_rows.get((file, row), 0)
            self._sources[source][LONGEST] = max(self._sources[source][LONGEST], tokens)
        for (source, name), rows in chunk.unread.items():
            counts = self._sources[source]["unread"]
            name = name if name in counts or len(counts) < MAX_UNREAD else "others"
            counts[name] = counts.get(name, 0) + rows
        for source, lost in chunk.cuts:
            self._sources[source]["cut"] += 1
            self._sources[source]["lost_trained_tokens"] += lost
        for source, repeated in chunk.apart:
            self._sources[source]["apart"] += 1
            self._sources[source]["repeated_tokens"] += repeated

    def finish(self, drop_duplicates: bool) -> None:
        """Find the duplicates, write the end of the last document, and last of all the report."""
        self._find_duplicates(drop_duplicates)
        end = sum(source["tokens"] for source in self._sources)
        self._files.append(FILES["offsets"], np.int64(end).tobytes())
        sizes = self._files.sync()
        report: dict[str, Any] = {
            key: sum(source[key] for source in self._sources) for key in COUNTED
        }
        report[LONGEST] = max(source[LONGEST] for source in self._sources)
        for counted in BY_TEXT:
            counters = (Counter(source[counted]) for source in self._sources)
            report[counted] = dict(sum(counters, Counter()))
        report["sources"] = self._sources
        folder = self._files.folder
        write_report(folder, sizes, report)
        self._files.forget()

    def _find_duplicates(self, drop: bool) -> None:
        """Count the rows whose digest an earlier row has, and drop their documents if asked to.

        The chance that any two different rows of ten million share a digest is 1 in 370,000.
        """
        if not self.state["tokens"]:
            return  # an empty file cannot be mapped
        self._files.flush()
        columns = _map_columns(self._files.folder)
        changes = (np.diff(columns["files"]) != 0) | (np.diff(columns["rows"]) != 0)
        firsts = np.append(0, np.flatnonzero(changes) + 1)  # the first document of each row
        repeated = np.ones(len(firsts), np.bool_)
        repeated[np.unique(columns["digests"][firsts], return_index=True)[1]] = False
        for source, counts in enumerate(self._sources):
            of_source = columns["sources"][firsts] == source
            counts["duplicates"] = int(np.count_nonzero(repeated & of_source))
        if drop and repeated.any():
            dropped = np.repeat(repeated, np.diff(firsts, append=len(columns["rows"])))
            self._rewrite(columns, ~dropped)

    def _rewrite(self, columns: dict[str, np.ndarray], kept: np.ndarray) -> None:
        """Rewrite the columns with only the documents that are `kept`, (n,) bool."""
        begins = np.append(columns["offsets"], self.state["tokens"])
        lengths = np.diff(begins)
        columns["offsets"] = np.cumsum(lengths * kept) - lengths * kept
        aside = {file: self._files.folder / f"{file}.aside" for file in FILES.values()}
        for name, file in FILES.items():
            with aside[file].open("wb") as new:
                new.writelines(kept_blocks(name, columns[name], kept, begins))
        self._files.replace(aside)
        for source, counts in enumerate(self._sources):
            of_source = kept & (columns["sources"] == source)
            counts["documents"] = int(np.count_nonzero(of_source))
            counts["tokens"] = int(lengths[of_source].sum())
            counts["trained_tokens"] = int(columns["trained_counts"][of_source].sum())


def kept_blocks(
    name: str, column: np.ndarray, kept: np.ndarray, begins: np.ndarray
) -> Iterator[bytes]:
    """Yield what is kept of a column, in blocks, as the whole may not fit into memory."""
    for start in range(0, len(kept), BLOCK_DOCUMENTS):
        stop = min(start + BLOCK_DOCUMENTS, len(kept))
        chosen, values = kept[start:stop], column[start:stop]
        if name in ("input_ids", "trained"):  # an entry for each token, not for each document
            chosen = np.repeat(chosen, np.diff(begins[start : stop + 1]))
            values = column[begins[start] : begins[stop]]
        yield values[chosen].tobytes()


def write_report(folder: Path, sizes: dict[str, int], report: dict[str, Any]) -> None:
    """Write report.json, last of all: counts, files' sizes, and the digests that are checked when
    the folder is opened."""
    # of all columns, which are the documents wherever they were built
    fingerprint = digest_of(folder, FILES.values())
    record = {"fingerprint": fingerprint, "sizes": sizes, "report": report}
    write_json(folder / "report.json", {**record, "digest": json_digest([record])})


def _map_columns(folder: Path) -> dict[str, np.ndarray]:
    # Plain views, as they are sliced faster than np.memmap.
    return {
        name: np.asarray(np.memmap(folder / FILES[name], dtype, mode="r"))
        for name, dtype in COLUMNS.items()
    }
