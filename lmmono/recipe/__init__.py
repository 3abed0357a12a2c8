"""Recipes: what a run does, as YAML that is checked whole before anything starts."""
