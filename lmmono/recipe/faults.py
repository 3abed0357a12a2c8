"""What a wrong setting is told: from pydantic's errors to `want ..., got ...` with a way out.

Wants are worded from the recipe's JSON Schema, so they cannot disagree with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic_core import ErrorDetails

from lmmono.errors import nearest
from lmmono.recipe.recipe import Schema, resolve
from lmmono.recipe.tree import Fault, Path, Tree, dotted

_NOUNS = {
    "integer": "an integer",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "object": "a mapping",
}

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def faults_of(errors: Sequence[ErrorDetails], tree: Tree, root: Schema) -> list[Fault]:
    """Return one fault per wrong setting of `tree`, from all of pydantic's errors."""
    faults: dict[Path, Fault] = {}
    for error in errors:
        fault = _fault(error, tree, root)
        faults.setdefault(fault.path, fault)
    return list(faults.values())


def clash_fault(fields: Sequence[Path], message: str, tree: Tree) -> Fault:
    """Return the fault of fields that do not fit: told at an override, else at what is written."""
    written = [tree.origins[path] for path in fields if path in tree.origins]
    overrides = [origin for origin in written if not origin.line]
    origin = next(iter([*overrides, *written]), tree.origin(fields[0]))
    return Fault(origin, fields[0], message)


def keys_of(field: str) -> Path:
    """Return the path of a dotted field; numbers are positions."""
    return tuple(int(key) if key.isdigit() else key for key in field.split("."))


def want(schema: Schema, root: Schema) -> str:
    """Say what a setting takes.

    >>> want({"type": "integer", "minimum": 1}, {})
    'an integer >= 1'
    >>> want({"type": "array", "items": {"enum": ["a", "b"]}}, {})
    'a list of (one of a, b)'
    """
    schema = resolve(schema, root)
    if "anyOf" in schema:
        return " or ".join(want(branch, root) for branch in schema["anyOf"])
    if "discriminator" in schema:
        return f"a mapping with {schema['discriminator']['propertyName']}"
    if names := _literals(schema):
        return f"one of {', '.join(names)}" if len(names) > 1 else names[0]
    kinds = schema.get("type", "object")
    if kinds == "array":
        least = f"at least {schema['minItems']} " if schema.get("minItems") else ""
        item = want(schema["items"], root)
        return f"a list of {least}" + (f"({item})" if " " in item else item)
    if isinstance(kinds, list):
        return " or ".join(_NOUNS[kind] for kind in kinds)
    limits = [f"{sign} {schema[name]}" for name, sign in _BOUNDS.items() if name in schema]
    limits += [f"matching {schema['pattern']}"] if "pattern" in schema else []
    return " ".join([_NOUNS[kinds], " and ".join(limits)]).strip()


def shown(value: object) -> str:
    """Return a value as a recipe would write it, cut to what a line can hold."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case dict():
            return "a mapping"
        case tuple():
            return "a list"
        case _:
            text = repr(value)
            return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True, slots=True)
class _Place:
    """A setting's place: its path as written, and what the schema says of it."""

    path: Path
    schema: Schema | None
    """None where the schema knows no such setting."""
    parent: Schema
    tag: str = ""
    """`arch: gpt2` where the section's kind was chosen by a tag."""
    elsewhere: frozenset[str] = frozenset()
    """Settings that other kinds of the section have."""


def _locate(loc: Sequence[str | int], root: Schema) -> _Place:
    """Return the place that pydantic's `loc` means; union labels are no part of a path."""
    path: Path = ()
    parent, schema = root, root
    tag, elsewhere = "", frozenset[str]()
    for key in loc:
        if "discriminator" in schema:
            union = schema["discriminator"]
            kinds = {k: resolve({"$ref": r}, root) for k, r in union["mapping"].items()}
            tag = f"{union['propertyName']}: {key}"
            elsewhere = frozenset(name for kind in kinds.values() for name in kind["properties"])
            schema = kinds[str(key)]
            continue
        if isinstance(key, int):
            inner = schema.get("items")
        else:
            named = next(iter(schema.get("patternProperties", {}).values()), None)
            inner = schema.get("properties", {}).get(key, named)
        if key == "[key]" or (inner is None and "anyOf" in schema):  # labels, not settings
            break
        path, parent = (*path, key), schema
        if inner is None:
            return _Place(path, None, parent, tag, elsewhere)
        schema = resolve(inner, root)
    return _Place(path, schema, parent, tag, elsewhere)


def _fault(error: ErrorDetails, tree: Tree, root: Schema) -> Fault:
    place, context = _locate(error["loc"], root), error.get("ctx", {})
    path, schema = place.path, place.schema or {}
    match error["type"]:
        case "clash":
            fields = [(*path, *keys_of(field)) for field in context["fields"]]
            return clash_fault(fields, str(context["message"]), tree)
        case "extra_forbidden":
            message = _unknown(place)
        case "union_tag_not_found" | "union_tag_invalid":
            kinds = list(schema["discriminator"]["mapping"])
            tag = str(schema["discriminator"]["propertyName"])
            path, message = (*path, tag), f"want one of {', '.join(kinds)}"
            if error["type"] == "union_tag_not_found":
                message = f"missing; {message}"
            else:
                got = error["input"].get(tag)
                message += f", got {shown(got)}" + _hint(got, kinds)
        case "missing":
            message = f"missing; want {want(schema, root)}"
        case "string_pattern_mismatch" if error["loc"][-1] == "[key]":
            message = f"want a name matching {context['pattern']}"
        case _:
            assert place.schema is not None, error
            branches = [resolve(branch, root) for branch in schema.get("anyOf", [schema])]
            names = [name for branch in branches for name in _literals(branch)]
            got = error["input"]
            message = f"want {want(schema, root)}, got {shown(got)}" + _hint(got, names)
    return Fault(tree.origin(path), path, message)


def _unknown(place: _Place) -> str:
    key = str(place.path[-1])
    if "." in key:
        return f"unknown key; write {key.replace('.', ': {', 1)}: ...}}"
    if key in place.elsewhere:
        section = dotted(place.path[:-1])
        return (
            f"not a setting of {place.tag}; leave it out, or write {section}: {{{place.tag}, ...}}"
        )
    return f"unknown key; {nearest(key, place.parent.get('properties', {}))}"


def _hint(got: object, names: Sequence[str]) -> str:
    """Return the near names, if there are some: all of them stand in the message already."""
    hint = nearest(got, names) if isinstance(got, str) and names else ""
    return f"; {hint}" if hint.startswith("did you mean") else ""


def _literals(schema: Schema) -> list[str]:
    """Return the values that a setting may only take, if they are listed."""
    return [str(schema["const"])] if "const" in schema else [str(v) for v in schema.get("enum", ())]
