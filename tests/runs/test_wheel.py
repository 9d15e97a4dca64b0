"""The wheel trains from any folder, with all that it needs and nothing of that folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.ranks import ROOT

pytestmark = pytest.mark.runs

SOURCES = ("packhorse", "trainer", "launch", "ds_configs", "recipes", "pyproject.toml")
HOSTILE_NAMES = ("trainer", "packhorse", "xxhash", "json", "torch", "launch/__init__", "selectors")
HOSTILE = "import os; os.write(2, b'A MODULE OF THE CURRENT FOLDER WAS IMPORTED'); os._exit(9)"


def run(command: list[str], folder: Path, **environ: str) -> str:
    """Return what the command wrote to both streams, once it has ended well."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=kept | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an environment of the wheel, and of this environment's packages without packhorse."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"  # a build leaves files beside what it builds
    source.mkdir()
    for name in (*SOURCES, "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(root), "."]
    run(build, source)
    (wheel,) = root.glob("*.whl")
    shutil.rmtree(source)
    venv.create(root / "venv", symlinks=True)
    python = root / "venv" / "bin" / "python"
    run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], root)
    (site,) = (root / "venv").glob("lib/python*/site-packages")
    # a folder that a .pth names is searched, but its own .pth files, as packhorse's, do not count
    (site / "environment.pth").write_text(sysconfig.get_path("purelib"))
    return root / "venv" / "bin"


def test_the_debug_recipe_trains_in_a_folder_of_hostile_modules(
    installed: Path, tmp_path: Path
) -> None:
    for name in HOSTILE_NAMES:
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(HOSTILE)
    # a function of the user, which is found here
    (tmp_path / "mine.py").write_text("def keep(row, conversation): return True")
    changes = [
        *("train.steps=2", "eval.every_steps=null", "eval.generate=null", "data.cache=cache"),
        *("data.train.0.filters={function: mine:keep}", "data.workers=2"),
    ]
    where = "import packhorse; print(packhorse.__file__)"
    found = run([str(installed / "python"), "-c", where], installed)
    assert Path(found.strip()).is_relative_to(installed.parent)
    command = [str(installed / "packhorse"), "train", "debug", *changes, "--nproc", "2"]
    run(command, tmp_path, OMP_NUM_THREADS="1")
    summary = json.loads((tmp_path / "runs" / "debug" / "summary.json").read_text())
    assert summary["steps"] == 2
    prepare = [str(installed / "packhorse"), "prepare", "debug", *changes, "data.cache=again"]
    run(prepare, tmp_path, OMP_NUM_THREADS="1")
    run([str(installed / "packhorse"), "export", "runs/debug", "--out", "exported"], tmp_path)
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    score = [str(installed / "packhorse"), "eval", "exported", "debug", *changes, "--out", "scores"]
    run(score, tmp_path, OMP_NUM_THREADS="1")
    assert "eval_loss" in (tmp_path / "scores" / "evaluations.jsonl").read_text()
    run([str(installed / "packhorse"), "report", "runs/debug"], tmp_path)
    assert "Training loss" in (tmp_path / "report.html").read_text()
