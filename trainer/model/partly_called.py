"""Find the parts of a model that do not call all of their modules for every token.

In: a loaded model, in shards or not. Out: its blocks with a list of modules of which the data
choose, as a mixture whose experts are a list. What that asks of the engine is in
trainer/engine/missing_gradients.py. transformers' own experts are one parameter, which every token
reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from packhorse.trainer.model.decoder import decoder_layers
from packhorse.trainer.model.lora import Gathered
from packhorse.trainer.model.reach import gathered_where_used


@torch.no_grad()
def partly_called_blocks(
    model: Any, forward: Callable[[], Any], gathered: Gathered
) -> list[nn.Module]:
    """Return the innermost modules that called a part of a list of theirs. Every rank calls it.

    Args:
        forward: runs the model on one token, which no top-k router sends to all experts.
        gathered: holds parameters whole inside its block (engine.gathered).
    """
    lists = list(_lists(model))
    if not lists:
        return []
    called: set[nn.Module] = set()
    training = model.training
    model.eval()
    with ExitStack() as hooks, gathered_where_used(model, gathered):
        for module in model.modules():
            hooks.callback(
                module.register_forward_pre_hook(lambda part, _: called.add(part)).remove
            )
        try:
            forward()
        finally:
            model.train(training)
    found: dict[nn.Module, None] = {}
    for modules, above in lists:
        ran = [any(part in called for part in child.modules()) for child in modules.children()]
        if any(ran) and not all(ran):
            found[next(module for module in reversed(above) if module in called)] = None
    return list(found)


def _lists(model: Any) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Yield the lists of modules in the decoder's layers, and the modules around each of them."""

    def inside(module: nn.Module, above: list[nn.Module]) -> Any:
        for child in module.children():
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and len(child) > 1:
                yield child, [*above, module]
            yield from inside(child, [*above, module])

    for layer in decoder_layers(model):
        yield from inside(layer, [])
