"""Each change that a case makes on purpose finds what it changes: a function may have moved."""

import pytest

from tests.numerics import tiled
from tests.numerics.cases import CHANGES


# those of tiles say themselves whether a run had any
@pytest.mark.parametrize("name", sorted(CHANGES.keys() - tiled.CHANGES.keys()))
def test_a_change_finds_what_it_changes(name: str) -> None:
    with CHANGES[name]():
        pass
