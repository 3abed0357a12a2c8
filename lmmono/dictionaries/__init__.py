"""Dictionaries: learned codes of a hook's vectors, their controls, and what they are worth."""
