"""Tokenised chunks in; a folder of them out, written once and memory-mapped ever after (C10).

The folder holds the buffers of two Arrow lists, `input_ids` and `trained`, which share `offsets`, and a column
each for where a document came from; `report.json` has the counts and every file's size, `rejects.jsonl` the
rows left out. It is written aside and renamed (trainer/once.py): a folder with the final name is whole.
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

from trainer.dist import is_main, log
from trainer.flow import BadInput, Example, Packed, Tokenised
from trainer.once import Stopped, build_once

VERSION = 2  # part of every key: raise it when the files of a folder change

SAVE_EVERY_S = 5.0  # between points that a next start can go on from
LINE_EVERY_S = 10.0  # between lines of progress where there is no terminal

COLUMNS = {
    "input_ids": np.dtype(np.int32),  # (tokens,)
    "trained": np.dtype(np.bool_),  # (tokens,)
    "offsets": np.dtype(np.int64),  # (documents + 1,) where each document begins, and the end
    "trained_counts": np.dtype(np.int64),  # (documents,)
    "sources": np.dtype(np.int32),  # (documents,) number of the source in the recipe
    "files": np.dtype(np.int32),  # (documents,) number of the file
    "rows": np.dtype(np.int64),  # (documents,) row number in the file, from 1
}

Chunks = Callable[[int], Generator[Tokenised, None, None]]
"""chunks(done): starts tokenising after the first `done` rows. The documents do not depend on how chunks fall."""


@dataclass(frozen=True)
class Documents:
    """A finished cache of n documents: its columns, memory-mapped; in memory are `lengths` alone, 8 bytes each."""

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
    lengths: np.ndarray  # (n,) int64

    def example(self, document: int) -> Example:
        """A document's tokens, as views of the mapped files."""
        span = slice(self.offsets[document], self.offsets[document + 1])
        return Example(self.input_ids[span], self.trained[span])

    def count_trained(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Trained tokens (P,) that positions [start, stop) of the documents predict: those at [start + 1, stop]."""
        begins = self.offsets[documents] + starts + 1
        ends = np.minimum(self.offsets[documents] + stops + 1, self.offsets[documents + 1])
        return np.array([np.count_nonzero(self.trained[b:e]) for b, e in zip(begins, ends, strict=True)], np.int64)


def prepare(
    folder: Path,
    chunks: Chunks,
    *,
    sources: list[str],
    files: list[str],
    what: str,
    max_rejects: float,
    total_rows: Callable[[], int | None] = lambda: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Documents:
    """The documents in `folder`; if it is not there, they are made from `chunks` by whichever process comes first.

    Args:
        folder: named by a key of everything that shapes its content.
        sources, files, what: names, for reports and messages.
        total_rows: for the time to go; asked only when there is something to build.

    Raises:
        BadInput: nothing is left, too many rows are rejected, or the folder cannot be written.
        Stopped: `stopping` said so; the rows done so far are kept for the next start.
    """

    def build(staging: Path, leftovers: list[Path], check: Callable[[], None]) -> None:
        with (
            closing(_Building(staging, leftovers, sources, files)) as building,
            closing(_Progress(what, building.rows, total_rows())) as progress,
            closing(chunks(building.rows)) as stream,
        ):
            for chunk in stream:
                check()
                building.append(chunk)
                progress.show(building.rows, building.tokens)
                if stopping():
                    building.save()
                    raise Stopped(f"stopped preparing {what} after {building.rows} rows, which are kept")
            building.finish()

    build_once(folder, build, f"preparing {what}", stopping)
    return _open(folder, what, max_rejects)


def keep_packed(folder: Path, make: Callable[[], Packed], what: str, stopping: Callable[[], bool]) -> Packed:
    """A packing from `folder`, memory-mapped; made by whichever process comes first where it is not there."""

    def build(staging: Path, leftovers: list[Path], check: Callable[[], None]) -> None:
        staging.mkdir()
        packed = make()
        np.save(staging / "pieces.npy", packed.pieces)
        np.save(staging / "row_offsets.npy", packed.row_offsets)
        for path in staging.iterdir():
            _sync(path)

    build_once(folder, build, what, stopping)
    pieces, row_offsets = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("pieces", "row_offsets"))
    return Packed(np.asarray(pieces), np.asarray(row_offsets))


def _open(folder: Path, what: str, max_rejects: float) -> Documents:
    try:
        record = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in record["sizes"]}
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{folder}: the cache is damaged ({error}); delete the folder") from None
    if sizes != record["sizes"]:
        raise BadInput(f"{folder}: files of the cache have changed size since they were written; delete the folder")
    _check_rejects(record["report"], folder, what, max_rejects)
    columns = {
        name: np.asarray(np.memmap(folder / _file(name), dtype, mode="r"))  # a plain view: slices faster than memmap
        for name, dtype in COLUMNS.items()
    }
    return Documents(folder, record["fingerprint"], record["report"], **columns, lengths=np.diff(columns["offsets"]))


def _check_rejects(report: dict[str, Any], folder: Path, what: str, max_rejects: float) -> None:
    rows, rejected = report["rows"], report["rejected"]
    common = ", ".join(f"{reason} ({count})" for reason, count in Counter(report["reasons"]).most_common(3))
    if not rows:
        raise BadInput(f"{what}: there are no rows; name a source that has some")
    if rejected == rows:
        raise BadInput(f"{what}: no row is left of {rows}: {common}; see {folder / 'rejects.jsonl'}")
    if rejected / rows > max_rejects:
        raise BadInput(
            f"{what}: {rejected} of {rows} rows ({rejected / rows:.1%}) are rejected, more than data.max_rejects "
            f"({max_rejects:.1%}): {common}; see {folder / 'rejects.jsonl'}, mend the data or raise data.max_rejects"
        )


# ----------------------------------------------------------------------------------------------- building


class _Building:
    """A cache being written. Every few seconds its state is made safe, for a next start to go on from."""

    def __init__(self, staging: Path, leftovers: list[Path], sources: list[str], files: list[str]) -> None:
        self._folder, self._file_names = staging, files
        self.rows, self.tokens = 0, 0
        counts = {"rows": 0, "documents": 0, "tokens": 0, "trained_tokens": 0, "rejected": 0}
        self._sources: list[dict[str, Any]] = [{"name": name, **counts, "reasons": {}} for name in sources]
        staging.mkdir()
        self._go_on_from(leftovers)
        self._files = {name: (staging / name).open("ab") for name in [*map(_file, COLUMNS), "rejects.jsonl"]}
        self._saved_at = time.monotonic()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def append(self, chunk: Tokenised) -> None:
        starts = self.tokens + np.cumsum(chunk.lengths) - chunk.lengths
        for name, dtype in COLUMNS.items():
            column = starts if name == "offsets" else getattr(chunk, name)
            assert column.dtype == dtype, name
            self._files[_file(name)].write(column.tobytes())
        for _, file, row, reason in chunk.rejects:
            line = {"source": self._file_names[file], "row": row, "reason": reason}
            self._files["rejects.jsonl"].write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._count(chunk)
        self.tokens += len(chunk.input_ids)
        self.rows += sum(chunk.source_rows.values())
        if time.monotonic() - self._saved_at > SAVE_EVERY_S:
            self.save()

    def _count(self, chunk: Tokenised) -> None:
        for source, rows in chunk.source_rows.items():
            counts, of_source = self._sources[source], chunk.sources == source
            counts["rows"] += rows
            counts["documents"] += int(of_source.sum())
            counts["tokens"] += int(chunk.lengths[of_source].sum())
            counts["trained_tokens"] += int(chunk.trained_counts[of_source].sum())
        for source, _, _, reason in chunk.rejects:
            counts = self._sources[source]
            counts["rejected"] += 1
            counts["reasons"][reason] = counts["reasons"].get(reason, 0) + 1

    def save(self) -> None:
        """Make what is written so far a point to go on from."""
        sizes = self._sync_all()
        state = {"rows": self.rows, "tokens": self.tokens, "sources": self._sources, "sizes": sizes}
        _write(self._folder / "progress.json", state)
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """Write the end of the last document, and the report: the last thing before the folder is published."""
        self._files[_file("offsets")].write(np.int64(self.tokens).tobytes())
        sizes = self._sync_all()
        counted = ("rows", "documents", "tokens", "trained_tokens", "rejected")
        totals = {key: sum(source[key] for source in self._sources) for key in counted}
        reasons = sum((Counter(source["reasons"]) for source in self._sources), Counter())
        report = {**totals, "reasons": dict(reasons), "sources": self._sources}
        record = {"fingerprint": _digest(self._folder), "sizes": sizes, "report": report}
        _write(self._folder / "report.json", record)
        (self._folder / "progress.json").unlink(missing_ok=True)

    def _sync_all(self) -> dict[str, int]:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._files.items()}

    def _go_on_from(self, leftovers: list[Path]) -> None:
        """Copy what a killed build had made safe. A copy, since the one thought dead may still write."""
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


def _file(column: str) -> str:
    return f"{column}.{COLUMNS[column].name}"


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write(path: Path, content: dict[str, Any]) -> None:
    """JSON, whole or not at all."""
    aside = path.with_name(f"{path.name}.aside")
    aside.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    _sync(aside)
    aside.replace(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


# ----------------------------------------------------------------------------------------------- progress


class _Progress:
    """Rows done, tokens per second and time to go: a bar in a terminal, lines elsewhere, on rank 0 only."""

    def __init__(self, what: str, rows: int, total: int | None) -> None:
        self._what, self._first, self._total = what, rows, total
        self._started = self._said = time.monotonic()
        self._bar: Any = None
        if is_main() and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn(f"preparing {what}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=total, completed=rows)

    def show(self, rows: int, tokens: int) -> None:
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
            log.info(
                "preparing %s: %s%s rows, %s tokens, %s%s", self._what, f"{rows:,}", of, f"{tokens:,}", rate, to_go
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
