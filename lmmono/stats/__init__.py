"""Statistics: intervals, resampling, tests, and rates."""
