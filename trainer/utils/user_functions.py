"""Import functions of the user, which a recipe names as `module:function`.

They run with the user's rights. The module is searched in the current folder, then in the
environment; modules that it imports in the environment, then in the current folder, so that nothing
there takes the place of a package. A folder of data is never searched.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import xxhash

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.text import error_line


@cache
def load_function(name: str) -> Callable[..., Any]:
    """Import the module of `module:function` and return the function.

    Raises:
        BadInput: the module cannot be imported, or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    folder, package = os.getcwd(), module_name.partition(".")[0]

    def find_here(name: str, _path: Any = None, _target: Any = None) -> ModuleSpec | None:
        found = PathFinder.find_spec(name, [folder]) if name == package else None
        return found if found and found.origin else None  # a folder of data is no package

    if folder not in sys.path:
        sys.path.append(folder)
    finder: Any = SimpleNamespace(find_spec=find_here)
    sys.meta_path.insert(0, finder)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module may run any code
        raise BadInput(
            f"function `{name}`: the module cannot be imported from {folder} or the environment "
            f"({error_line(error)})"
        ) from None
    finally:
        sys.meta_path.remove(finder)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise BadInput(f"function `{name}`: the module has no function `{function_name}`")
    return function


class FunctionFailed(Exception):
    """A function of the user raised something; the message names both."""


def call_function(name: str, *arguments: Any) -> Any:
    """Return what the function `module:function` returns.

    Raises:
        FunctionFailed: it raised anything but KeyboardInterrupt. An exit that it asks for is no
            exit of the run, which would look like its end.
        BadInput: as load_function.
    """
    function = load_function(name)
    try:
        return function(*arguments)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, asyncio's CancelledError
        raise FunctionFailed(f"{name}: {error_line(error)}") from None


def function_digest(name: str) -> str:
    """Return the xxh3-128 of the module's file. Modules that it imports do not count."""
    load_function(name)
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    if file is None:
        raise BadInput(
            f"function `{name}`: its module has no file; write the function into a .py file"
        )
    return xxhash.xxh3_128_hexdigest(Path(file).read_bytes())
