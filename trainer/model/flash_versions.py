"""Find the versions 2, 3 and 4 of flash-attn that run on this machine's GPU.

In: the GPU's compute capability. Out: a version's function for packed sequences: of the one that
attention_choice.py has chosen, else of the one that is written for such a GPU. The versions are
packages of their own, and a package counts as found once its import has worked: flash-attn 4 is a
folder inside another package's name, and a wheel that was built for another torch lies there as a
right one does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from packhorse.trainer.utils.text import one_line

MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}
# The order of preference by the major compute capability, by what each is written for: 3 for Hopper
# (9) alone, 4 for Hopper and the Blackwell of data centres (10). On the other Blackwell (12), 4 has
# no deterministic backward.
_PREFERRED = {8: (2,), 9: (3, 4, 2), 10: (4, 2), 11: (4, 2), 12: (2, 4)}


class FlashAttention(NamedTuple):
    """A version that is installed and can be imported."""

    version: int
    attend: Callable[..., Any]  # its flash_attn_varlen_func

    @property
    def lacks(self) -> tuple[str, ...]:
        """What a layer may ask for and this version refuses, or has no backward for."""
        # 4 asserts in its backward against soft caps with heads of 256, which Gemma 2 has
        return ("sinks", *{2: (), 3: ("dropout",), 4: ("dropout", "softcap")}[self.version])


_pinned: int | None = None


def pin(version: int | None) -> None:
    """Let `load_for` return this version from now on; None for the preferred one."""
    global _pinned
    _pinned = version


@cache
def load(major: int) -> tuple[FlashAttention, ...]:
    """Return each flash-attn that a GPU of this major compute capability can use, the preferred
    first.

    Raises:
        ImportError: no version for it can be imported; each one's reason, where it is installed.
    """
    found, faults = [], []
    for version in _PREFERRED.get(major, ()):
        try:
            module = importlib.import_module(MODULES[version])
            if module.__file__ is None:
                continue  # the folder in which version 4 alone lies
            found.append(FlashAttention(version, module.flash_attn_varlen_func))
        except ModuleNotFoundError as error:
            # a module that it needs, and not itself, may be what is missing
            if not f"{MODULES[version]}.".startswith(f"{error.name}."):
                faults.append((version, error))
        except Exception as error:
            # a wheel for another torch or CUDA fails in ways of its own: ImportError, OSError, ...
            faults.append((version, error))
    if found:
        return tuple(found)
    reasons = [f"flash-attn {n} cannot be imported: {one_line(error, 200)}" for n, error in faults]
    raise ImportError("; ".join(reasons) or "no flash-attn for this GPU is installed")


def load_for(device: torch.device) -> FlashAttention:
    """Return the flash-attn to use on a CUDA device; see `load`."""
    found = load(torch.cuda.get_device_capability(device)[0])
    return next((flash for flash in found if flash.version == _pinned), found[0])
