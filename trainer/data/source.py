"""Read the rows of a source, one at a time.

A `Source` of the recipe enters (a file, a folder of files, a dataset of the hub); `RawRow`s leave
(trainer/data/row_files.py).

A folder is read alike as `path` and as `name`: the files of `split`, in the order in which
datasets.load_dataset reads them. The library itself says which these are. What it passes over is
named in the log, or refused if it looks like data.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import xxhash

from packhorse.trainer.config.data import Source
from packhorse.trainer.data.digest import file_digest
from packhorse.trainer.data.row_files import (
    BATCH_ROWS,
    COMPRESSED,
    SUFFIXES,
    RawRow,
    arrow_rows,
    kind_of_file,
    rows_of_file,
)
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.dist import log
from packhorse.trainer.utils.download import download
from packhorse.trainer.utils.remote import is_url
from packhorse.trainer.utils.text import error_line, one_line

_READ_FROM = f"{', '.join(SUFFIXES)} files (those of text also as {', '.join(COMPRESSED)})"


def read_rows(source: Source) -> Iterator[RawRow]:
    """Yield the rows of `source` in file order, at most `source.rows`.

    Raises:
        BadInput: there is no file, or one is empty or cannot be read; it names the file.
    """
    files = source_files(source)
    rows = _file_rows(files) if files else _dataset_rows(_hub_dataset(source), shown(source))
    return islice(rows, source.rows)


def source_digest(source: Source, memory: Path) -> str:
    """Return a digest of the source's files, wherever they lie, or the hub dataset's fingerprint.

    `source.rows` is not part of it.

    Args:
        memory: folder of remembered digests of files; see `file_digest`.
    """
    files = source_files(source)
    if files is None:
        return f"hub-{_hub_dataset(source)._fingerprint}"
    folders = (sorted(path.glob("*.arrow")) if path.is_dir() else [path] for path in files.values())
    digests = [file_digest(path, memory) for path in chain(*folders)]
    if len(digests) == 1:
        return digests[0]
    return xxhash.xxh3_128_hexdigest("\n".join(digests).encode())


def shown(source: Source) -> str:
    """Return the place of a source as the recipe has it, for messages."""
    return source.path or str(source.name)


def source_files(source: Source) -> dict[str, Path] | None:
    """Return the files of a source by their names, in the order of reading.

    A dataset that the library datasets has saved counts as one file: its folder. None if datasets
    has to load the source: it is on the hub, or a folder of another kind of files.

    Raises:
        BadInput: there is no such file, or the folder holds data that would not be read.
    """
    is_remote = source.path is not None and is_url(source.path)
    path = download(shown(source)) if is_remote else Path(shown(source)).expanduser()
    if path.is_dir():
        if source.revision:
            raise BadInput(
                f"{shown(source)}: a folder has no `revision`, only a dataset of the hub has"
            )
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            _refuse_choice(source, "dataset that was saved by save_to_disk")
            return {path.name: path}
        if source.path and (path / "dataset_dict.json").is_file():
            raise BadInput(
                f"{shown(source)}: the folder holds a dataset's splits; point `path` at one, "
                f"as {shown(source)}/train"
            )
        return _folder_files(source, path)
    if source.path is None:
        return None
    if not path.is_file():
        raise BadInput(
            f"{shown(source)}: there is no such file or folder; check `path` (it is relative to "
            "the current folder)"
        )
    if not kind_of_file(path):
        raise BadInput(
            f"{shown(source)}: rows are read from {_READ_FROM}; convert or rename the file"
        )
    _refuse_choice(source, "file")
    return {path.name: path}


def _refuse_choice(source: Source, what: str) -> None:
    """Refuse keys that choose among files where there is nothing to choose from."""
    for key in ("config", "data_files", "split"):
        if getattr(source, key) != Source.model_fields[key].default:
            raise BadInput(f"{shown(source)}: a {what} has no `{key}`; leave it out")


def count_rows(source: Source) -> int | None:
    """Return how many rows the files have, roughly; None if that needs parsing them."""
    rows = 0
    for path in (source_files(source) or {"": Path()}).values():
        if path.suffix == ".parquet":
            import pyarrow.parquet

            rows += pyarrow.parquet.read_metadata(path).num_rows
        elif path.suffix == ".jsonl":
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    rows += block.count(b"\n")
        else:
            return None
    return min(rows, source.rows or rows)


# ------------------------------------------------------------------------------------------ folders


def _folder_files(source: Source, folder: Path) -> dict[str, Path] | None:
    """Return the files of the source's split; None for a `name` whose files only datasets reads."""
    root = folder.resolve()
    there = [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and not any(part.startswith((".", "__")) for part in path.relative_to(root).parts)
    ]
    data = [path for path in there if kind_of_file(path)]
    if source.path and not data:
        raise BadInput(
            f"{shown(source)}: the folder holds no {_READ_FROM}; point `path` at one that does"
        )
    splits = _resolve_splits(source, folder)
    chosen = splits.get(source.split, [])
    strange = [path for path in chosen if not kind_of_file(path)]
    if source.path is None and (strange or not chosen):
        return None
    if not chosen:
        raise BadInput(
            f"{shown(source)}: the files there have no split `{source.split}`, only "
            f"{', '.join(splits)}; give `split`, or name the files in `data_files`"
        )
    if strange:
        raise BadInput(
            f"{shown(source)}: rows are read from {_READ_FROM}, not from {_listed(strange)}"
        )
    known = {path for files in splits.values() for path in files}
    lost = [path for path in data if path not in known]
    if lost and not (source.config or source.data_files):
        raise BadInput(
            f"{shown(source)}: beside {_listed(chosen)}, datasets.load_dataset does not read "
            f"{_listed(lost)}, which are of another kind or of no split; move them away, or make "
            "them a source of their own with `data_files`"
        )
    if unread := sorted({*there} - {*chosen}):
        say_once(
            f"{shown(source)}: split `{source.split}` is {_listed(chosen)}; not {_listed(unread)}"
        )
    return {os.path.relpath(path, root): path for path in chosen}


