"""Activations in, shards and tables out."""
