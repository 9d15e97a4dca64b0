"""Import large libraries in less time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def lean_import(*hidden: str) -> Iterator[None]:
    """Import in the block as if the packages `hidden` were not installed, unless they are imported.

    Garbage is not collected meanwhile: an import makes a million objects and hardly any garbage,
    and going through them again and again takes a fifth of the time.
    """
    modules: dict[str, Any] = sys.modules
    absent = [name for name in hidden if name not in modules]
    modules.update(dict.fromkeys(absent))  # `import` raises ModuleNotFoundError where it finds None
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        for name in absent:
            del modules[name]
        if collects:
            gc.enable()


@contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Give an attribute another value in the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
