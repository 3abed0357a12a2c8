"""From a model to a store: activations, and the latents of dictionaries."""
