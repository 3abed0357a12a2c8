"""What units mean: excerpts and records from a store, explainers, and the clients they ask."""
