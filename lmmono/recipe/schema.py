"""The JSON Schema of a recipe file, for editors and for the words of faults."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from lmmono.recipe.recipe import SECTIONS, Recipe

Schema = dict[str, Any]


@cache
def recipe_schema() -> Schema:
    """Return the JSON Schema that recipes are checked against."""
    return Recipe.model_json_schema()


def schema_text() -> str:
    """Return the schema as `recipes/recipe.schema.json` holds it: arms know every dotted key."""
    root = recipe_schema()
    properties = dict(root["properties"])
    arm = {"type": "object", "properties": _arm_keys(root), "additionalProperties": False}
    ((pattern, _),) = properties["arms"]["patternProperties"].items()
    properties["arms"] = {**properties["arms"], "patternProperties": {pattern: arm}}
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps({**draft, **root, "properties": properties}, indent=2) + "\n"


def resolve(schema: Schema, root: Schema) -> Schema:
    """Follow a `$ref` of the root's definitions."""
    reference = str(schema.get("$ref", ""))
    return root["$defs"][reference.rpartition("/")[2]] if reference else schema


def _arm_keys(root: Schema) -> Schema:
    """Return what an arm may set; a key that several kinds have takes what any of them takes."""
    keys: dict[str, list[Schema]] = {}
    for section in SECTIONS:
        for key, schema in _dotted(section, root, root):
            keys.setdefault(key, []).append(schema)
    return {key: found[0] if len(found) == 1 else {"anyOf": found} for key, found in keys.items()}


def _dotted(path: str, above: Schema, root: Schema) -> Iterator[tuple[str, Schema]]:
    """Yield every key at and under a section that an arm may set, with its schema."""
    schema: Schema = above["properties"][path.rpartition(".")[2]]
    yield path, {key: value for key, value in schema.items() if key != "default"}
    for kind in schema.get("oneOf", [schema]):
        section = resolve(kind, root)
        for key in section.get("properties", ()):
            yield from _dotted(f"{path}.{key}", section, root)
