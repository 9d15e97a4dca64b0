"""Record what the routers of a mixture of experts say in a forward, layer by layer.

In: a transformers model with experts. Out: for each router the scores of all experts, and, where
its code hands them out, which experts it chose and with what weights: (scores, weights, choices) is
what most of transformers' routers return. Their scores alone do not tell the choice: a bias or
groups of experts may count in it.

Shapes: T tokens, E experts, k chosen ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn


class Routed(NamedTuple):
    """What a router says of tokens, (T, E), (T, k) and (T, k); only scores where its code does not
    hand out its choice.
    """

    scores: torch.Tensor
    weights: torch.Tensor | None = None
    chosen: torch.Tensor | None = None


class RouterRecords:
    """The routers of a model, which transformers names in `_can_record_outputs`."""

    def __init__(self, model: nn.Module) -> None:
        self._calls: dict[nn.Module, list[Routed]] | None = None  # while it records
        kinds: dict[type, int] = {}  # class -> the place of the scores in what it returns
        for module in model.modules():
            recorded = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
            for kind in recorded if isinstance(recorded, list) else [recorded]:
                if kind is not None:
                    kinds[getattr(kind, "target_class", kind)] = getattr(kind, "index", 1)
        # a model's code may know routers that this configuration builds none of
        self.routers = [m for m in model.modules() if isinstance(m, tuple(kinds))]
        for router in self.routers:
            place = next(place for kind, place in kinds.items() if isinstance(router, kind))
            router.register_forward_hook(
                lambda module, _, out, place=place: self._add(module, out, place)
            )

    @contextmanager
    def recording(self) -> Iterator[list[Routed]]:
        """Record the forward inside the block, not those of a backward that recomputes layers.

        Yields:
            What is there after the block: for each router that ran, in order, what it said in all
            its calls. A model that runs document by document calls it for each of them.
        """
        seen: list[Routed] = []
        self._calls = {}
        try:
            yield seen
            for calls in self._calls.values():
                scores, weights, chosen = zip(*calls, strict=True)
                seen.append(Routed(torch.cat(scores), _joined(weights), _joined(chosen)))
        finally:
            self._calls = None

    def _add(self, router: nn.Module, out: Any, place: int) -> None:
        if self._calls is None:
            return
        parts = out if isinstance(out, tuple) else (out,)
        scores = parts[place if isinstance(out, tuple) else 0]
        if scores is None:  # as of a dense layer that is of the same class
            return
        if scores.dim() == 3 and scores.shape[0] == 1:
            scores = scores[0]
        tokens, weights = len(scores), None
        chosen = next((x for x in parts if _is_choice(x, tokens)), None)
        if chosen is not None:
            chosen = chosen.reshape(tokens, -1)
            others = [x for i, x in enumerate(parts) if i != place and isinstance(x, torch.Tensor)]
            same = [x for x in others if x.is_floating_point() and x.numel() == chosen.numel()]
            weights = same[0].detach().reshape(tokens, -1) if same else None
        self._calls.setdefault(router, []).append(Routed(scores, weights, chosen))


def _joined(parts: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if len(there) == len(parts) else None


def _is_choice(part: Any, tokens: int) -> bool:
    """Return whether a part of a router's output is k whole numbers for each token."""
    return (
        isinstance(part, torch.Tensor)
        and not (part.is_floating_point() or part.dtype == torch.bool)
        and part.dim() > 1
        and part.numel() % tokens == 0
    )
