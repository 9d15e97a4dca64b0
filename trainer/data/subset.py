"""Copy a part of prepared documents into a cache folder of their own.

Documents, and which of them are kept, enter; Documents leave. A copy, not a view: its columns are
memory-mapped too, and its fingerprint is of what is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from packhorse.trainer.data.cache import (
    COLUMNS,
    FILES,
    FILTERED,
    REJECTS,
    Documents,
    kept_blocks,
    open_documents,
    write_report,
)
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.files import ResumableFiles, build_once


def keep_documents(
    folder: Path,
    documents: Documents,
    kept: np.ndarray,
    reason: str,
    stopping: Callable[[], bool] = lambda: False,
) -> Documents:
    """Return the documents that are `kept`, (n,) bool, from `folder`; the first process to come
    fills it.

    Args:
        reason: key of the report, and of its `sources`, that counts the rows left out.

    Raises:
        BadInput: none is kept.
    """
    if not kept.any():
        raise BadInput(f"data.train: no row is left, as all {documents.report['rows']} {reason}")

    def build(staging: Path, leftovers: list[Path], check: Callable[[], None]) -> None:
        names = [*FILES.values(), REJECTS, FILTERED]
        with closing(ResumableFiles(staging, [], names, {})) as files:
            for name, file in FILES.items():
                check()
                if name == "offsets":
                    ends = np.cumsum(documents.lengths[kept])
                    files.append(file, np.append(0, ends).astype(COLUMNS[name]).tobytes())
                    continue
                column = getattr(documents, name)
                for block in kept_blocks(name, column, kept, documents.offsets):
                    files.append(file, block)
            for name in (REJECTS, FILTERED):
                files.append(name, (documents.folder / name).read_bytes())
            sizes = files.sync()
        report = _count_kept(documents, kept, reason)
        write_report(staging, sizes, report)

    what = "leaving rows out of data.train"
    build_once(folder, build, what, stopping)
    return open_documents(folder, what, max_rejects=1.0, limit="")


def _count_kept(documents: Documents, kept: np.ndarray, reason: str) -> dict[str, Any]:
    report = copy.deepcopy(documents.report)
    left_out = np.stack([documents.sources, documents.files, documents.rows], 1)[~kept]
    sources_left_out = np.unique(left_out, axis=0)[:, 0]  # of each row once
    for number, counts in enumerate(report["sources"]):
        of_source = kept & (documents.sources == number)
        counts["documents"] = int(np.count_nonzero(of_source))
        counts["tokens"] = int(documents.lengths[of_source].sum())
        counts["trained_tokens"] = int(documents.trained_counts[of_source].sum())
        counts[reason] = int(np.count_nonzero(sources_left_out == number))
    for key in ("documents", "tokens", "trained_tokens", reason):
        report[key] = sum(counts[key] for counts in report["sources"])
    return report
