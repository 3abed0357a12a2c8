"""The command line."""

from lmmono.cli.app import main

__all__ = ["main"]
