"""Noise of known amount: in labels and in texts, the same for whoever asks with the same seed."""
