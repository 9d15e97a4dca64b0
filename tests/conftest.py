"""Fixtures of all tests."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, tokenizers and models that lies beside the project."""
    if not SHARED.is_dir():
        pytest.skip("the folder `shared` with real data does not lie beside the project")
    return SHARED
