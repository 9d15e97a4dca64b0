"""Functions of the user's own, which a recipe names as `module:function`.

They run with the user's rights. Modules are found in the current folder, then in the environment,
as `python -m` finds them: a folder of data is never looked into.
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

from trainer.datatypes import BadInput
from trainer.utils.text import error_line


@cache
def load_function(name: str) -> Callable[..., Any]:
    """The function `name`, as `module:function`; its module is imported. Raises BadInput where
    there is none.
    """
    module_name, _, function_name = name.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's own code does
        raise BadInput(
            f"function `{name}`: the module cannot be imported from {folder} or the environment "
            f"({error_line(error)})"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise BadInput(f"function `{name}`: the module has no function `{function_name}`")
    return function


def function_digest(name: str) -> str:
    """xxh3-128 of the file that the function's module is. Modules which that one imports are not
    looked at.
    """
    load_function(name)
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    if file is None:
        raise BadInput(
            f"function `{name}`: its module has no file; write the function into a .py file"
        )
    return xxhash.xxh3_128_hexdigest(Path(file).read_bytes())