def _resolve_splits(source: Source, folder: Path) -> dict[str, list[Path]]:
    """Return the files of each split as datasets.load_dataset finds them."""
    import datasets

    try:
        with tempfile.TemporaryDirectory() as locks:
            builder = datasets.load_dataset_builder(
                str(folder),
                source.config,
                data_files=list(source.data_files) or None,
                cache_dir=locks,
            )
    except Exception as error:  # the library raises a dozen unrelated classes
        raise BadInput(
            f"{shown(source)}: {_shown_choice(source)}: {error_line(error, 300)}"
        ) from None
    found = getattr(builder.config, "data_files", None) or {}
    return {str(split): [Path(file) for file in files] for split, files in found.items()}


def _listed(paths: list[Path]) -> str:
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return ", ".join(path.name for path in paths[:5]) + more


@cache
def say_once(message: str) -> None:
    """Log a message, unless it was logged before: a source is opened several times."""
    log.info("%s", message)


def _file_rows(files: dict[str, Path]) -> Iterator[RawRow]:
    for name, path in files.items():
        if not os.access(path, os.R_OK):
            raise BadInput(f"{path}: the file may not be read; check its permissions")
        rows = _saved_rows(path) if path.is_dir() else rows_of_file(path, name)
        first = next(rows, None)
        if first is None:
            raise BadInput(
                f"{path}: the file holds no rows; write at least one, or take the file out of the "
                f"recipe"
            )
        yield from chain([first], rows)


# ----------------------------------------------------------------------------------------- datasets


def _dataset_rows(dataset: Any, name: str) -> Iterator[RawRow]:
    # As Arrow: the library's own decoding fills objects with nulls, and so hides which were meant.
    tables = dataset.with_format("arrow").iter(BATCH_ROWS)
    return arrow_rows(tables, name, f"{name}: the dataset cannot be read")


def _saved_rows(folder: Path) -> Iterator[RawRow]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises a dozen unrelated classes
        raise BadInput(
            f"{folder}: the saved dataset cannot be loaded ({one_line(error, 200)}); save it again"
        ) from None
    yield from _dataset_rows(dataset, folder.name)


def open_stream(source: Source, state: dict[str, Any] | None) -> Any:
    """Open a streaming hub dataset where its `state_dict` left off: an IterableDataset of Arrow
    tables of a row each."""
    source_files(source)  # which refuses what would not be read, and names it
    dataset = _hub_dataset(source).with_format("arrow")
    if state is not None:
        dataset.load_state_dict(state)
    return dataset


def _hub_dataset(source: Source) -> Any:
    """Load the dataset through the library's own cache, or open it if the source is streaming."""
    import datasets

    try:
        return datasets.load_dataset(
            str(source.name),
            source.config,
            data_files=list(source.data_files) or None,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
    except Exception as error:  # the library raises a dozen unrelated classes
        raise BadInput(
            f"the dataset `{source.name}` ({_shown_choice(source)}) cannot be loaded "
            f"({error_line(error, 200)}); check its name, the network and the access token, or "
            f"download it and give its files as `path`"
        ) from None


def _shown_choice(source: Source) -> str:
    """Return the keys that choose among a dataset's files, as "split `train`"."""
    given = {key: getattr(source, key) for key in ("config", "revision", "data_files")}
    chosen = {"split": source.split} | {key: value for key, value in given.items() if value}
    return ", ".join(f"{key} `{value}`" for key, value in chosen.items())
