"""Import functions of the user, which a recipe names as `module:function`.

They run with the user's rights. Modules are searched in the current folder, then in the
environment, as `python -m` does. A folder of data is never searched.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
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
    folder = os.getcwd()
    # the installed command does not search the current folder, other than `python -m`
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module may run any code
        raise BadInput(
            f"function `{name}`: the module cannot be imported from {folder} or the environment "
            f"({error_line(error)})"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise BadInput(f"function `{name}`: the module has no function `{function_name}`")
    return function


def function_digest(name: str) -> str:
    """Return the xxh3-128 of the module's file. Modules that it imports do not count."""
    load_function(name)
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    if file is None:
        raise BadInput(
            f"function `{name}`: its module has no file; write the function into a .py file"
        )
    return xxhash.xxh3_128_hexdigest(Path(file).read_bytes())
