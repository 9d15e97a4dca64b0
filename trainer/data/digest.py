"""Digest values for keys, and a file's content for as long as it does not change.

JSON values, or a path and a folder of remembered digests enter; a digest leaves. As in git's index,
a file is the one that was read before if its device, inode, size and both times of change are the
same. The time of the inode's change cannot be set, so a file put in place of another, or changed
with its old time given back, is noticed. A file that changed just before it was read is not
remembered: a further change might get the same time.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from packhorse.trainer.data.row_files import SUFFIXES
from packhorse.trainer.utils.files import write_json

CHUNK_BYTES = 1 << 18  # fits the processor's cache, from which it is hashed
SETTLED_NS = 2 * 10**9  # the step of the coarsest clock that a file system has


def json_digest(values: list[Any]) -> str:
    """Return the xxh3-128 of JSON values, the same in every process."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values).encode())


def file_digest(path: Path, memory: Path) -> str:
    """Return the xxh3-128 of the file's suffix (both of `rows.csv.gz`), size and bytes.

    Args:
        memory: folder of the remembered digests; made if need be.
    """
    begun, seen = time.time_ns(), _identity(path)
    remembered = memory / f"{xxhash.xxh3_128_hexdigest(os.fsencode(path.resolve()))}.json"
    # the record may be missing or damaged
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(remembered.read_text(encoding="utf-8"))
        if known["identity"] == seen:
            return known["digest"]
    suffix = path.suffix if path.suffix in SUFFIXES else "".join(path.suffixes[-2:])
    digest = xxhash.xxh3_128(f"{suffix} {seen['size']}\n".encode())
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    if _identity(path) == seen and begun - seen["ctime_ns"] > SETTLED_NS:
        with suppress(OSError):  # without a record the file is only read again
            memory.mkdir(parents=True, exist_ok=True)
            write_json(remembered, {"identity": seen, "digest": digest.hexdigest()})
    return digest.hexdigest()


def _identity(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {
        name: getattr(stat, f"st_{name}") for name in ("dev", "ino", "size", "mtime_ns", "ctime_ns")
    }
