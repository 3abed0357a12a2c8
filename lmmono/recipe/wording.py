"""What a wrong setting is told: from pydantic's errors to `want ..., got ...` with a way out.

Wants are worded from the recipe's JSON Schema, so they cannot disagree with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic_core import ErrorDetails

from lmmono.errors import nearest
from lmmono.recipe.schema import Schema, resolve
from lmmono.recipe.tree import Fault, Path, Tree, dotted

_NOUNS = {
    "integer": "an integer",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "object": "a mapping",
}


@dataclass(frozen=True, slots=True)
class Place:
    """A setting's place: its path as written, and what the schema says of it."""

    path: Path
    schema: Schema | None
    """None where the schema knows no such setting."""
    parent: Schema
    tag: str = ""
    """`arch: gpt2` where the section's kind was chosen by a tag."""
    elsewhere: frozenset[str] = frozenset()
    """Settings that other kinds of the section have."""


def locate(loc: Sequence[str | int], root: Schema) -> Place:
    """Return the place that pydantic's `loc` means; union labels are no part of a path."""
    path: Path = ()
    parent, schema = root, root
    tag, elsewhere = "", frozenset[str]()
    for key in loc:
        if "discriminator" in schema:
            tag = f"{schema['discriminator']['propertyName']}: {key}"
            kinds = _kinds(schema, root)
            elsewhere = frozenset(name for kind in kinds.values() for name in kind["properties"])
            schema = kinds[str(key)]
            continue
        inner = _inner(schema, key)
        if key == "[key]" or (inner is None and "anyOf" in schema):  # labels, not settings
            break
        path, parent = (*path, key), schema
        if inner is None:
            return Place(path, None, parent, tag, elsewhere)
        schema = resolve(inner, root)
    return Place(path, schema, parent, tag, elsewhere)


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
    if literals(schema):
        known = literals(schema)
        return f"one of {', '.join(known)}" if len(known) > 1 else known[0]
    if schema.get("type") == "array":
        least = f"at least {schema['minItems']} " if schema.get("minItems") else ""
        item = want(schema["items"], root)
        return f"a list of {least}" + (f"({item})" if " " in item else item)
    kinds = schema.get("type", "object")
    if isinstance(kinds, list):
        return " or ".join(_NOUNS[kind] for kind in kinds)
    return _NOUNS[kinds] + _bounds(schema)


def literals(schema: Schema) -> list[str]:
    """Return the values that a setting may only take, if they are listed."""
    if "const" in schema:
        return [str(schema["const"])]
    return [str(value) for value in schema.get("enum", ())]


def faults_of(errors: Sequence[ErrorDetails], tree: Tree, root: Schema) -> list[Fault]:
    """Return one fault per wrong setting of `tree`, from all of pydantic's errors."""
    faults: dict[Path, Fault] = {}
    for error in errors:
        fault = _fault(error, tree, root)
        faults.setdefault(fault.path, fault)
    return list(faults.values())


def _fault(error: ErrorDetails, tree: Tree, root: Schema) -> Fault:
    place = locate(error["loc"], root)
    context = error.get("ctx", {})
    match error["type"]:
        case "clash":
            fields: list[Path] = [(*place.path, *_keys(f)) for f in context["fields"]]
            return clash_fault(fields, str(context["message"]), tree)
        case "extra_forbidden":
            return Fault(tree.origin(place.path), place.path, _unknown(place))
        case "union_tag_not_found" | "union_tag_invalid":
            return _wrong_tag(error, place, tree)
        case "missing":
            assert place.schema is not None
            message = f"missing; want {want(place.schema, root)}"
            return Fault(tree.origin(place.path), place.path, message)
        case "string_pattern_mismatch" if error["loc"][-1] == "[key]":
            message = f"want a name matching {context['pattern']}"
            return Fault(tree.origin(place.path), place.path, message)
        case _:
            assert place.schema is not None, error
            message = f"want {want(place.schema, root)}, got {shown(error['input'])}"
            return Fault(
                tree.origin(place.path),
                place.path,
                message + _way_out(error["input"], place.schema, root),
            )


def _keys(field: str) -> Path:
    return tuple(int(key) if key.isdigit() else key for key in field.split("."))


def clash_fault(fields: Sequence[Path], message: str, tree: Tree) -> Fault:
    """Return the fault of fields that do not fit: told at an override, else at what is written."""
    written = [tree.origins[path] for path in fields if path in tree.origins]
    overrides = [origin for origin in written if not origin.line]
    origin = next(iter([*overrides, *written]), tree.origin(fields[0]))
    return Fault(origin, fields[0], message)


def _wrong_tag(error: ErrorDetails, place: Place, tree: Tree) -> Fault:
    assert place.schema is not None
    name = str(place.schema["discriminator"]["propertyName"])
    kinds = list(place.schema["discriminator"]["mapping"])
    path = (*place.path, name)
    wanted = f"want one of {', '.join(kinds)}"
    if error["type"] == "union_tag_not_found":
        return Fault(tree.origin(path), path, f"missing; {wanted}")
    found = error["input"].get(name)
    return Fault(tree.origin(path), path, f"{wanted}, got {shown(found)}" + _hint(found, kinds))


def _unknown(place: Place) -> str:
    known = list(place.parent.get("properties", {}))
    key = str(place.path[-1])
    if "." in key:
        return f"unknown key; write {key.replace('.', ': {', 1)}: ...}}"
    if key in place.elsewhere:
        section = dotted(place.path[:-1])
        return (
            f"not a setting of {place.tag}; leave it out, or write {section}: {{{place.tag}, ...}}"
        )
    return f"unknown key; {nearest(key, known)}"


def _way_out(found: object, schema: Schema, root: Schema) -> str:
    branches = [resolve(branch, root) for branch in schema.get("anyOf", [schema])]
    return _hint(found, [name for branch in branches for name in literals(branch)])


def _hint(found: object, known: Sequence[str]) -> str:
    hint = nearest(found, known) if isinstance(found, str) and known else ""
    return f"; {hint}" if hint.startswith("did you mean") else ""


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


def _kinds(union: Schema, root: Schema) -> dict[str, Schema]:
    mapping = union["discriminator"]["mapping"]
    return {tag: resolve({"$ref": reference}, root) for tag, reference in mapping.items()}


def _inner(schema: Schema, key: str | int) -> Schema | None:
    if isinstance(key, int):
        return schema.get("items")
    named = next(iter(schema.get("patternProperties", {}).values()), None)
    return schema.get("properties", {}).get(key, named)


def _bounds(schema: Schema) -> str:
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[name]}" for name, sign in bounds.items() if name in schema]
    if "pattern" in schema:
        limits.append(f"matching {schema['pattern']}")
    return " " + " and ".join(limits) if limits else ""
