"""Imports that leave out optional packages."""

import gc
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from packhorse.trainer.utils.lean_import import lean_import

ROOT = Path(__file__).resolve().parents[2]


def test_a_hidden_package_is_missing_in_the_block_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "optional_package.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with lean_import("optional_package"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("optional_package")
        assert not gc.isenabled()
    assert gc.isenabled()
    found = importlib.import_module("optional_package")
    with lean_import("optional_package"):  # what the process has already stays
        assert importlib.import_module("optional_package") is found


def test_an_engine_imports_no_tracker_and_no_compiler() -> None:
    program = (
        "import sys, packhorse.trainer.train, deepspeed.runtime.zero.muon.muon_optimizer\n"
        "print([name for name in ('mlflow', 'scipy.optimize', 'pandas', 'torch._inductor.lowering')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
