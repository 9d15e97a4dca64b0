"""Memory-map the documents of a complete data cache, which cache.py has written (C10).

The folder holds the buffers of two Arrow lists, `input_ids` and `trained`, which share `offsets`,
and a column each for where a document came from. All is checked when it is opened, and a document
again when a batch is made of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from packhorse.trainer.data.digest import (
    damaged,
    explained,
    json_digest,
    require_intact,
    tokens_digest,
)
from packhorse.trainer.datatypes import Example

COLUMNS = {
    "input_ids": np.dtype(np.int32),  # (tokens,)
    "trained": np.dtype(np.bool_),  # (tokens,)
    "offsets": np.dtype(np.int64),  # (documents + 1,) where each document begins, and the end
    "trained_counts": np.dtype(np.int64),  # (documents,)
    "sources": np.dtype(np.int32),  # (documents,) number of the source in the recipe
    "files": np.dtype(np.int32),  # (documents,) number of the file
    "rows": np.dtype(np.int64),  # (documents,) row number in the file, from 1
    "digests": np.dtype(np.uint64),  # (documents,) of the tokens and flags
    "row_digests": np.dtype(np.uint64),  # (documents,) of those of the whole row
}
FILES = {column: f"{column}.{dtype.name}" for column, dtype in COLUMNS.items()}


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
    row_digests: np.ndarray
    lengths: np.ndarray  # (n,) int64

    def example(self, document: int) -> Example:
        """Return a document's tokens and flags as views of the mapped files."""
        span = slice(self.offsets[document], self.offsets[document + 1])
        return Example(self.input_ids[span], self.trained[span])

    def require_unchanged(self, documents: np.ndarray) -> None:
        """Check documents again as they are read, since the folder was opened long ago.

        Raises:
            BadInput: the tokens or flags of one are no longer those that were written.
        """
        for document in np.unique(documents).tolist():
            if tokens_digest([self.example(document)]) != self.digests[document]:
                raise damaged(self.folder, f"document {document} has changed since the start")

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


def open_documents(folder: Path) -> Documents:
    """Map a complete cache, every byte of it checked by one rank of this node.

    Raises:
        BadInput: it has changed since it was written.
    """
    with explained(folder):
        record = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in record["sizes"]}
        if sizes != record["sizes"]:
            raise ValueError("files have changed size since they were written")
        if record.pop("digest") != json_digest([record]):
            raise ValueError("report.json is not as it was written")
        require_intact(folder, FILES.values(), record["fingerprint"])
    columns = map_columns(folder)
    lengths = np.diff(columns["offsets"])
    return Documents(folder, record["fingerprint"], record["report"], **columns, lengths=lengths)


def map_columns(folder: Path) -> dict[str, np.ndarray]:
    """Return each column as a view of its file."""
    columns = {}
    for name, dtype in COLUMNS.items():
        path = folder / FILES[name]
        is_empty = not path.stat().st_size  # then it cannot be mapped
        column = np.empty(0, dtype) if is_empty else np.memmap(path, dtype, mode="r")
        columns[name] = np.asarray(column)  # a plain view, which is sliced faster
    return columns
