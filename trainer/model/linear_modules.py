"""Find the linear modules of a language model that can have an adapter, or a packed weight."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.decoder import decoder_of


def linear_modules(model: Any) -> dict[str, nn.Linear]:
    """Return the language model's linear modules by name, without the head, whose fused loss sees
    no adapter, without those of towers, which a text does not reach, and without those whose weight
    other code reads: neither an adapter nor packed bytes would act there.
    """
    head = model.get_output_embeddings()
    decoder = decoder_of(model)
    language = {id(module) for module in decoder.modules()}
    left_out = {id(child) for module in decoder.modules() for child in read_by(module)}
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
        and m is not head
        and id(m) in language
        and id(m) not in left_out
        and _is_product(m)
    }


def _is_product(module: nn.Linear) -> bool:
    """Return whether a linear module does what its name says: routers of Llama 4 and Phi-MoE are
    subclasses that return their choice of experts, DeepSeek V4 has one of groups.
    """
    kind = type(module)
    return kind.forward is nn.Linear.forward or kind.__name__ == "FalconLinear"


def read_by(module: nn.Module) -> Iterator[nn.Linear]:
    """Yield the linear modules whose weight a module's code reads, as Jamba's mixer `dt_proj`'s.

    The code is asked, and not a forward: kernels of a GPU read weights of modules that a CPU calls,
    and an adapter must not depend on that.
    """
    for name in _names_read(type(module)):
        child = getattr(module, name, None)
        if isinstance(child, nn.Linear):
            yield child


@cache
def _names_read(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of modules whose weight a class's own code reads.

    Raises:
        BadInput: the class has no source to read.
    """
    if kind.__module__.partition(".")[0] in ("torch", "peft", "bitsandbytes", "packhorse"):
        return frozenset()
    own = [cls for cls in kind.__mro__ if not cls.__module__.startswith("torch.")]
    code = "".join(_source(cls) for cls in own if issubclass(cls, nn.Module))
    # neither where it asks for a type, nor a slice: of tensor parallelism that BLOOM only simulates
    found = re.findall(
        r"\bself\.(\w+)\.weight\b(?! *(?:\[|\.(?:dtype|device|shape|data)\b| = ))", code
    )
    return frozenset(found)


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # TypeError where its module has no file
        raise BadInput(
            f"adapter: `{cls.__module__}.{cls.__qualname__}` has no source file, from which it "
            "would show which weights it reads past their modules and their adapters; put its .py "
            "file there, or train all weights"
        ) from None
