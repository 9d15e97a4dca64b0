"""Give each document the rotary table that it has alone.

Some tables depend on the longest position of the forward: longrope (Phi 3.5, Phi 4 mini) takes
other frequencies beyond the original context length, dynamic NTK stretches them by the length.
In a packed sequence the longest document would choose the table of all, and a table that was
stretched once would stay so. Here each document's table is made anew from its own positions. On a
rank that has a part of a document (C13), it is that of the whole document's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from packhorse.trainer.model.attention import current_bounds

# Kinds of tables that depend on the longest position. The packing check crosses the lengths that a
# configuration names, and so refuses a kind that is missing here.
_BY_LENGTH = ("dynamic", "longrope")


def rope_types(config: Any) -> set[str]:
    """Return the kinds of rotary tables in a model's configuration, which may name one a layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return {str(part["rope_type"]) for part in parts if part.get("rope_type")}


def stretches(config: Any) -> bool:
    """Return whether the table changes beyond `max_position_embeddings`, as dynamic NTK's does."""
    return any("dynamic" in kind for kind in rope_types(config))


def make_tables_by_document(model: Any) -> None:
    """Make every rotary module of the model compute its table for each document by itself.

    Tables that depend on each position alone stay as they are.
    """
    kinds = rope_types(model.config.get_text_config())
    if not any(word in kind for kind in kinds for word in _BY_LENGTH):
        return
    for module in model.modules():
        # a second call finds the instance's own forward
        if "rotary" in type(module).__name__.lower() and "forward" not in vars(module):
            module.forward = _by_document(module, module.forward)


def _by_document(module: nn.Module, table: Callable[..., Any]) -> Callable[..., Any]:
    def forward(x: torch.Tensor, position_ids: torch.Tensor, *rest: Any, **named: Any) -> Any:
        rows = []
        for row in position_ids:
            pieces = []
            for part, length in _parts(row):
                _forget_length(module)
                # the document's last position stands behind the part's own
                given = torch.cat([part, part.new_full((1,), length - 1)])
                made = table(x, given.unsqueeze(0), *rest, **named)  # a tensor, or (cos, sin)
                pieces.append(tree_map(lambda whole: whole[:, :-1], made))
            rows.append(tree_map(lambda *parts: torch.cat(parts, dim=1), *pieces))
        return tree_map(lambda *parts: torch.cat(parts), *rows)

    return forward


def _parts(positions: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """Return the positions of each part of a document in a row, (T,), and the document's length.

    Without a batch, as in generation, a document begins where positions restart at zero.
    """
    bounds = current_bounds(len(positions))
    if bounds:
        numbers, lengths = zip(*bounds.own_parts, strict=True)
        return zip(positions.split(numbers), lengths, strict=True)
    starts = (positions == 0).nonzero().flatten().tolist()
    cuts = pairwise(sorted({0, *starts, len(positions)}))
    return ((positions[start:end], end - start) for start, end in cuts)


def _forget_length(module: Any) -> None:
    """Undo what an earlier, longer document did to a table that is stretched (dynamic NTK)."""
    for name in [*module._buffers, *vars(module)]:
        if name.endswith("original_inv_freq"):
            prefix = name.removesuffix("original_inv_freq")
            # a copy: longrope writes into the table in place
            setattr(module, f"{prefix}inv_freq", getattr(module, name).clone())
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
