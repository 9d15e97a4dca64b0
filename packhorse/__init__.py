"""packhorse: supervised fine-tuning where the run is a function of the recipe."""

from packhorse.api import RunFailed, RunResult, evaluate, export, load_recipe, prepare, train
from packhorse.trainer.datatypes import BadInput

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
