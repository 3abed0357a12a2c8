"""Language models that are asked: local, by server, or replayed."""
