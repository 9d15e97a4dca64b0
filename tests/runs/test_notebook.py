"""The notebook docs/python.ipynb runs from its first cell to its last."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT

pytestmark = pytest.mark.runs

NOTEBOOK = ROOT / "docs" / "python.ipynb"
# The cells' effects, as a reader sees them.
SEEN = """
losses = list(result.losses.values())
assert result.done and len(losses) == 18 and losses[-1] < 0.6 * losses[0]
assert list(result.evaluations) == [0, 10, 18]
assert (model / "model.safetensors").is_file()
"""


def test_the_cells_run_in_order(tmp_path: Path) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*sources, SEEN])],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "`optim.learning_rate` is `optim.lr` here" in done.stdout
    assert "step 18/18" in done.stderr
