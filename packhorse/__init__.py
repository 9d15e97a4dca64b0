"""packhorse: supervised fine-tuning where the run is a function of the recipe."""

__version__ = "0.1.0"
