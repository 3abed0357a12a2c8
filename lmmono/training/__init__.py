"""Training of language models with Accelerate: `train(recipe)` gives a finished run."""

from lmmono.training.loop import train

__all__ = ["train"]
