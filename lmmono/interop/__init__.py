"""Foreign formats: what other tools write, and what they read."""
