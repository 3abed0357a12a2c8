"""Runs to look at, live: pages, a SQL console and an API over open stores; needs extra `serve`."""
