"""The toy models of superposition, small enough that every part is known."""
