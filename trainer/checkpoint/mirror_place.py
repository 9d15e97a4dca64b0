"""The place of a mirror: what lies there, by name, and which checkpoints are whole.

MIRROR (checkpoint.mirror: s3://bucket/runs/one)
  recipe.yaml                     says that the place is a run's; first to come
  shards/                         rows taken from a stream (data/streaming.py)
  best                            the name of the best checkpoint
  step-000200/
    rank00000-000.safetensors     as in the run folder
    run.zip                       metrics, evaluations and all else that a resumed run reads
    manifest.json                 last to come: without it the checkpoint is not there
"""

from __future__ import annotations

from packhorse.trainer.checkpoint.manifest import MANIFEST, step_of
from packhorse.trainer.utils.remote import open_filesystem

# What a resumed run reads beside the checkpoint, so that it goes on as if never stopped. The recipe
# comes first: it makes a folder a run's.
RUN_FILES = (
    *("recipe.yaml", "metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "trace.jsonl"),
    *("skipped_steps.jsonl", "shards.jsonl", "best.json", "summary.json", "trackers.json"),
    "attention.json",
    "tensorboard/*",
)
RUN = "run.zip"


class Place:
    """A folder of an object store. Every method but `path` may raise whatever its library does."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fs, self._root = open_filesystem(url)

    def path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def names(self, folder: str = "") -> list[str]:
        try:
            found = self.fs.ls(self.path(folder).rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def whole_steps(self) -> list[int]:
        """Return the steps whose copies have come to their end, in order."""
        steps = {name: step for name in self.names() if (step := step_of(name)) is not None}
        there = (name for name in steps if self.fs.exists(self.path(f"{name}/{MANIFEST}")))
        return sorted(steps[name] for name in there)

    def read(self, name: str) -> bytes | None:
        try:
            return self.fs.cat_file(self.path(name))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Replace a small file at once."""
        with self.fs.transaction:
            self.fs.pipe_file(self.path(name), content)

    def remove(self, name: str) -> None:
        if self.fs.exists(self.path(name)):
            # its manifest first: what is left of it must not be taken for whole
            if self.fs.exists(self.path(f"{name}/{MANIFEST}")):
                self.fs.rm_file(self.path(f"{name}/{MANIFEST}"))
            self.fs.rm(self.path(name), recursive=True)
