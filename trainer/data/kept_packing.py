"""Keep the packing of an epoch in the data cache, so that one process packs for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from packhorse.trainer.data.digest import explained, folder_digest, require_intact
from packhorse.trainer.datatypes import Packed
from packhorse.trainer.utils.files import write_synced
from packhorse.trainer.utils.staged_build import build_once

VERSION = 3  # part of every key: raise it when the files of a folder change

_FILES = ("pieces.npy", "sequence_offsets.npy")
_DIGEST = "xxh3"  # beside them


def keep_packed(
    folder: Path, make: Callable[[], Packed], what: str, stopping: Callable[[], bool]
) -> Packed:
    """Memory-map a packing from `folder`; if it is missing, the first process to come makes it.

    Raises:
        BadInput: its files have changed since they were written.
    """

    def build(staging: Path, leftovers: list[Path], check: Callable[[], None]) -> None:
        staging.mkdir()
        packed = make()
        for name, array in zip(_FILES, (packed.pieces, packed.sequence_offsets), strict=True):
            with (staging / name).open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        write_synced(staging / _DIGEST, folder_digest(staging, _FILES))

    build_once(folder, build, what, stopping)
    with explained(folder):
        require_intact(folder, _FILES, (folder / _DIGEST).read_text(encoding="utf-8"))
        return Packed(*(np.asarray(np.load(folder / name, mmap_mode="r")) for name in _FILES))
