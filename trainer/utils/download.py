"""Download a file or a folder of an object store into a cache on this node's disk.

A URL enters; a path leaves. The folder in the cache is named by the URL and by what the store says
of each file (its ETag, or the time and size), so that a file that was changed there comes anew, and
one that was not is never asked for twice. One process downloads, the others wait; a download that
is cut off goes on where it was.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.dist import local_rank, log
from packhorse.trainer.utils.own_output import require_unchanged
from packhorse.trainer.utils.remote import is_url, open_filesystem
from packhorse.trainer.utils.staged_build import Stopped, build_once
from packhorse.trainer.utils.text import error_line

BLOCK_BYTES = 1 << 24
_require_unchanged = cache(require_unchanged)
ATTEMPTS = 3  # to go on with a file whose download was cut off
# A folder's weights: a tokenizer or a configuration is had without them.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


@cache
def download(url: str, *, weights: bool = True) -> Path:
    """Return the path of a copy of the file or folder. A process sees one version of it.

    Args:
        weights: False leaves a folder's model weights out.

    Raises:
        BadInput: there is nothing, it cannot be reached, or the disk is full. What has come stays
            for the next start.
    """
    fs, root = open_filesystem(url)
    root = root.rstrip("/")
    try:
        is_file = fs.isfile(root)
        paths = [root] if is_file else sorted(fs.find(root))
        if not weights:
            paths = [path for path in paths if not path.endswith(WEIGHTS)]
        sizes = {path: fs.size(path) for path in paths}
        versions = _versions(fs, sizes)
    except Exception as error:  # each store's library raises classes of its own
        raise _unreachable(url, error) from None
    if not paths:
        raise BadInput(f"{url}: there is no such file or folder")
    # a folder's name is kept, as messages show it
    base = root.rsplit("/", 1)[0] if is_file else root
    names = {path.removeprefix(base).lstrip("/"): path for path in paths}
    key = xxhash.xxh3_128_hexdigest(json.dumps([url, *versions]).encode())
    cache = Path(os.environ.get("PACKHORSE_CACHE", "~/.cache/packhorse")).expanduser()
    folder = cache / "downloads" / key

    def build(staging: Path, leftovers: list[Path], check: Callable[[], None]) -> None:
        staging.mkdir()
        gib = sum(sizes.values()) / 2**30
        log.info("downloading %s: %d files, %.2f GiB", url, len(names), gib)
        for name, path in names.items():
            check()
            if ".." in Path(name).parts:
                raise BadInput(f"{url}: holds a file named {name}")
            _fetch(fs, path, sizes[path], staging / name, [left / name for left in leftovers])
        if _versions(fs, sizes) != versions:
            raise BadInput(f"{url}: was changed while it was downloaded; start again")

    try:
        build_once(folder, build, f"downloading {url}", setting="PACKHORSE_CACHE")
    except _CutOff as error:
        raise _unreachable(url, error) from None
    return folder / next(iter(names)) if is_file else folder


def local_folder(name: str, option: str, *, weights: bool = False) -> Path | None:
    """Return the folder that a model's name means, or None if it is a name on the hub.

    Args:
        option: what the user gave the name as, for the message.
        weights: they are read, too: a URL's are downloaded, those that packhorse exported are
            checked, once a process and by one rank of this node.

    Raises:
        BadInput: the name can only be a path, and there is no such folder; or it is a URL that
            cannot be downloaded; or exported weights have changed.
    """
    folder = download(name, weights=weights) if is_url(name) else Path(name).expanduser()
    if folder.is_dir():
        if weights and local_rank() == 0:
            _require_unchanged(folder)
        return folder
    # a name on the hub is `owner/model` or `model`
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BadInput(f"{option}: there is no folder {folder}; give another or a hub name")
    return None


def _versions(fs: Any, sizes: dict[str, int]) -> list[Any]:
    """Return what the store says of the files' content."""
    return [[path, size, str(fs.ukey(path))] for path, size in sizes.items()]


class _CutOff(Stopped):
    """The download ended early; what has come is kept."""


def _fetch(fs: Any, remote: str, size: int, path: Path, leftovers: list[Path]) -> None:
    """Download a file of `size` bytes, after what earlier starts have left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    left = max((each for each in leftovers if each.is_file()), key=_size, default=None)
    if left is not None:
        shutil.copyfile(left, path)  # not a rename: who was taken for dead may still write
        log.info("%s: going on after %d bytes", remote, _size(path))
    fault: Exception = OSError("it ends early")
    for _ in range(ATTEMPTS):
        try:
            with fs.open(remote, "rb", block_size=BLOCK_BYTES) as source, path.open("ab") as file:
                source.seek(file.tell())
                shutil.copyfileobj(source, file, BLOCK_BYTES)
                file.flush()
                os.fsync(file.fileno())
        except Exception as error:  # each store's library raises classes of its own
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise  # of this disk
            fault = error
        if _size(path) == size:
            return
    raise _CutOff(error_line(fault, 300))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _unreachable(url: str, error: Exception) -> BadInput:
    return BadInput(
        f"{url}: cannot be read ({error_line(error, 300)}); check the URL, the network and the "
        "credentials in the environment, and start again, which goes on with what has come"
    )
