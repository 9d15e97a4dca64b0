"""Digests of JSON values (for keys), of tokens and of files (for their content), and the check that
kept data has not changed.

JSON values or files enter; a digest leaves, or BadInput where kept data has changed: what a disk, a
copy or a person has changed would else be trained on without a word.

Digests of sources are remembered. As in git's index, a file is the one that was read before if its
device, inode, size and both times of change are the same. The time of the inode's change cannot be
set, so a file put in place of another, or changed with its old time given back, is noticed. A file
that changed just before it was read is not remembered: a further change might get the same time.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from packhorse.trainer.data.row_files import SUFFIXES
from packhorse.trainer.datatypes import BadInput, Example
from packhorse.trainer.dist import local_rank, log
from packhorse.trainer.utils.files import write_json

CHUNK_BYTES = 1 << 18  # fits the processor's cache, from which it is hashed
SETTLED_NS = 2 * 10**9  # the step of the coarsest clock that a file system has
_SAID_BYTES = 1 << 30  # of files whose check is worth a line in the log


def json_digest(values: list[Any]) -> str:
    """Return the xxh3-128 of JSON values, the same in every process."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values).encode())


def tokens_digest(examples: Iterable[Example]) -> int:
    """Return the xxh3-64 of the examples' tokens and flags."""
    digest = xxhash.xxh3_64()
    for example in examples:
        digest.update(example.input_ids.data)
        digest.update(example.trained.data)
    return digest.intdigest()


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
    digest = _hash_files([(suffix, path)])
    if _identity(path) == seen and begun - seen["ctime_ns"] > SETTLED_NS:
        with suppress(OSError):  # without a record the file is only read again
            memory.mkdir(parents=True, exist_ok=True)
            write_json(remembered, {"identity": seen, "digest": digest})
    return digest


def _identity(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {
        name: getattr(stat, f"st_{name}") for name in ("dev", "ino", "size", "mtime_ns", "ctime_ns")
    }


def _hash_files(files: Iterable[tuple[str, Path]]) -> str:
    """Hash files: the name given for each, its size and its bytes."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(CHUNK_BYTES))
    for name, path in files:
        digest.update(f"{name} {path.stat().st_size}\n".encode())
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                digest.update(buffer[:size])
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------- kept data


def folder_digest(folder: Path, names: Iterable[str]) -> str:
    """Hash files of a folder, their names and their sizes (xxh3-128)."""
    return _hash_files((name, folder / name) for name in names)


def require_intact(folder: Path, names: Iterable[str], digest: str) -> None:
    """Check the files' bytes at the disk's speed, on the first rank of this node.

    Raises:
        BadInput: they are not those that `folder_digest` hashed.
    """
    if local_rank() != 0:
        return
    names = list(names)
    size = sum((folder / name).stat().st_size for name in names)
    if size > _SAID_BYTES:
        log.info("checking the data cache %s: %.1f GiB", folder, size / 2**30)
    if folder_digest(folder, names) != digest:
        raise damaged(folder, "files hold other bytes than were written")


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn what the reading of a damaged folder raises into BadInput."""
    try:
        yield
    except BadInput:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(folder, error) from None


def damaged(folder: Path, why: object) -> BadInput:
    """Return the error that a folder of kept data has changed."""
    return BadInput(
        f"{folder}: the data cache is damaged ({why}); delete this folder, and it is built anew"
    )
