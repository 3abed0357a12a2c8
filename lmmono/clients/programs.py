"""Programs by their stored name: how the JSON of table `explanations` becomes a program again."""

from importlib import import_module
from typing import Any

from lmmono.errors import ExplainError, nearest
from lmmono.explanations.explanation import Program

PROGRAMS: dict[str, str] = {
    "token_lookup": "lmmono.explanations.lookup:Lookup",
    "constant": "lmmono.explanations.explanation_controls:Constant",
    "context": "lmmono.explanations.contexts:Context",
}
"""`module:class` of each kind of program."""


def program_from_json(values: dict[str, Any]) -> Program:
    """Return the program that a row of table `explanations` holds.

    Raises:
        ExplainError: No such kind of program; says which are near.
    """
    kind = values["kind"]
    if kind not in PROGRAMS:
        raise ExplainError(f"program {kind!r} is not known; {nearest(kind, PROGRAMS)}")
    module, _, name = PROGRAMS[kind].partition(":")
    program = getattr(import_module(module), name)
    return program.from_json({key: value for key, value in values.items() if key != "kind"})
