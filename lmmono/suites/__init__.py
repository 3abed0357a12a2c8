"""Are interpretable codes robust ones: tasks made harder, probes on codes, and the statistics."""
