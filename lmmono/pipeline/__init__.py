"""The loop that does the stages of a run."""

from lmmono.pipeline.stage_loop import open_for, run_stages, train

__all__ = ["open_for", "run_stages", "train"]
