"""Copy checkpoints to another place, beside training (checkpoint.mirror).

Rank 0 copies, in a thread. Training never waits for it: a checkpoint that is published while an
earlier one is still copied takes its turn afterwards, and only the newest of several does. A copy
that fails is tried again with the next checkpoint, and at the end of the run.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
import zipfile
from pathlib import Path

from packhorse.trainer import dist
from packhorse.trainer.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    folder_name,
    prune,
    read_best,
    step_of,
    superseded,
)
from packhorse.trainer.checkpoint.mirror_place import RUN, RUN_FILES, Place
from packhorse.trainer.checkpoint.mirror_restore import bring_newest
from packhorse.trainer.config.recipe import Recipe, load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.lease import require_owned
from packhorse.trainer.utils.text import error_line

_ATTEMPTS, _PAUSE_S = 3, 5.0  # of the copy that the end of the run waits for


class Mirror:
    """Copies the checkpoints of a run folder. Only rank 0 has one."""

    def __init__(self, place: Place, run_dir: Path, recipe: Recipe) -> None:
        self._place, self._run_dir, self._keep = place, run_dir, recipe.checkpoint.keep
        self._checkpoints = run_dir / "checkpoints"
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wanted: int | None = None  # the step to copy next
        self._busy: int | None = None  # the step that is copied
        self._last: int | None = None  # the step that was offered last
        self._failure: str | None = None  # of the last copy

    # ---------------------------------------------------------------------------------------- copy

    def in_use(self) -> set[int]:
        """Return the steps whose checkpoints must stay: they are being copied, or will be."""
        with self._lock:
            return {step for step in (self._busy, self._wanted) if step is not None}

    def offer(self, step: int) -> None:
        """Copy the published checkpoint of a step, and the best one, in the background."""
        with self._lock:
            self._wanted = self._last = step
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._busy, self._wanted = self._wanted, None
                if self._busy is None:
                    self._thread = None
                    return
            self._failure = self._try(self._busy)
            if self._failure:
                dist.log.warning(
                    "mirror: step %d could not be copied to %s (%s); the next checkpoint tries "
                    "again",
                    *(self._busy, self._place.url, self._failure),
                )

    def finish(self, *, is_done: bool) -> None:
        """Wait for the last copy. A run that is done adds its results to it.

        Raises:
            BadInput: the run is done, and its last checkpoint is not in the mirror.
        """
        thread = self._thread
        if thread is not None:
            dist.log.info("mirror: waiting for the last copy to %s", self._place.url)
            thread.join()
        if self._last is None:
            return
        for attempt in range(_ATTEMPTS):
            if self._failure:
                time.sleep(_PAUSE_S * attempt)
            if self._failure or is_done:
                self._failure = self._try(self._last, results=is_done)
            if not self._failure:
                break
        prune(self._checkpoints, self._last, read_best(self._checkpoints), self._keep)
        if self._failure and is_done:
            raise BadInput(
                f"checkpoint.mirror: the run is done and whole in {self._run_dir}, but was not "
                f"copied to {self._place.url} ({self._failure}); run the same command again, which "
                "copies it"
            )

    def _try(self, step: int, *, results: bool = False) -> str | None:
        """Copy what the mirror lacks; return why that failed, or None."""
        begun = time.monotonic()
        best = read_best(self._checkpoints)
        try:
            for each in dict.fromkeys((step, best)):
                if each is not None and self._copy(each):
                    took_s = time.monotonic() - begun
                    dist.log.info("mirror: step %d is in %s, %.1f s", each, self._place.url, took_s)
            if results:
                self._put_run_files(folder_name(step))
            self._place.write("best", folder_name(best).encode() if best is not None else b"")
            self._prune(step, best)
        except Exception as error:  # each store's library raises classes of its own
            return error_line(error, 300)
        return None

    def _copy(self, step: int) -> bool:
        """Copy a checkpoint, its manifest last; return False if it is there already."""
        local, name = self._checkpoints / folder_name(step), folder_name(step)
        text = (local / MANIFEST).read_bytes()
        require_owned(local)
        if self._place.read(f"{name}/{MANIFEST}") == text:
            return False
        self._place.remove(name)
        files = Manifest.parse(text.decode()).files
        for file, facts in files.items():
            self._place.fs.put_file(str(local / file), self._place.path(f"{name}/{file}"))
            if self._place.fs.size(self._place.path(f"{name}/{file}")) != facts.bytes:
                raise OSError(f"{file} arrived with another size")
        self._put_run_files(name)
        require_owned(local)
        self._place.write(f"{name}/{MANIFEST}", text)
        return True

    def _put_run_files(self, name: str) -> None:
        with tempfile.TemporaryFile() as packed:
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
                for pattern in RUN_FILES:
                    for path in sorted(self._run_dir.glob(pattern)):
                        archive.write(path, path.relative_to(self._run_dir))
            # after shards.jsonl was read, which names them
            fs = self._place.fs
            for path in sorted((self._run_dir / "shards").glob("*.jsonl")):
                there = self._place.path(f"shards/{path.name}")
                if not fs.exists(there) or fs.size(there) != path.stat().st_size:
                    fs.put_file(str(path), there)
            packed.seek(0)
            with fs.transaction, fs.open(self._place.path(f"{name}/{RUN}"), "wb") as file:
                shutil.copyfileobj(packed, file, 1 << 22)

    def _prune(self, step: int, best: int | None) -> None:
        """Remove older checkpoints by the rule of the run folder, and copies without an end."""
        whole = self._place.whole_steps()
        kept = set(whole) - set(superseded(whole, step, best, self._keep))
        for name in set(self._place.names()) - set(map(folder_name, kept)):
            if step_of(name) is not None:  # and not what a user has put or renamed there
                self._place.remove(name)


def open_mirror(recipe: Recipe, run_dir: Path) -> Mirror | None:
    """Open the recipe's mirror, if it has one, and take a newer checkpoint from there.

    Rank 0 calls it before it opens the run folder.

    Raises:
        BadInput: the place cannot be reached, holds something else than this run, or has no whole
            checkpoint where the run folder has none either.
    """
    if recipe.checkpoint.mirror is None:
        return None
    place = Place(recipe.checkpoint.mirror)
    _require_elsewhere(place, run_dir)
    dist.log.info("mirror: looking for newer checkpoints in %s", place.url)  # which may not answer
    try:
        _require_own(place, recipe)
        bring_newest(place, run_dir)
    except BadInput:
        raise
    except Exception as error:  # each store's library raises classes of its own
        raise BadInput(
            f"checkpoint.mirror: {place.url} cannot be used ({error_line(error, 300)}); check the "
            "place and the credentials in the environment, and start again"
        ) from None
    return Mirror(place, run_dir, recipe)


def _require_elsewhere(place: Place, run_dir: Path) -> None:
    """Refuse a place that goes with the run folder, or with this process."""
    protocols = {place.fs.protocol} if isinstance(place.fs.protocol, str) else {*place.fs.protocol}
    within = Path(place.path("")).resolve().is_relative_to(run_dir.resolve())
    if "memory" in protocols or ("file" in protocols and within):
        raise BadInput(
            f"checkpoint.mirror: {place.url} is lost together with run.dir; give another place"
        )


def _require_own(place: Place, recipe: Recipe) -> None:
    """Refuse a place that holds anything but checkpoints of this recipe's run."""
    saved, steps = place.read("recipe.yaml"), place.whole_steps()
    if saved is None and place.names():
        raise BadInput(
            f"checkpoint.mirror: {place.url} holds files that no run has copied there; give "
            "another place"
        )
    if saved is None or not steps:  # without a checkpoint the recipe may change
        place.write("recipe.yaml", recipe.to_yaml().encode())
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(saved)
        before, now = load_recipe(path).fixed(), recipe.fixed()
    lengths = ("train.epochs", "train.steps")  # which the run folder compares
    changed = [key for key in now if now[key] != before.get(key) and key not in lengths]
    if changed:
        raise BadInput(
            f"checkpoint.mirror: {place.url} holds a run of another recipe, which differs in "
            f"{', '.join(changed)}; give another place"
        )
