"""Labelled text tasks: the records, where they are read from, and the leakage check."""
