"""Tell what each parameter of a model does: multiply, embed, or scale and shift."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from packhorse.trainer.model.quantisation import shape

LINEAR, EXPERTS, EMBEDDINGS, OTHERS = (
    "linear products",
    "experts' matrices",
    "embeddings",
    "norms, biases and other vectors",
)


def roles(model: nn.Module) -> dict[int, str]:
    """Return the role of each parameter by its id.

    The shape alone does not tell: the biases of all experts of a layer are a matrix, as are Mamba's
    `A_log` and the filters of a convolution by channel. A head tied to the embeddings is one.
    """
    found: dict[int, str] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            role = _role(module, name, parameter)
            if role == EMBEDDINGS or id(parameter) not in found:
                found[id(parameter)] = role
    return found


def _role(owner: nn.Module, name: str, parameter: Any) -> str:
    size = shape(parameter)
    kind = type(owner).__name__
    if isinstance(owner, nn.Embedding):
        return EMBEDDINGS
    if isinstance(owner, nn.Linear) or kind == "Conv1D":  # GPT-2's name for a transposed Linear
        return LINEAR if len(size) == 2 else OTHERS
    if isinstance(owner, nn.modules.conv._ConvNd):
        # a convolution by channel has one input channel a filter and mixes nothing
        return LINEAR if len(size) > 2 and size[1] > 1 else OTHERS
    # what is left are parameters that a module of the model's own code uses in its own way
    if "bias" in name or "norm" in kind.lower() or sum(each > 1 for each in size) < 2:
        return OTHERS
    if len(size) == 3:
        return EXPERTS
    # a router's `weight`, a projection, DBRX's `w1` and `v1`, and not `A_log`, `scale`, `pos_embed`
    return LINEAR if re.search(r"weight$|proj|fn$|^[wv]\d?$", name) else OTHERS
