"""Take a run up from its mirror: on a fresh machine, or where the mirror is ahead.

What comes down is the newest whole checkpoint, the best one, and what a resumed run reads beside
them. The checkpoints get their names last.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path

from packhorse.trainer import dist
from packhorse.trainer.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    folder_name,
    list_published,
    point_at_best,
)
from packhorse.trainer.checkpoint.mirror_place import RUN, RUN_FILES, Place
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.files import checksum, publish_folder, sync_folder, write_synced


class Restore:
    """Brings checkpoints of a mirror into a run folder."""

    def __init__(self, place: Place, run_dir: Path) -> None:
        self._place, self._run_dir = place, run_dir
        self._checkpoints = run_dir / "checkpoints"

    def bring_newest(self) -> None:
        """Bring the mirror's newest whole checkpoint, if the run folder has none as new.

        It is refused to start anew beside a mirror of which no checkpoint is whole.
        """
        here = list_published(self._checkpoints)
        whole = self._place.whole_steps()
        newer = [step for step in reversed(whole) if step > max(here, default=0)]
        step = next((step for step in newer if self._fetch(step)), None)
        if step is None:
            if newer and not here:
                raise BadInput(
                    f"checkpoint.mirror: none of the checkpoints in {self._place.url} is whole; "
                    "give another place to start from the beginning"
                )
            return
        name = (self._place.read("best") or b"").decode().removeprefix("step-")
        best = int(name) if name.isdigit() else None
        others = [best] if best in whole and best not in (step, *here) else []
        brought = [each for each in others if each is not None and self._fetch(each)]
        self._unpack(step)
        for each in (*brought, step):
            publish_folder(self._staged(each), self._checkpoints / folder_name(each))
        point_at_best(self._checkpoints, best)
        dist.log.info("mirror: step %d comes from %s, every byte checked", step, self._place.url)

    def _staged(self, step: int) -> Path:
        return self._checkpoints / f".fetching-{folder_name(step)}"

    def _fetch(self, step: int) -> bool:
        """Download a checkpoint aside, and verify every byte. A later start goes on with it."""
        name, staged = folder_name(step), self._staged(step)
        text = self._place.read(f"{name}/{MANIFEST}") or b""
        try:
            files = Manifest.parse(text.decode()).files
        except (ValueError, KeyError, TypeError) as error:
            dist.log.warning("mirror: skipping %s: its manifest is damaged (%s)", name, error)
            return False
        staged.mkdir(parents=True, exist_ok=True)
        self._require_room(sum(file.bytes for file in files.values()))
        for file, facts in files.items():
            path = staged / file
            if not (path.is_file() and checksum(path) == facts.xxh3):
                if not self._place.fs.exists(self._place.path(f"{name}/{file}")):
                    dist.log.warning("mirror: skipping %s: it lacks %s", name, file)
                    return False
                self._place.fs.get_file(self._place.path(f"{name}/{file}"), str(path))
            if checksum(path) != facts.xxh3:
                dist.log.warning("mirror: skipping %s: %s has other bytes", name, file)
                path.unlink()
                return False
        write_synced(staged / MANIFEST, text.decode())
        return True

    def _require_room(self, bytes_needed: int) -> None:
        free = shutil.disk_usage(self._checkpoints).free
        if free < bytes_needed:
            raise BadInput(
                f"{self._checkpoints}: the mirror's checkpoint needs {bytes_needed / 2**30:.2f} "
                f"GiB and {free / 2**30:.2f} GiB are free there; make room and start again"
            )

    def _unpack(self, step: int) -> None:
        """Put the run's other files in place, of which each has a checksum in the archive."""
        with tempfile.TemporaryFile() as packed:
            with self._place.fs.open(self._place.path(f"{folder_name(step)}/{RUN}"), "rb") as file:
                shutil.copyfileobj(file, packed, 1 << 22)
            with zipfile.ZipFile(packed) as archive:
                for name in archive.namelist():
                    if not any(Path(name).match(pattern) for pattern in RUN_FILES):
                        raise BadInput(f"checkpoint.mirror: {self._place.url}: {RUN} holds {name}")
                    aside = self._run_dir / f".{Path(name).name}.new"
                    aside.write_bytes(archive.read(name))
                    (self._run_dir / name).parent.mkdir(exist_ok=True)
                    aside.replace(self._run_dir / name)
        for path in self._place.names("shards"):
            (self._run_dir / "shards").mkdir(exist_ok=True)
            self._place.fs.get_file(
                self._place.path(f"shards/{path}"), str(self._run_dir / "shards" / path)
            )
        sync_folder(self._run_dir)
