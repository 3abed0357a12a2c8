"""Activations of language models in DuckDB and Parquet, open to SQL."""
