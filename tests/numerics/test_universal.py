"""DeepSpeed's own universal load, in another program, finds the tensors of the checkpoint (C8)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from packhorse.trainer.checkpoint import checkpoint
from packhorse.trainer.checkpoint.universal import export_universal
from packhorse.trainer.datatypes import BadInput
from tests.numerics.compare import case
from tests.ranks import ROOT, run_ranks

pytestmark = pytest.mark.runs


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Take three steps at ZeRO-3 on two ranks."""
    root = tmp_path_factory.mktemp("universal")
    path = root / "cases.json"
    path.write_text(json.dumps([case(root, "run", "zero3", stop_after=3)]))
    run_ranks(2, ["-m", "tests.numerics.cases", str(path)])
    return root / "run"


@pytest.mark.parametrize(("stage", "world"), [("1", 1), ("2", 3), ("3", 1), ("3", 3)])
def test_the_twin_finds_the_same_tensors(
    run_dir: Path, tmp_path: Path, stage: str, world: int
) -> None:
    folder = export_universal(run_dir, tmp_path / "universal")
    model, out = ROOT / "recipes" / "debug" / "model", tmp_path / "digests.json"
    run_ranks(
        world, ["-m", "tests.numerics.universal_twin", str(model), str(folder), stage, str(out)]
    )
    seen = json.loads(out.read_text())
    found = checkpoint.find(run_dir)
    assert found
    assert {tuple(key.split("\t")): value for key, value in seen["digests"].items()} == found[
        1
    ].digests
    assert seen["decays"] == [0.01, 0.0], "the load changed the hyperparameters of a group"


def test_a_folder_in_the_way_is_left_alone(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(BadInput, match="packhorse export did not write it"):
        export_universal(run_dir, tmp_path)
