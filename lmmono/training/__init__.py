"""Training of language models with Accelerate: the stage `train` of a run."""
