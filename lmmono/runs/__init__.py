"""The run folder and its manifest."""
