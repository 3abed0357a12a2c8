"""The planted language: generated text whose every word has known features."""

from lmmono.data.planted.habits import Habits
from lmmono.data.planted.language import VERSION, Language, PlantedDocument

__all__ = ["VERSION", "Habits", "Language", "PlantedDocument"]
