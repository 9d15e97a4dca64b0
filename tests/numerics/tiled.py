"""Changes for tests/numerics/cases.py: feed-forward blocks in tiles of the debug model's size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from packhorse.trainer.model import decoder, feed_forward_tiles

TOKENS = 64  # of a tile, which is the model's hidden size


@contextmanager
def in_tiles() -> Iterator[None]:
    """Run blocks in tiles from two tiles on, and require that some ran so."""
    tiles = feed_forward_tiles._Tiles
    with (
        mock.patch.object(feed_forward_tiles, "FEWEST_TOKENS", TOKENS),
        mock.patch.object(feed_forward_tiles, "FEWEST_TILES", 2),
        mock.patch.object(tiles, "apply", wraps=tiles.apply) as ran,
    ):
        yield
    assert ran.call_count


@contextmanager
def in_tiles_of_large_layers() -> Iterator[None]:
    """Take layers for too large to be gathered at once, and require that ZeRO-3 gathers a block
    and never a product of it, as it would once a tile.
    """
    fetch, gathered = PartitionedParameterCoordinator.fetch_sub_module, set()

    def seen(self: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        gathered.add(module)
        return fetch(self, module, *args, **kwargs)

    with (
        mock.patch.object(decoder, "WHOLE_LAYER", 0),
        mock.patch.object(PartitionedParameterCoordinator, "fetch_sub_module", seen),
        in_tiles(),
    ):
        yield
    blocks = [module for module in gathered if hasattr(module, "down_proj")]
    inside = {part for block in blocks for part in block.modules() if part is not block}
    assert blocks
    assert not inside & gathered


CHANGES = {f.__name__: f for f in (in_tiles, in_tiles_of_large_layers)}
