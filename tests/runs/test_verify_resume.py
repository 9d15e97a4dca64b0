"""`packhorse verify-resume` proves that a resume is exact, and reports differences."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from packhorse.trainer.checkpoint.verify_resume import Differences, _compare_change
from tests.ranks import ROOT

pytestmark = pytest.mark.runs


def test_the_debug_recipe_with_an_adapter_survives_a_change_of_worlds(tmp_path: Path) -> None:
    """Its rows are held out by groups, which the comparison has no use for."""
    recipe = yaml.safe_load((ROOT / "recipes" / "debug.yaml").read_text("utf-8"))
    recipe["data"] |= {"eval_fraction": 0.1}
    recipe["data"]["train"][0] |= {"group_by": "question"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    options = [
        "--worlds",
        "2,1",
        "--at",
        "2",
        "--steps",
        "4",
        "--sequence=2,1",
        f"run.dir={tmp_path / 'run'}",
        "adapter={rank: 4}",
    ]
    command = [
        sys.executable,
        "-m",
        "packhorse",
        "verify-resume",
        str(tmp_path / "recipe.yaml"),
        *options,
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming changes nothing" in done.stdout
    assert (
        "the control, whose first moments were lost at the first break, was noticed" in done.stdout
    )
    assert not list(tmp_path.glob("verify-resume.*")), "nothing is left"


@pytest.mark.parametrize(
    ("seen", "agree", "noticed"),
    [
        (Differences(rows=0, groups=0, loss=1e-7, norm=1e-7, change=1e-5), True, False),
        (Differences(rows=1, groups=0, loss=0, norm=0, change=0), False, False),
        (Differences(rows=0, groups=1, loss=0, norm=0, change=0), False, False),
        (Differences(rows=0, groups=0, loss=2e-6, norm=0, change=0), False, False),
        (Differences(rows=0, groups=0, loss=0, norm=0, change=2e-3), False, True),
        (Differences(rows=0, groups=0, loss=float("nan"), norm=0, change=0), False, True),
    ],
)
def test_a_verdict_follows_from_the_bounds(seen: Differences, agree: bool, noticed: bool) -> None:
    assert (seen.agree, seen.are_seen) == (agree, noticed)


def test_a_tensor_that_neither_run_changed_agrees() -> None:
    start = torch.ones(3)
    saved: list[Any] = [
        SimpleNamespace(names=["w"], whole=lambda _, change=change: start + change)
        for change in (0.0, 1.0)
    ]
    assert _compare_change(saved[0], saved[0], "w", start) == 0
    assert _compare_change(saved[1], saved[1], "w", start) == 0
    assert _compare_change(saved[1], saved[0], "w", start) == 1
