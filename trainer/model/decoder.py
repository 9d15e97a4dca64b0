"""Find the parts of a causal language model, and record what its layers give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from packhorse.trainer.datatypes import BadInput

# Elements of a layer that ZeRO-3 gathers at once, at most: 0.5 GiB in 16 bits. DeepSpeed then has
# hooks at the layer and none at its ten or twenty modules, which are a large part of a small
# model's step. A larger layer stays cut: it and the next one would be held whole.
WHOLE_LAYER = 2**28


def decoder_of(model: Any) -> Any:
    """Return the part of a causal language model that makes the hidden states for its head; raise
    BadInput if its forward does all by itself."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # transformers' own answer may be the whole model (Llama 4), its head (ModernBERT), or a part
    # that has the head (Llama 4 with its tower)
    for part in (model.get_decoder(), model.base_model, getattr(model, "model", None)):
        modules = list(part.modules()) if isinstance(part, nn.Module) else []
        if part is not model and any(module is embedding for module in modules):
            return decoder_of(part) if any(module is head for module in modules) else part
    raise BadInput(
        f"{type(model).__name__} has no decoder apart from its head, so that packhorse cannot "
        "reach the hidden states; take another model"
    )


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return the model's stack of layers.

    It is the longest list of modules that lies in no other list; one of the configured number of
    layers comes first.
    """
    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in decoder_of(model).modules() if isinstance(m, nn.ModuleList)]
    inner = {part for stack in lists for layer in stack for part in layer.modules()}
    stacks = [stack for stack in lists if stack not in inner]
    stacks.sort(key=lambda stack: (len(stack) == number, len(stack)))
    return list(stacks[-1]) if stacks else []


def whole_layers(model: Any) -> list[nn.Module]:
    """Return the decoder layers that ZeRO-3 gathers at once; see WHOLE_LAYER.

    None if a weight is frozen: where no input of a layer needs a gradient, DeepSpeed would reduce
    the layer's gradients before they are there. None of a model that has a list for each part of
    its layers (XLM): what is found then is a norm, whose output may be changed in place. No layer
    that shares weights with another one (Zamba).
    """
    if not all(p.requires_grad for p in model.parameters()):
        return []
    return [
        layer
        for layer in untied(model, decoder_layers(model))
        if list(layer.children()) and num_weights(layer) <= WHOLE_LAYER
    ]


def untied(model: nn.Module, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return those of the modules whose parameters have no other place in the model.

    Tied gradients are complete where the backward has come to the first of their places. DeepSpeed
    would reduce them with the last one, if ZeRO-3 gathered that one whole.
    """
    places = Counter(p for _, p in model.named_parameters(remove_duplicate=False))
    return [module for module in modules if all(places[p] == 1 for p in module.parameters())]


def num_weights(module: nn.Module) -> int:
    """Return the number of a module's parameters' elements, in shards or whole."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def layer_name(model: Any, layer: int) -> str:
    """Return what a layer is called in messages; the number after the last is the decoder's end."""
    layers = decoder_layers(model)
    if layer >= len(layers):
        return f"the end of {type(decoder_of(model)).__name__}"
    types = getattr(model.config.get_text_config(), "layer_types", None) or []
    kind = f", {types[layer]}" if layer < len(types) else ""
    return f"layer {layer} ({type(layers[layer]).__name__}{kind})"


@contextmanager
def uncompiled(model: Any) -> Iterator[None]:
    """Let layers that compiled_layers.py compiled run as transformers wrote them, inside the block.

    Comparisons need that, and generation, whose cache has another shape at each token.
    """
    forwards: dict[nn.Module, Any] = getattr(model, "_compiled_forwards", {})
    for layer in forwards:
        del vars(layer)["forward"]
    try:
        yield
    finally:
        for layer, forward in forwards.items():
            layer.forward = forward


@contextmanager
def recorded_states(
    model: Any, positions: list[int], lengths: Sequence[int]
) -> Iterator[list[torch.Tensor]]:
    """Record the states of a sequence, after each layer and after the whole decoder.

    A state is (positions, H), where H holds all that a layer hands on for a token: some have
    several streams, (streams, 1, T, H) or (1, T, streams, H). They are there after the block.

    Args:
        positions: the tokens whose states are wanted, in order.
        lengths: tokens of each call of the decoder, as one may run document by document.
    """
    ends = list(accumulate(lengths))
    places = [
        [p - end + n for p in positions if end - n <= p < end] for n, end in zip(lengths, ends)
    ]
    calls: list[list[torch.Tensor]] = [[]]
    seen: list[torch.Tensor] = []
    decoder = decoder_of(model)

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        state, number = output if isinstance(output, torch.Tensor) else output[0], len(calls) - 1
        if lengths[number] not in state.shape:
            raise BadInput(
                f"{type(module).__name__} gives {tuple(state.shape)} for {lengths[number]} tokens, "
                "which packhorse cannot compare; take another model"
            )
        axis = state.shape.index(lengths[number])
        calls[-1].append(state.movedim(axis, 0)[places[number]].flatten(1))
        if module is decoder:
            calls.append([])

    with ExitStack() as hooks:
        for module in [*decoder_layers(model), decoder]:
            hooks.callback(module.register_forward_hook(hook).remove)
        yield seen
    seen += [torch.cat(of_layer) for of_layer in zip(*calls[:-1], strict=True)]
