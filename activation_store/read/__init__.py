"""Vectors for training and rows for people, read back from a store."""
