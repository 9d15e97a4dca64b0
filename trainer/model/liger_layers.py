"""Liger's kernels for what lies between a layer's matrix products: norms, rotary positions, gated
activations.

In: a loaded transformers model. Out: the same model, whose small operations are one kernel each
    where Liger knows
its type. Weights, modules and names stay as they are.

Liger puts its kernels into a model's own modules, and by name into transformers' file, for all
models of the process. The second is taken back here: a model that is loaded later, to check an
export on a CPU, has to be as it was written.
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

from trainer.datatypes import BadInput

_ROPE = "apply_rotary_pos_emb"  # the function's name in transformers' files
# loss.py has the loss; a layer norm's kernel would be put into torch.nn itself
_LEFT_OUT = {"cross_entropy": False, "fused_linear_cross_entropy": False, "layer_norm": False}
_GATED = {"swiglu": False, "geglu": False}


def fuse(model: Any, name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Put Liger's kernels into the model as `model.layer_kernels` asks for. Returns what was done,
    for the log.

    Raises:
        BadInput: they are asked for where they cannot run, or Liger does not know the model.
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
    if not _kernels_run_on(device):
        return "they need a CUDA device"
    if importlib.util.find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed"
    if not type(model).__module__.startswith("transformers.models."):
        return "the model brings code of its own"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"Liger does not know models of type {model.config.model_type}"
    return None


def _kernels_run_on(device: torch.device) -> bool:
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def _fuse(model: Any) -> int:
    """Returns the number of modules that were given another forward."""
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    before = set(_with_own_forward(model))
    names = _names_of_file(model)
    as_written = dict(names)
    experts = any(
        "expert" in key for key in model.config.to_dict()
    )  # theirs have another form in each model
    _apply_liger_kernel_to_instance(model, **_LEFT_OUT, **(_GATED if experts else {}))
    fused_rope = names.get(_ROPE)
    names.update(as_written)
    if fused_rope is not as_written.get(_ROPE):
        names[_ROPE] = _Rope(as_written[_ROPE], fused_rope)
    model._fused_forwards = {
        m: vars(m)["forward"] for m in _with_own_forward(model) if m not in before
    }
    return len(model._fused_forwards)


def _with_own_forward(model: Any) -> Iterator[nn.Module]:
    """The model's modules whose forward is not their class's."""
    return (module for module in model.modules() if "forward" in vars(module))


def _names_of_file(model: Any) -> dict[str, Any]:
    """The names in transformers' file of this model: functions and classes, by which all models of
    it are made.
    """
    return vars(sys.modules[type(model).__module__])


class _Rope:
    """A file's rotary positions: Liger's where its kernels run, the file's own elsewhere and inside
    `plain`.
    """

    def __init__(self, own: Any, fused: Any) -> None:
        self._own = own._own if isinstance(own, _Rope) else own
        self._fused = fused
        self.plain = False

    def __call__(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        function = self._own if self.plain or not _kernels_run_on(query.device) else self._fused
        return function(query, *args, **kwargs)


def is_fused(model: Any) -> bool:
    return bool(getattr(model, "_fused_forwards", None))


@contextmanager
def plain(model: Any) -> Iterator[None]:
    """Inside, the model computes as transformers wrote it: what the kernels are compared with."""
    if not is_fused(model):
        yield
        return
    forwards: dict[nn.Module, Any] = model._fused_forwards
    rope = _names_of_file(model).get(_ROPE)
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
