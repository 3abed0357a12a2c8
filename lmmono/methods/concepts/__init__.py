"""Concept comparators: interpretable models of other kinds to hold methods against."""
