"""Runs that are made to fail and start again: what their tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs.killed import ForkServer, Run


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    with ForkServer() as opened:
        yield opened


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def whole(
    fork_server: ForkServer, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """Runs that were never killed, by world size."""
    runs = {
        world: Run(fork_server, tmp_path_factory.mktemp(f"whole-{world}"), cache) for world in (1, 2)
    }
    for world, run in runs.items():
        run.finish(world)
    return {world: run.folder for world, run in runs.items()}


@pytest.fixture
def run(fork_server: ForkServer, cache: Path, tmp_path: Path) -> Run:
    return Run(fork_server, tmp_path, cache)
