"""Put Liger's kernels into a model: norms, rotary positions and gated activations.

In: a loaded transformers model. Out: the same model, in which each of these operations is one
kernel if Liger knows the model's type. Weights, modules and names stay as they are.

Liger changes a model's own modules, and names in transformers' module, for all models of the
process. The second is taken back here: a model that is loaded later, to check an export on a CPU,
must compute as transformers wrote it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from packhorse.trainer.datatypes import BadInput

_ROPE = "apply_rotary_pos_emb"  # the function's name in transformers' modules
# The loss is loss.py's; Liger would put its layer norm into torch.nn itself.
_LEFT_OUT = {"cross_entropy": False, "fused_linear_cross_entropy": False, "layer_norm": False}
_GATED = {"swiglu": False, "geglu": False}


def fuse(model: Any, name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Put Liger's kernels into the model as `model.layer_kernels` says; return what was done, for
    the log.

    Raises:
        BadInput: the recipe names liger where it cannot run, or for a model it does not know.
    """
    missing = _missing(model, device)
    if name == "liger" and missing:
        raise BadInput(
            f"model.layer_kernels: liger cannot be used: {missing}; use `auto` or `torch`"
        )
    if name == "torch" or missing:
        return f"as transformers has them ({missing or 'named in the recipe'})"
    if name == "auto" and dtype == torch.float32:
        return "as transformers has them (model.dtype is float32, for exact comparisons)"
    return f"by Liger's kernels, {_fuse(model)} modules"


def _missing(model: Any, device: torch.device) -> str | None:
    if not kernels_run_on(device):
        return "they need a CUDA device"
    if importlib.util.find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed"
    if not type(model).__module__.startswith("transformers.models."):
        return "the model brings code of its own"  # which Liger's functions were not written for
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"Liger does not know models of type {model.config.model_type}"
    return None


def kernels_run_on(device: torch.device) -> bool:
    """Return whether Liger's kernels, which are Triton's, can run on the device."""
    # Triton's interpreter runs them on a CPU, slowly: the tests compare them so
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def _fuse(model: Any) -> int:
    """Return the number of modules that got another forward."""
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    before = set(_with_own_forward(model))
    names = _module_names(model)
    as_written = dict(names)
    # the gated activations of experts have another form in each model
    experts = any("expert" in key for key in model.config.to_dict())
    _apply_liger_kernel_to_instance(model, **_LEFT_OUT, **(_GATED if experts else {}))
    fused_rope = names.get(_ROPE)
    # back to transformers' own, which other models of the process use
    names.update(as_written)
    if fused_rope is not as_written.get(_ROPE):
        names[_ROPE] = _Rope(as_written[_ROPE], fused_rope)
    model._fused_forwards = {
        m: vars(m)["forward"] for m in _with_own_forward(model) if m not in before
    }
    return len(model._fused_forwards)


def _with_own_forward(model: Any) -> Iterator[nn.Module]:
    """Return the model's modules whose forward is not their class's."""
    return (module for module in model.modules() if "forward" in vars(module))


def _module_names(model: Any) -> dict[str, Any]:
    """Return the functions and classes of the model's Python module, by name, to be changed."""
    return vars(sys.modules[type(model).__module__])


class _Rope:
    """Rotary positions: by Liger where its kernels run, else and inside `plain` as written."""

    def __init__(self, own: Any, fused: Any) -> None:
        # a second model's `fuse` finds the first one's _Rope in the module
        self._own = own._own if isinstance(own, _Rope) else own
        self._fused = fused
        self.plain = False

    def __call__(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        function = self._own if self.plain or not kernels_run_on(query.device) else self._fused
        return function(query, *args, **kwargs)


def is_fused(model: Any) -> bool:
    return bool(getattr(model, "_fused_forwards", None))


@contextmanager
def plain(model: Any) -> Iterator[None]:
    """Let the model compute as transformers wrote it inside the block, for comparisons."""
    forwards: dict[nn.Module, Any] = getattr(model, "_fused_forwards", {})
    rope = _module_names(model).get(_ROPE) if forwards else None
    for module in forwards:
        del vars(module)["forward"]
    if isinstance(rope, _Rope):
        rope.plain = True
    try:
        yield
    finally:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        if isinstance(rope, _Rope):
            rope.plain = False
