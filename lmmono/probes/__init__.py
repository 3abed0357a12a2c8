"""Probes: linear classifiers of features, many at a time, and tuned models."""
