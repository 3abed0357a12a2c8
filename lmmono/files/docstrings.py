"""The sentences under the fields of a class, which Python drops: read from its source."""

import ast
import inspect
import sys
from functools import cache
from typing import TypeVar

Kind = TypeVar("Kind", bound=type)


@cache
def _of_module(module: str) -> dict[str, dict[str, str]]:
    """Return the sentences by class and field of one module."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):  # no source, as in a frozen program
        return {}
    classes: dict[str, dict[str, str]] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, node.body[1:], strict=False):
            match field, after:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    classes.setdefault(node.name, {})[name] = inspect.cleandoc(text)
                case _:
                    pass
    return classes


def field_sentences(cls: type) -> dict[str, str]:
    """Return what is written under each field of a class, inherited ones included."""
    sentences: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        sentences |= _of_module(parent.__module__).get(parent.__name__, {})
    return sentences


def with_fields(cls: Kind) -> Kind:
    """Add the fields of a class and their sentences to its docstring, for `help`."""
    lines = [f"    {name}: {' '.join(text.split())}" for name, text in field_sentences(cls).items()]
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:", *lines])
    return cls
