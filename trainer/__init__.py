"""packhorse: supervised fine-tuning where the run is a function of the recipe.

Read `flow.py` for the types, then `train.py` from top to bottom.
"""

__version__ = "0.1.0"
