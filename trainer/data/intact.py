"""Check that kept data holds the bytes that were written.

A folder, names of files in it and the digest made when they were written enter; BadInput leaves
where they differ. What a disk, a copy or a person has changed would else be trained on without a
word. One rank of a node checks, at the disk's speed, when the folder is opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from packhorse.trainer.data.digest import CHUNK_BYTES
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.dist import local_rank, log

_SAID_BYTES = 1 << 30  # of files whose check is worth a line in the log


def digest_of(folder: Path, names: Iterable[str]) -> str:
    """Hash files, their names and their sizes (xxh3-128)."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(CHUNK_BYTES))
    for name in names:
        digest.update(f"{name} {(folder / name).stat().st_size}\n".encode())
        with (folder / name).open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                digest.update(buffer[:size])
    return digest.hexdigest()


def require_intact(folder: Path, names: Iterable[str], digest: str) -> None:
    """Check the files' bytes, on the first rank of this node. Raises BadInput if they differ."""
    if local_rank() != 0:
        return
    names = list(names)
    size = sum((folder / name).stat().st_size for name in names)
    if size > _SAID_BYTES:
        log.info("checking the data cache %s: %.1f GiB", folder, size / 2**30)
    if digest_of(folder, names) != digest:
        raise damaged(folder, "files hold other bytes than were written")


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn what the reading of a damaged folder raises into BadInput."""
    try:
        yield
    except BadInput:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise damaged(folder, error) from None


def damaged(folder: Path, why: object) -> BadInput:
    return BadInput(
        f"{folder}: the data cache is damaged ({why}); delete this folder, and it is built anew"
    )
