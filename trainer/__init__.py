"""packhorse: supervised fine-tuning where the run is a function of the recipe.

Read `datatypes.py` for the types that stages hand on, then `train.py` from top to bottom.
"""
