"""packhorse: supervised fine-tuning where the run is a function of the recipe."""

import os
import sys

# `python -m packhorse` puts the current folder in front of sys.path. While this package is being
# imported for it, sys.argv is ["-m", ...]: before any other module is looked for there. The folder
# stays if packhorse itself lies in it, as in a checkout.
_home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if sys.argv[:1] == ["-m"] and sys.path[0] == os.getcwd() != _home:
    del sys.path[0]

from packhorse.api import RunFailed, RunResult, evaluate, export, load_recipe, prepare, train  # noqa: E402
from packhorse.trainer.datatypes import BadInput  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "BadInput",
    "RunFailed",
    "RunResult",
    "evaluate",
    "export",
    "load_recipe",
    "prepare",
    "train",
]
