"""Compile a model's decoder layers by torch.compile, one by one (regional compilation).

In: a loaded model under DeepSpeed at ZeRO stages 0 to 2. Out: the same model, whose layers run as
compiled code. All layers of a kind share it, and the number of tokens is a variable in it, so that
nothing is compiled after the first micro-batches. Modules and names stay as they are: only
`layer.forward` is another. Attention stays outside: its kernel is fused already, and what it reads
of the documents' bounds would be compiled in as constants.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model import attention
from packhorse.trainer.model.decoder import decoder_layers

# Forms of a layer that are compiled at most: one document and several, in training and evaluation,
# with an input that needs a gradient and without. torch's own limit is 8.
MAX_FORMS = 16


def require_compilable(compiled: Any, stage: int) -> None:
    """Raise BadInput if `model.compile` is set at ZeRO-3, where it cannot work."""
    if compiled and stage == 3:
        raise BadInput(
            "model.compile: layers cannot be compiled at ZeRO-3, where DeepSpeed gathers each "
            "module's weights by hooks inside them; set model.compile=false, or "
            "parallel.deepspeed=zero2 or zero1"
        )


def compile_layers(model: Any, *, checkpointing: bool, backend: Any = "inductor") -> int:
    """Compile each decoder layer's forward; return how many there are.

    Args:
        checkpointing: the backward recomputes each layer from its input, by the compiled code.
            transformers' own activation checkpointing must be off.
        backend: of torch.compile.
    """
    import torch._dynamo

    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, MAX_FORMS)
    # else a hook inside a layer that comes later, as for a router's logits, would not be called
    settings.skip_nnmodule_hook_guards = False
    if attention.is_ours(model):
        name = model.config._attn_implementation.removeprefix("packhorse_")
        attention.implementation(name, torch.compiler.disable)
    for layer in decoder_layers(model):
        compiled = torch.compile(layer.forward, dynamic=True, backend=backend)
        layer.forward = partial(_recomputed, layer, compiled) if checkpointing else compiled
    model._compiled_forwards = {layer: layer.forward for layer in decoder_layers(model)}
    return len(model._compiled_forwards)


def _recomputed(layer: nn.Module, compiled: Any, *args: Any, **kwargs: Any) -> Any:
    if not (layer.training and torch.is_grad_enabled()):
        return compiled(*args, **kwargs)
    return checkpoint(compiled, *args, use_reentrant=False, **kwargs)
