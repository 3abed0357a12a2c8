"""Methods that change a model or stand beside it: loss terms, adapters, interpreters, comparators.

Their records stand in `lmmono.registry.methods`, which names each home as a string: nothing below
imports this room.
"""
