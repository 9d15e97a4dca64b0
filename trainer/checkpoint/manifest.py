"""What a checkpoint's folder is called and holds: the manifest and the names beside it (C7)."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import xxhash
from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, with_config

from packhorse.trainer.engine.sharded_state import BESIDE, FROZEN, WEIGHT, Count, Digests, File
from packhorse.trainer.utils.files import write_synced
from packhorse.trainer.utils.lease import require_owned

MANIFEST = "manifest.json"
_FORMAT = 2
T = TypeVar("T")
_FILE_NAME = re.compile(r"rank[0-9]{5,}-[0-9]{3,}\.safetensors")


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class RunState:
    """Where a run stands. Order, learning rate and noise follow from the step, so this is all."""

    step: Count  # of the plan, applied or skipped
    updates: Count  # applied ones, which AdamW counts
    data: str  # fingerprint of the tokenized training data
    micro_batch_size: Count  # must not change where the model is random, as by dropout
    recent_losses: Sequence[FiniteFloat]  # from which the guard knows a spike
    world_size: Count  # of the run that wrote it; for people
    stage: Count  # of ZeRO; for people


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint's folder holds, and the state of the run that it belongs to."""

    state: RunState
    shapes: dict[str, list[int]]  # of trained parameters and buffers
    files: dict[str, File]
    digests: Digests
    # checksums of the files in the run folder's `model/`, which an export is made from
    description: Mapping[str, str] = field(default_factory=dict)

    @property
    def trained(self) -> set[str]:
        """The names of the trained parameters: the optimizer has states of them."""
        with_states = {name for name, state in self.digests if state not in (WEIGHT, FROZEN)}
        return {name.partition(BESIDE)[0] for name in with_states}

    def to_json(self) -> str:
        digests: dict[str, dict[str, str]] = {}
        for (name, state), value in sorted(self.digests.items()):
            digests.setdefault(name, {})[state] = f"{value:016x}"
        files = {name: asdict(file) for name, file in sorted(self.files.items())}
        content = {"format": _FORMAT, "state": asdict(self.state), "shapes": self.shapes}
        content |= {"files": files, "digests": digests}
        if self.description:
            content["description"] = dict(self.description)
        return json.dumps({**content, "xxh3": _content_checksum(content)})

    def write(self, folder: Path) -> None:
        write_synced(folder / MANIFEST, self.to_json())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a checkpoint's manifest.

        Raises:
            OSError, KeyError, TypeError or ValueError: it is absent, or not as `to_json` writes it.
        """
        path = folder / MANIFEST
        if path.exists() and not path.is_file():  # a pipe would be waited for without end
            raise ValueError(f"{MANIFEST} is no file")
        manifest = cls.parse(path.read_text(encoding="utf-8"))
        held = sum(file.bytes for file in manifest.files.values())
        for name, shape in manifest.shapes.items():
            if math.prod(shape) > held:  # memory is taken for it
                raise ValueError(f"`{name}` of shape {shape} does not fit into its files")
        return manifest

    @classmethod
    def parse(cls, text: str) -> Manifest:
        """Return the manifest that `to_json` wrote. Raises as `read` does."""
        try:
            content = json.loads(text)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']}, this version reads {_FORMAT}")
        if content.pop("xxh3") != _content_checksum(content):
            raise ValueError(f"the checksum of {MANIFEST} does not match its content")
        if unknown := content.keys() - _KEYS:
            raise ValueError(f"it holds {min(unknown)[:100]!r}, which this version does not know")
        files = _checked(_FILES, content["files"])
        for name in files:
            if not _FILE_NAME.fullmatch(name):  # as ../../x, which a mirror would write there
                raise ValueError(f"{name!r} is no name of a checkpoint's file")
        state = _checked(_STATE, content["state"])
        if state.updates > state.step:
            raise ValueError(f"it counts {state.updates} updates in {state.step} steps")
        shapes = _checked(_SHAPES, content["shapes"])
        digests = {
            (name, kind): int(value, 16)
            for name, states in _checked(_DIGESTS, content["digests"]).items()
            for kind, value in states.items()
        }
        return cls(state, shapes, files, digests, _checked(_TEXTS, content.get("description", {})))


_KEYS = {"format", "state", "shapes", "files", "digests", "description"}
# by which values are checked: pydantic's error is a ValueError
_STATE, _FILES = TypeAdapter(RunState), TypeAdapter(dict[str, File])
_SHAPES, _TEXTS = TypeAdapter(dict[str, list[Count]]), TypeAdapter(dict[str, str])
_DIGESTS = TypeAdapter(dict[str, dict[str, Annotated[str, Field(pattern="^[0-9a-f]{1,16}$")]]])


def _checked(kind: TypeAdapter[T], value: Any) -> T:
    # As JSON again: of Python's values a strict check wants lists as tuples, and objects made.
    return kind.validate_json(json.dumps(value), strict=True)


def _content_checksum(content: dict[str, Any]) -> str:
    """Return a checksum of the values, whatever the spaces between them in the file."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint's folder; None for another name, as step-000200-copy or
    step-200: two folders are never of one step."""
    found = re.fullmatch("step-([0-9]{6,18})", name.strip())
    step = int(found[1]) if found else None
    return step if step is not None and folder_name(step) == name.strip() else None


def point_at_best(root: Path, step: int | None) -> None:
    """Let `best` name the checkpoint of the best step, if that exists. Rank 0 calls it."""
    if step is not None and (root / folder_name(step)).is_dir():
        write_synced(root / "best", folder_name(step))
    else:
        (root / "best").unlink(missing_ok=True)


def read_best(root: Path) -> int | None:
    """Return the step that `best` names, or None if there is none."""
    path = root / "best"
    return step_of(path.read_text(errors="replace")) if path.is_file() else None


def list_published(root: Path) -> dict[int, Path]:
    """Return the checkpoints by step, without what a user put there."""
    found = ((step_of(path.name), path) for path in root.glob("step-*"))
    return dict(sorted((step, path) for step, path in found if step is not None))


def superseded(steps: Iterable[int], newest: int, best: int | None, keep: int) -> list[int]:
    """Return the steps, in order, before the last `keep` up to step `newest`, but the best one.

    Newer ones are damaged, since the run was resumed from an older one. They do not count among the
    kept ones, and stay until their step comes again.
    """
    return [step for step in steps if step <= newest and step != best][:-keep]


def prune(
    root: Path, newest: int, best: int | None, keep: int, spared: Collection[int] = ()
) -> None:
    """Delete the checkpoints that are superseded, but those that are spared."""
    published = list_published(root)
    for step in superseded(published, newest, best, keep):
        if step not in spared:
            remove(published[step])


def remove(folder: Path) -> None:
    """Delete a checkpoint, renamed first so that a part of it never stands under its name."""
    aside = folder.with_name(f".removing-{folder.name}")
    require_owned(folder)
    folder.rename(aside)
    delete(aside)


def delete(path: Path) -> None:
    """Delete a folder; of a link to one, which a user has moved to another disk, the link alone."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)
