"""Files and folders that are there whole or not at all (C7)."""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import xxhash

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.lease import require_owned


@contextmanager
def replace_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Give a file, UTF-8 or with `wb` binary, that replaces `path` at once when the block ends
    without an error.

    A process that is killed meanwhile leaves the old file or the new one, also after a power cut.
    """
    require_owned(path)
    aside = path.with_name(f".{path.name}.new")
    # What a kill left there, or a stranger put: a link would be followed, and a pipe waited for.
    aside.unlink(missing_ok=True)
    with aside.open(mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.flush()
        # before the rename: else a power cut could leave the new name with no content
        os.fsync(file.fileno())
    require_owned(path)
    aside.replace(path)


def write_synced(path: Path, text: str) -> None:
    """Replace a small file at once: an interruption leaves the old one or the new one."""
    with replace_file(path) as file:
        file.write(text)


def write_json(path: Path, content: Any) -> None:
    """Replace a file at once with `content` as indented JSON."""
    write_synced(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json_file(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file; an empty one if there is no file.

    Raises:
        BadInput: it holds anything else.
    """
    if not path.is_file():
        return {}
    found = read_object(path.read_bytes())
    if found is None:
        raise BadInput(f"{path}: damaged, it holds no JSON object; put it back, or remove it")
    return found


def read_object(line: bytes) -> dict[str, Any] | None:
    """Return the object that a line holds, or None if it holds anything else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, or nested too deeply
        return None
    return found if isinstance(found, dict) else None


def checksum(path: Path) -> str:
    """Return a file's checksum (xxh3-128), read at disk speed."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            hasher.update(block)
    return hasher.hexdigest()


def sync_file(path: Path) -> None:
    """Bring a file to the disk, if there is one."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def publish_folder(staged: Path, folder: Path) -> None:
    """Rename `staged` to `folder`, which must not exist; the rename survives a power cut."""
    sync_folder(staged)
    require_owned(folder)
    staged.rename(folder)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def apply_umask(folder: Path) -> None:
    """Give the files of a folder the mode of a new file there, as the umask or an ACL says.

    Safetensors writes through temporary files, which only their owner may read.
    """
    probe = folder / f".mode-{uuid.uuid4().hex}"
    probe.touch()  # not os.umask: a process has only one, and reading it means to set it
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        is_file = path.is_file() and not path.is_symlink()
        if is_file and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)
