"""From which density on each metric ranks true explanations first; written, not typed."""

COURT: dict[str, dict[str, float | None]] = {}
"""Least density by metric, of exact and of noisy units; None where it passes at none. A metric that
is not here was not before the court."""
