"""Fixtures and time limits of all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# No test may depend on how busy the machine is: by default an example has 0.2 s.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Seconds for a test with its fixtures; elsewhere it is `timeout` in pyproject.toml. A fixture that
# starts ranks has a limit of its own, which ends first and shows the ranks' stacks.
LIMIT_S = {
    "numerics": 1800,
    "runs": 1800,
    "models": 1800,
    "cluster": 1800,
    "vllm": 1800,
    "gpu": 600,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        limit_s = LIMIT_S.get(item.path.parent.name)
        if limit_s and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(limit_s))


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Give the next test the environment that this one found: a launcher sets variables."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real data, tokenizers and models beside the project, or skip."""
    if not SHARED.is_dir():
        pytest.skip("the folder `shared` with real data does not lie beside the project")
    return SHARED
