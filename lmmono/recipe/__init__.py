"""Recipes: what a run does, as YAML that is checked whole before anything starts."""

from lmmono.recipe.dictionaries import Dictionaries
from lmmono.recipe.explaining import Explain, Score, Scoring
from lmmono.recipe.recipe import SECTIONS, Recipe
from lmmono.recipe.robustness import Robustness
from lmmono.recipe.sections import Capture, Data, Model, Section, Train

__all__ = [
    "SECTIONS",
    "Capture",
    "Data",
    "Dictionaries",
    "Explain",
    "Model",
    "Recipe",
    "Robustness",
    "Score",
    "Scoring",
    "Section",
    "Train",
]
