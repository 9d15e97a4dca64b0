"""Fixtures of all tests."""

import os
import sys
from pathlib import Path

import pytest

# DeepSpeed compiles its CPU ops on first use, from this environment's sources: builds of two
# environments in one folder would undo each other.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, tokenizers and models that lies beside the project."""
    if not SHARED.is_dir():
        pytest.skip("the folder `shared` with real data does not lie beside the project")
    return SHARED
