"""Recipes: what a run does, as YAML that is checked whole before anything starts."""

from lmmono.recipe.dictionary_settings import Dictionaries
from lmmono.recipe.explain_settings import Explain, Score, Scoring
from lmmono.recipe.recipe import SECTIONS, Recipe
from lmmono.recipe.robustness_settings import Robustness
from lmmono.recipe.section import Section
from lmmono.recipe.sections import Capture, Data, Model, Train

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
