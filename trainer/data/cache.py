"""Tokenized chunks in; a folder of them out, written once and memory-mapped ever after (C10).

The folder holds the buffers of two Arrow lists, `input_ids` and `trained`, which share `offsets`,
and a column each for where a document came from; `report.json` has the counts and every file's
size, `rejects.jsonl` the rows left out for a fault, `filtered.jsonl` those that the recipe's
filters leave out. It is written aside and renamed (trainer/utils/files.py): a folder with the final
name is whole.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from trainer.datatypes import BadInput, Example, Packed, Tokenized
from trainer.dist import is_main, log
from trainer.utils.files import Stopped, build_once, write_json

VERSION = 2  # part of every key: raise it when the files of a folder change

SAVE_EVERY_S = 5.0  # between points that a next start can go on from
BLOCK_DOCUMENTS = 4096  # in memory while duplicates are dropped
LINE_EVERY_S = 10.0  # between lines of progress where there is no terminal

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

LEFT_OUT = ("rejects.jsonl", "filtered.jsonl")
# Of all, and of each source; `cut` rows were truncated or split, with what was lost to learn.
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
)

Chunks = Callable[[int], Generator[Tokenized, None, None]]
"""chunks(done): starts tokenizing after the first `done` rows. The documents do not depend on how
chunks fall.
"""


@dataclass(frozen=True)
class Documents:
    """A finished cache of n documents: its columns, memory-mapped; in memory are `lengths` alone, 8
    bytes each.
    """

    folder: Path
    fingerprint: str  # of the content: equal wherever it was built
    report: dict[str, Any]  # counts of all, and of each source under `sources`
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
        """A document's tokens, as views of the mapped files."""
        span = slice(self.offsets[document], self.offsets[document + 1])
        return Example(self.input_ids[span], self.trained[span])

    def count_trained(
        self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray
    ) -> np.ndarray:
        """Trained tokens (P,) that positions [start, stop) of the documents predict: those at
        [start + 1, stop].
        """
        begins = self.offsets[documents] + starts + 1
        ends = np.minimum(self.offsets[documents] + stops + 1, self.offsets[documents + 1])
        return np.array(
            [np.count_nonzero(self.trained[b:e]) for b, e in zip(begins, ends, strict=True)],
            np.int64,
        )


def prepare(
    folder: Path,
    chunks: Chunks,
    *,
    sources: list[str],
    files: list[str],
    what: str,
    max_rejects: float,
    drop_duplicates: bool = False,
    total_rows: Callable[[], int | None] = lambda: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Documents:
    """The documents in `folder`; if it is not there, they are made from `chunks` by whichever
    process comes first.

    Args:
        folder: named by a key of everything that shapes its content.
        sources, files, what: names, for reports and messages.
        drop_duplicates: of rows that are alike, token by token, only the first stays.
        total_rows: for the time to go; asked only when there is something to build.

    Raises:
        BadInput: nothing is left, too many rows are rejected, or the folder cannot be written.
        Stopped: `stopping` said so; the rows done so far are kept for the next start.
    """

    def build(staging: Path, leftovers: list[Path], check: Callable[[], None]) -> None:
        with (
            closing(_Building(staging, leftovers, sources, files)) as building,
            closing(Progress(f"preparing {what}", building.rows, total_rows())) as progress,
            closing(chunks(building.rows)) as stream,
        ):
            for chunk in stream:
                check()
                building.append(chunk)
                progress.show(building.rows, f", {building.tokens:,} tokens")
                if stopping():
                    building.save()
                    raise Stopped(
                        f"stopped preparing {what} after {building.rows} rows, which are kept"
                    )
            building.finish(drop_duplicates)

    build_once(folder, build, f"preparing {what}", stopping)
    return _open(folder, what, max_rejects)


def keep_packed(
    folder: Path, make: Callable[[], Packed], what: str, stopping: Callable[[], bool]
) -> Packed:
    """A packing from `folder`, memory-mapped; made by whichever process comes first where it is not
    there.
    """

    def build(staging: Path, leftovers: list[Path], check: Callable[[], None]) -> None:
        staging.mkdir()
        packed = make()
        np.save(staging / "pieces.npy", packed.pieces)
        np.save(staging / "row_offsets.npy", packed.sequence_offsets)
        for path in staging.iterdir():
            _sync(path)

    build_once(folder, build, what, stopping)
    pieces, offsets = (
        np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("pieces", "row_offsets")
    )
    return Packed(np.asarray(pieces), np.asarray(offsets))


def _open(folder: Path, what: str, max_rejects: float) -> Documents:
    try:
        record = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in record["sizes"]}
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{folder}: the cache is damaged ({error}); delete the folder") from None
    if sizes != record["sizes"]:
        raise BadInput(
            f"{folder}: files of the cache have changed size since they were written; delete the "
            f"folder"
        )
    _check_rejects(record["report"], folder, what, max_rejects)
    columns = _mapped(folder)
    return Documents(
        folder,
        record["fingerprint"],
        record["report"],
        **columns,
        lengths=np.diff(columns["offsets"]),
    )


