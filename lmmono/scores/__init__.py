"""Scores of units, kept as rows in table `scores` of the store they were measured on."""
