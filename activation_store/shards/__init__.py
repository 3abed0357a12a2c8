"""Parquet shards: their names, their encoding, and their pages."""
