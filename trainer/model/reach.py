"""Find the parameters that a text's loss depends on, and freeze the others.

In: a loaded model, in shards or not. Out: the model, in which nothing is trained that never gets a
gradient: towers for images and sounds, biases that a router only sorts by, heads for more tokens.
Without a gradient a parameter would shrink by weight decay at ZeRO 0 to 2, and at 3 its buffer
would hold what another step has left there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from typing import Any

import torch
from torch import nn

from packhorse.trainer import dist
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.decoder import decoder_layers
from packhorse.trainer.model.lora import Gathered
from packhorse.trainer.model.quantisation import numel
from packhorse.trainer.utils.time_limit import names_matching


def freeze_named(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters in whose names one of the patterns occurs (model.freeze). Raises
    BadInput if a pattern occurs in no name or does not end, or nothing is left to be trained."""
    named = dict(model.named_parameters())
    for pattern in patterns:
        found = names_matching("model.freeze", pattern, named)
        if not found:
            raise BadInput(
                f"model.freeze: `{pattern}` occurs in no parameter's name; "
                f"`{next(iter(named))}` is one"
            )
        for name in found:
            named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise BadInput("model.freeze: nothing is left to be trained; take a pattern out")


def freeze_unreached(
    model: Any, forward: Callable[[], torch.Tensor], gathered: Gathered
) -> list[str]:
    """Freeze the trained parameters that `forward` does not depend on, and return their names.

    The head's count as reached, as the loss is computed in it. Every rank calls it.

    Args:
        forward: runs the model and returns what it hands to its head.
        gathered: holds parameters whole inside its block (engine.gathered).
    """
    training = model.training
    model.eval()  # activation checkpointing and dropout change nothing here, and cost time
    try:
        # nothing is saved for a backward that does not come: it would hold gathered weights
        forget: Any = lambda _: None  # noqa: E731
        nothing_kept = torch.autograd.graph.saved_tensors_hooks(forget, forget)
        with torch.enable_grad(), nothing_kept, gathered_where_used(model, gathered):
            reached = _leaves(forward())
    finally:
        model.train(training)
    reached |= {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # a few tokens do not visit every expert of a list of modules: one of them speaks for all
    families = {_family(name) for name, p in trained.items() if id(p) in reached}
    frozen = [name for name in trained if _family(name) not in families]
    before = {id(p) for p in model.parameters() if not p.requires_grad}
    for name in frozen:
        trained[name].requires_grad_(False)
    _log(model, frozen, trained, before)
    return frozen


def _family(name: str) -> str:
    """Return the name with `*` for all numbers but the first one, which is the layer's."""
    numbers = count()
    return re.sub(r"\b\d+\b", lambda number: "*" if next(numbers) else number[0], name)


def _leaves(output: torch.Tensor) -> set[int]:
    """Return the ids of the parameters in the output's graph."""
    found: set[int] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [before for before, _ in node.next_functions]
    return found


@contextmanager
def gathered_where_used(model: Any, gathered: Gathered) -> Iterator[None]:
    """Hold each layer's parameters whole while it runs, and those outside layers by module.

    No engine exists yet whose hooks would gather them. A layer is gathered whole, as modules in it
    may read each other's weights.
    """
    layers = decoder_layers(model)
    inside = {id(part) for layer in layers for part in layer.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    units = [(layer, list(layer.parameters())) for layer in layers]
    units += [(module, list(module.parameters(recurse=False))) for module in outside]
    open_ones: dict[int, AbstractContextManager[Any]] = {}
    with ExitStack() as hooks:
        for module, parameters in units:
            if not any(hasattr(parameter, "ds_id") for parameter in parameters):
                continue

            def enter(module: nn.Module, _: Any, parameters: Any = parameters) -> None:
                open_ones[id(module)] = gathered(parameters)
                open_ones[id(module)].__enter__()

            def leave(module: nn.Module, *_: Any) -> None:
                open_ones.pop(id(module)).__exit__(None, None, None)

            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        try:
            yield
        finally:  # those of modules that an error has left
            while open_ones:
                open_ones.popitem()[1].__exit__(None, None, None)


def _log(model: Any, frozen: list[str], trained: dict[str, nn.Parameter], before: set[int]) -> None:
    if not frozen:
        return
    names = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in _whole(model, before)))
    share = sum(numel(trained[name]) for name in frozen) / sum(map(numel, model.parameters()))
    dist.log.info(
        "frozen, as a text's loss does not depend on it: %d tensors, %.2g%% of the weights (%s%s)",
        *(len(frozen), 100 * share, ", ".join(names[:4]), ", ..." if len(names) > 4 else ""),
    )


def _whole(module: nn.Module, before: set[int], prefix: str = "") -> Iterator[str]:
    """Yield the largest parts that are newly frozen as a whole, by name.

    Args:
        before: ids of the parameters that were frozen already.
    """
    for name, parameter in module.named_parameters(recurse=False):
        if not parameter.requires_grad and id(parameter) not in before:
            yield f"{prefix}{name}"
    for name, child in module.named_children():
        parameters = list(child.parameters())
        if parameters and not any(p.requires_grad or id(p) in before for p in parameters):
            yield f"{prefix}{name}"
        else:
            yield from _whole(child, before, f"{prefix}{name}.")
