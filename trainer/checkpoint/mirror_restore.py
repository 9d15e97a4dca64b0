"""Take a run up from its mirror: on a fresh machine, or where the mirror is ahead.

What comes down is the newest whole checkpoint, the best one, and what a resumed run reads beside
them. The checkpoints get their names last.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path

from packhorse.trainer import dist
from packhorse.trainer.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    folder_name,
    list_published,
    point_at_best,
    step_of,
)
from packhorse.trainer.checkpoint.mirror_place import RUN, RUN_FILES, Place
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.files import (
    checksum,
    publish_folder,
    replace_file,
    sync_folder,
    write_synced,
)


def bring_newest(place: Place, run_dir: Path) -> None:
    """Bring the mirror's newest whole checkpoint, if the run folder has none as new.

    It is refused to start anew beside a mirror of which no checkpoint is whole.
    """
    checkpoints = run_dir / "checkpoints"
    here = list_published(checkpoints)
    whole = place.whole_steps()
    newer = [step for step in reversed(whole) if step > max(here, default=0)]
    step = next((step for step in newer if _fetch(place, checkpoints, step)), None)
    if step is None:
        if newer and not here:
            raise BadInput(
                f"checkpoint.mirror: none of the checkpoints in {place.url} is whole; "
                "give another place to start from the beginning"
            )
        return
    best = step_of((place.read("best") or b"").decode())
    others = [best] if best in whole and best not in (step, *here) else []
    brought = [each for each in others if each is not None and _fetch(place, checkpoints, each)]
    _unpack(place, run_dir, step)
    for each in (*brought, step):
        publish_folder(_staged(checkpoints, each), checkpoints / folder_name(each))
    point_at_best(checkpoints, best)
    dist.log.info("mirror: step %d comes from %s, every byte checked", step, place.url)


def _staged(checkpoints: Path, step: int) -> Path:
    return checkpoints / f".fetching-{folder_name(step)}"


def _fetch(place: Place, checkpoints: Path, step: int) -> bool:
    """Download a checkpoint aside, and verify every byte. A later start goes on with it."""
    name, staged = folder_name(step), _staged(checkpoints, step)
    text = place.read(f"{name}/{MANIFEST}") or b""
    try:
        files = Manifest.parse(text.decode()).files
    except (ValueError, KeyError, TypeError) as error:
        dist.log.warning("mirror: skipping %s: its manifest is damaged (%s)", name, error)
        return False
    staged.mkdir(parents=True, exist_ok=True)
    _require_room(checkpoints, sum(file.bytes for file in files.values()))
    for file, facts in files.items():
        path = staged / file
        if not (path.is_file() and checksum(path) == facts.xxh3):
            if not place.fs.exists(place.path(f"{name}/{file}")):
                dist.log.warning("mirror: skipping %s: it lacks %s", name, file)
                return False
            path.unlink(missing_ok=True)  # a link would be followed
            place.fs.get_file(place.path(f"{name}/{file}"), str(path))
        if checksum(path) != facts.xxh3:
            dist.log.warning("mirror: skipping %s: %s has other bytes", name, file)
            path.unlink()
            return False
    write_synced(staged / MANIFEST, text.decode())
    return True


def _require_room(checkpoints: Path, bytes_needed: int) -> None:
    free = shutil.disk_usage(checkpoints).free
    if free < bytes_needed:
        raise BadInput(
            f"{checkpoints}: the mirror's checkpoint needs {bytes_needed / 2**30:.2f} "
            f"GiB and {free / 2**30:.2f} GiB are free there; make room and start again"
        )


def _is_run_file(name: str) -> bool:
    """Return whether a name in the archive is one of RUN_FILES, from its first letter on."""
    same_depth = (pattern for pattern in RUN_FILES if pattern.count("/") == name.count("/"))
    return ".." not in name and any(fnmatchcase(name, pattern) for pattern in same_depth)


def _unpack(place: Place, run_dir: Path, step: int) -> None:
    """Put the run's other files in place, of which each has a checksum in the archive."""
    with tempfile.TemporaryFile() as packed:
        with place.fs.open(place.path(f"{folder_name(step)}/{RUN}"), "rb") as file:
            shutil.copyfileobj(file, packed, 1 << 22)
        with zipfile.ZipFile(packed) as archive:
            # a small archive can unfold to any size; not more than this is read from it
            _require_room(run_dir, sum(entry.file_size for entry in archive.infolist()))
            for name in archive.namelist():
                if not _is_run_file(name):
                    raise BadInput(f"checkpoint.mirror: {place.url}: {RUN} holds {name}")
                (run_dir / name).parent.mkdir(exist_ok=True)
                with archive.open(name) as content, replace_file(run_dir / name, "wb") as file:
                    shutil.copyfileobj(content, file, 1 << 22)
    for name in place.names("shards"):
        path = run_dir / "shards" / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)  # a link would be followed
        place.fs.get_file(place.path(f"shards/{name}"), str(path))
    sync_folder(run_dir)