def _check_rejects(report: dict[str, Any], folder: Path, what: str, max_rejects: float) -> None:
    """The share is of the rows that the filters let through: those left out were not wanted."""
    rows, rejected, filtered = report["rows"], report["rejected"], report["filtered"]
    common = ", ".join(
        f"{reason} ({count})" for reason, count in Counter(report["reasons"]).most_common(3)
    )
    if not rows:
        raise BadInput(
            f"{what}: there are no rows; name a source that has some, or change data.eval_fraction"
        )
    if rejected == rows:
        raise BadInput(
            f"{what}: no row is left of {rows}: {common}; see {folder / 'rejects.jsonl'}"
        )
    if filtered and rejected + filtered == rows:
        reasons = Counter(report["reasons"]) + Counter(report["filter_reasons"])
        common = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        raise BadInput(
            f"{what}: the filters leave no row of {rows}: {common}; see {folder / 'filtered.jsonl'}"
        )
    wanted = rows - filtered
    if rejected / wanted > max_rejects:
        raise BadInput(
            f"{what}: {rejected} of {wanted} rows ({rejected / wanted:.1%}) are rejected, more "
            f"than data.max_rejects "
            f"({max_rejects:.1%}): {common}; see {folder / 'rejects.jsonl'}, mend the data or "
            f"raise data.max_rejects"
        )


# ----------------------------------------------------------------------------------------- building


class _Building:
    """A cache being written. Every few seconds its state is made safe, for a next start to go on
    from.
    """

    def __init__(
        self, staging: Path, leftovers: list[Path], sources: list[str], files: list[str]
    ) -> None:
        self._folder, self._file_names = staging, files
        self.rows, self.tokens = 0, 0
        counts = dict.fromkeys(COUNTED, 0)
        self._sources: list[dict[str, Any]] = [
            {"name": name, **counts, "reasons": {}, "filter_reasons": {}} for name in sources
        ]
        staging.mkdir()
        self._go_on_from(leftovers)
        self._files = {
            name: (staging / name).open("ab") for name in [*map(_file, COLUMNS), *LEFT_OUT]
        }
        self._saved_at = time.monotonic()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def append(self, chunk: Tokenized) -> None:
        starts = self.tokens + np.cumsum(chunk.lengths) - chunk.lengths
        for name, dtype in COLUMNS.items():
            column = starts if name == "offsets" else getattr(chunk, name)
            assert column.dtype == dtype, name
            self._files[_file(name)].write(column.tobytes())
        for name, rows in zip(LEFT_OUT, (chunk.rejects, chunk.filtered), strict=True):
            for _, file, row, reason in rows:
                line = {"source": self._file_names[file], "row": row, "reason": reason}
                self._files[name].write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._count(chunk)
        self.tokens += len(chunk.input_ids)
        self.rows += sum(chunk.source_rows.values())
        if time.monotonic() - self._saved_at > SAVE_EVERY_S:
            self.save()

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
        for source, lost in chunk.cuts:
            self._sources[source]["cut"] += 1
            self._sources[source]["lost_trained_tokens"] += lost

    def save(self) -> None:
        """Make what is written so far a point to go on from."""
        sizes = self._sync_all()
        state = {"rows": self.rows, "tokens": self.tokens, "sources": self._sources, "sizes": sizes}
        write_json(self._folder / "progress.json", state)
        self._saved_at = time.monotonic()

    def finish(self, drop_duplicates: bool) -> None:
        """Count the duplicates, write the end of the last document, and the report: the last thing
        before the folder is published."""
        self._find_duplicates(drop_duplicates)
        self._files[_file("offsets")].write(
            np.int64(sum(source["tokens"] for source in self._sources)).tobytes()
        )
        sizes = self._sync_all()
        report: dict[str, Any] = {
            key: sum(source[key] for source in self._sources) for key in COUNTED
        }
        for reasons in ("reasons", "filter_reasons"):
            report[reasons] = dict(
                sum((Counter(source[reasons]) for source in self._sources), Counter())
            )
        report["sources"] = self._sources
        record = {"fingerprint": _digest(self._folder), "sizes": sizes, "report": report}
        write_json(self._folder / "report.json", record)
        (self._folder / "progress.json").unlink(missing_ok=True)

    def _find_duplicates(self, drop: bool) -> None:
        """A row is a duplicate if an earlier one has its digest. That any two others among ten
        million rows share one has a chance of one in 370,000."""
        if not self.tokens:
            return
        columns = self._columns()
        changes = (np.diff(columns["files"]) != 0) | (np.diff(columns["rows"]) != 0)
        firsts = np.append(0, np.flatnonzero(changes) + 1)  # the first document of each row
        repeated = np.ones(len(firsts), np.bool_)
        repeated[np.unique(columns["digests"][firsts], return_index=True)[1]] = False
        for source, counts in enumerate(self._sources):
            counts["duplicates"] = int(
                np.count_nonzero(repeated & (columns["sources"][firsts] == source))
            )
        if drop and repeated.any():
            self._keep(columns, ~np.repeat(repeated, np.diff(firsts, append=len(columns["rows"]))))

    def _keep(self, columns: dict[str, np.ndarray], kept: np.ndarray) -> None:
        """Rewrite the columns with the documents that are kept, (n,) bool, a block at a time."""
        begins = np.append(columns["offsets"], self.tokens)
        lengths = np.diff(begins)
        columns["offsets"] = np.cumsum(lengths * kept) - lengths * kept
        for name in COLUMNS:
            with (self._folder / f"{_file(name)}.aside").open("wb") as new:
                for start in range(0, len(kept), BLOCK_DOCUMENTS):
                    stop = min(start + BLOCK_DOCUMENTS, len(kept))
                    span, chosen = slice(start, stop), kept[start:stop]
                    if name in ("input_ids", "trained"):
                        span, chosen = (
                            slice(begins[start], begins[stop]),
                            np.repeat(chosen, lengths[start:stop]),
                        )
                    new.write(columns[name][span][chosen].tobytes())
        (self._folder / "progress.json").unlink(
            missing_ok=True
        )  # it is about the files that now go
        for name in map(_file, COLUMNS):
            self._files[name].close()
            (self._folder / f"{name}.aside").replace(self._folder / name)
            self._files[name] = (self._folder / name).open("ab")
        for source, counts in enumerate(self._sources):
            of_source = kept & (columns["sources"] == source)
            counts["documents"] = int(np.count_nonzero(of_source))
            counts["tokens"] = int(lengths[of_source].sum())
            counts["trained_tokens"] = int(columns["trained_counts"][of_source].sum())

    def _columns(self) -> dict[str, np.ndarray]:
        """What is written so far, memory-mapped; there must be something."""
        for file in self._files.values():
            file.flush()
        return _mapped(self._folder)

    def _sync_all(self) -> dict[str, int]:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._files.items()}

    def _go_on_from(self, leftovers: list[Path]) -> None:
        """Copy what a killed build had made safe. A copy, since the one thought dead may still
        write.
        """
        states = [(_read(folder / "progress.json"), folder) for folder in leftovers]
        states = [(state, folder) for state, folder in states if state]
        if not states:
            return
        state, folder = max(states, key=lambda found: found[0]["rows"])
        for name, size in state["sizes"].items():
            with (folder / name).open("rb") as old, (self._folder / name).open("wb") as new:
                while size and (block := old.read(min(size, 1 << 24))):
                    new.write(block)
                    size -= len(block)
                assert not size, f"{folder / name} is shorter than it was"
        self.rows, self.tokens, self._sources = state["rows"], state["tokens"], state["sources"]
        log.info("going on after the %d rows that an earlier start prepared", self.rows)


