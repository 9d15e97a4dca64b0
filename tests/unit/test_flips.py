"""A bit that flips on the disk is found by the file's name, or changes nothing that is read.

`make chaos FLIPS=10000` tries many more of them. Lines of a run's logs carry no checksum: a digit
that flips in metrics.jsonl is another number.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packhorse.trainer import dist
from packhorse.trainer.checkpoint import checkpoint
from packhorse.trainer.checkpoint.export_folder import (
    MODEL_FOLDER,
    describe,
    require_described,
    run_recipe,
)
from packhorse.trainer.checkpoint.manifest import Manifest
from packhorse.trainer.checkpoint.saver import Saver
from packhorse.trainer.config.recipe import CheckpointSection, load_recipe
from packhorse.trainer.data.documents import FILES
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils import own_output
from packhorse.trainer.utils.download import local_folder
from tests.ranks import ROOT
from tests.unit import test_cache, test_checkpoint

FLIPS = int(os.environ.get("PACKHORSE_FLIPS", "200"))  # of each kind
Log = pytest.LogCaptureFixture


def flip(folder: Path, read: Callable[[], Any], log: Log) -> int:
    """Flip a bit of a random file, read, and flip it back, many times; return how many were named,
    the others having changed nothing."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    draw, whole, named = random.Random(FLIPS), read(), 0
    for number in range(FLIPS):
        path = files[number % len(files)]
        text = bytearray(path.read_bytes())
        at, bit = draw.randrange(len(text)), 1 << draw.randrange(8)
        text[at] ^= bit
        path.write_bytes(text)
        log.clear()
        where = f"bit {bit} of byte {at} of {path}"
        try:
            assert read() == whole or log.text, f"read without a word: {where}"
            said = log.text
        except BadInput as error:
            said = str(error)
        assert not said or folder.name in said, f"{where}: {said}"
        named += bool(said)
        text[at] ^= bit
        path.write_bytes(text)
    assert read() == whole
    return named


@pytest.fixture(autouse=True)
def logs_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist.log, "propagate", True)


def test_of_a_checkpoint(tmp_path: Path, caplog: Log) -> None:
    test_checkpoint.publish(tmp_path, 1, 2, keep=2, asynchronous=False)

    def read() -> Any:
        folder, manifest = checkpoint.find(tmp_path) or (Path(), None)
        return manifest, [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]

    assert flip(tmp_path / "checkpoints" / "step-000002", read, caplog) > 0.9 * FLIPS


def test_of_a_cache(tmp_path: Path, caplog: Log) -> None:
    rows = test_cache.rows(30, {3: "odd"})

    def read() -> Any:
        documents = test_cache.made(tmp_path / "cache", rows)
        names = sorted(FILES.values())
        return documents.report, [(documents.folder / name).read_bytes() for name in names]

    read()
    assert flip(tmp_path / "cache", read, caplog) > 0.5 * FLIPS


def test_of_what_an_export_takes_from_a_run_folder(tmp_path: Path, caplog: Log) -> None:
    run = tmp_path / "run"
    (run / MODEL_FOLDER).mkdir(parents=True)
    (run / MODEL_FOLDER / "config.json").write_text('{"rope_theta": 10000.0}')
    text = (ROOT / "recipes" / "debug.yaml").read_text() + "adapter: {rank: 4, alpha: 16}\n"
    (run / "recipe.yaml").write_text(text)
    recipe = load_recipe(run / "recipe.yaml")
    described = describe(run, recipe)
    model: Any = test_checkpoint.Model()
    with Saver(run, model, CheckpointSection(asynchronous=False), None, described) as saver:
        saver.save(test_checkpoint.state(1))
    manifest = Manifest.read(run / "checkpoints" / "step-000001")
    (run / "checkpoints").rename(tmp_path / "checkpoints")  # the first test is about these

    def read() -> Any:
        recipe = run_recipe(run)
        require_described(run, recipe, manifest)
        return recipe.adapter, recipe.model.dtype, describe(run, recipe)

    assert flip(run, read, caplog) > 0.5 * FLIPS


def test_of_an_export(tmp_path: Path, caplog: Log) -> None:
    out = tmp_path / "export"
    folder = own_output.stage(out)
    folder.mkdir()
    (folder / "config.json").write_text('{"rope_theta": 10000.0}')
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(5000))
    own_output.publish(out, {"kind": "model", "step": 3, "run": "mine"}, overwrite=False)

    def read() -> Any:
        own_output.require_unchanged(out)
        return [(out / name).read_bytes() for name in ("config.json", "model.safetensors")]

    assert flip(out, read, caplog) > 0.6 * FLIPS
    (out / "model.safetensors").write_bytes(b"x" * 5000)
    assert local_folder(str(out), "model.name") == out  # as for its tokenizer
    with pytest.raises(BadInput, match=r"model\.safetensors holds other bytes than .* exported"):
        local_folder(str(out), "model.name", weights=True)
