"""Take from files what was not fsynced, as a power cut does. tests/faults.cpp keeps the journal."""

from __future__ import annotations

import os
from pathlib import Path


def sizes(run_dir: Path) -> dict[str, int]:
    """Return the size of each file of a run and its cache."""
    folders = run_dir.parent.glob(f"{run_dir.name}*")
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {str(path): path.stat().st_size for path in files}


def drop_unsynced(run_dir: Path, before: dict[str, int], journal: Path) -> None:
    """Cut each file to what was on the disk at the start, or fsynced since: what a power cut may
    leave, as renames are kept.

    Args:
        before: the sizes at the start.
        journal: see tests/faults.cpp. It is removed.
    """
    synced = dict(before)
    for line in journal.read_text().splitlines() if journal.exists() else ():
        first, *rest = line.split("\t")
        if first == "rename":
            source, target = rest
            moved = {path: size for path, size in synced.items() if is_in(path, source)}
            kept = {p: size for p, size in synced.items() if not is_in(p, source, target)}
            synced = kept | {target + p.removeprefix(source): size for p, size in moved.items()}
        else:
            synced[rest[0]] = int(first)
    for path, size in sizes(run_dir).items():
        if size > synced.get(path, 0):
            os.truncate(path, synced.get(path, 0))
    journal.unlink(missing_ok=True)


def is_in(path: str, *places: str) -> bool:
    return any(f"{path}/".startswith(f"{place}/") for place in places)