def _digest(folder: Path) -> str:
    """xxh3-128 over all columns, which is the documents, wherever they were built."""
    digest = xxhash.xxh3_128()
    for name in map(_file, COLUMNS):
        digest.update(f"{name} {(folder / name).stat().st_size}\n".encode())
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def _mapped(folder: Path) -> dict[str, np.ndarray]:
    """The columns, as plain views, which are sliced faster than memmaps."""
    return {
        name: np.asarray(np.memmap(folder / _file(name), dtype, mode="r"))
        for name, dtype in COLUMNS.items()
    }


def _file(column: str) -> str:
    return f"{column}.{COLUMNS[column].name}"


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


# ----------------------------------------------------------------------------------------- progress


class Progress:
    """Rows done, rows per second and time to go: a bar in a terminal, lines elsewhere, on rank 0
    only.
    """

    def __init__(self, what: str, rows: int, total: int | None) -> None:
        self._what, self._first, self._total = what, rows, total
        self._started = self._said = time.monotonic()
        self._bar: Any = None
        if is_main() and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            columns = (
                TextColumn(what),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(
                *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=total, completed=rows)

    def show(self, rows: int, more: str = "") -> None:
        now = time.monotonic()
        rate = f"{(rows - self._first) / (now - self._started):,.0f} rows/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=rows, description=rate)
        elif now - self._said > LINE_EVERY_S:
            self._said = now
            of, to_go = "", ""
            if self._total:
                seconds = (now - self._started) / (rows - self._first) * (self._total - rows)
                of, to_go = f" of {self._total:,}", f", {max(seconds, 0):.0f} s to go"
            log.info("%s: %s%s rows%s, %s%s", self._what, f"{rows:,}", of, more, rate, to_go)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
