"""Every setting with its type, default and sentence: `docs/settings.md`, and `help(lm.SAE)`."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from lmmono.files.docstrings import field_sentences
from lmmono.recipe.recipe import SECTIONS, Recipe
from lmmono.recipe.section import OneOf, Section
from lmmono.registry.scorer_settings import ScorerSettings
from lmmono.registry.scorers import SCORERS

_LIMITS = (("ge", ">= {}"), ("gt", "> {}"), ("le", "<= {}"), ("lt", "< {}"))
_PLAIN = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "anything"}
MANY = 12
"""A list of more names than this is named by where it can be read."""

HEAD = """\
# Settings

Every key of a recipe; `lmmono schema --page settings` writes this page. A key without a default
has to be given. On the command line and in arms keys have dots: `train.steps=500`. The same names
are the keywords of `lm.SAE(...)` and of the verbs in Python.
"""


def settings_markdown() -> str:
    """Return the page of all settings of a recipe."""
    parts = [HEAD, "## The recipe itself", "", *_table(Recipe, "", skip=SECTIONS)]
    for name in SECTIONS:
        parts += ["", f"## {name}", "", " ".join(field_sentences(Recipe)[name].split()), ""]
        parts += _chapter(Recipe.model_fields[name], name)
        if name == "score":
            parts += _scorer_tables()
    return "\n".join(parts) + "\n"


def _scorer_tables() -> Iterator[str]:
    """Yield the settings of scorers, a table for each kind."""
    by_kind: dict[type[ScorerSettings], list[str]] = {}
    for scorer in SCORERS.values():
        by_kind.setdefault(type(scorer.settings), []).append(scorer.name)
    for kind, names in by_kind.items():
        if not fields(kind):
            continue
        yield from (f"### settings of {', '.join(names)}", "", first_sentence(kind), "")
        yield from ("| key | type | default | what |", "|---|---|---|---|")
        sentences, defaults = field_sentences(kind), kind()
        for key, hint in get_type_hints(kind).items():
            what = " ".join(sentences[key].split())
            least = kind.__dataclass_fields__[key].metadata.get("least")
            about = type_text(hint) + ("" if least is None else f" >= {least:g}")
            cells = (f"`{key}`", about, f"`{_yaml(getattr(defaults, key))}`", what)
            yield "| " + " | ".join(cells) + " |"
        yield ""


def _chapter(field: FieldInfo, path: str) -> Iterator[str]:
    """Yield the tables of a section; one for each kind, where there are several."""
    kinds = sections_of(field.annotation)
    for kind in kinds:
        if len(kinds) > 1:
            yield from (f"### {path}: {_tag(kind)}", "")
        yield from (first_sentence(kind), "")
        yield from _table(kind, path)
        yield ""
        for name, inner in kind.model_fields.items():
            is_list = get_origin(_bare(inner.annotation)) is tuple
            for sub in sections_of(inner.annotation):
                title = f"each of {path}.{name}" if is_list else f"{path}.{name}"
                yield from (f"### {title}: {_tag(sub)}" if _tag(sub) else f"### {title}", "")
                yield from (first_sentence(sub), "")
                yield from _table(sub, "" if is_list else f"{path}.{name}")
                yield ""


def _table(kind: type[Section], path: str, skip: Sequence[str] = ()) -> Iterator[str]:
    """Yield the rows of a kind of settings, without those that have tables of their own."""
    sentences = field_sentences(kind)
    yield "| key | type | default | what |"
    yield "|---|---|---|---|"
    for name, field in kind.model_fields.items():
        if name in skip:
            continue
        key = f"{path}.{name}" if path else name
        default = "" if field.is_required() else f"`{default_text(field)}`"
        what = " ".join(sentences.get(name, "").split())
        cells = (f"`{key}`", type_text(field.annotation, field.metadata, field), default, what)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def settings_help(doc: str | None, union: Any) -> str:
    """Return the docstring of a class that takes `**settings`, with the settings of every kind."""
    kinds = sections_of(union)
    shared = [name for name in kinds[0].model_fields if all(name in k.model_fields for k in kinds)]
    lines = [inspect.cleandoc(doc or ""), "", "Settings of every arch:"]
    lines += _help_lines(kinds[0], [name for name in shared if name not in ("arch", "name")])
    for kind in kinds:
        own = [name for name in kind.model_fields if name not in shared]
        lines += ["", f"With {_tag(kind)}: {first_sentence(kind)}", *_help_lines(kind, own)]
    return "\n".join(lines)


def _help_lines(kind: type[Section], names: Sequence[str]) -> Iterator[str]:
    sentences = field_sentences(kind)
    for name in names:
        field = kind.model_fields[name]
        default = "" if field.is_required() else f"; default {default_text(field)}"
        about = type_text(field.annotation, field.metadata, field)
        yield f"    {name} ({about}{default}): {' '.join(sentences.get(name, '').split())}"


def sections_of(annotation: Any) -> list[type[Section]]:
    """Return the kinds of settings in an annotation: itself, those of a union, those in a list."""
    annotation = _bare(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple):
        return [kind for part in get_args(annotation) for kind in sections_of(part)]
    return []


def _bare(annotation: Any) -> Any:
    """Return an annotation without what `Annotated` adds."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _tag(kind: type[Section]) -> str:
    """Return how a kind is told apart from others: `kind: files`, `arch: topk or batchtopk`."""
    for name in ("kind", "arch"):
        if name in kind.model_fields:
            names = get_args(_bare(kind.model_fields[name].annotation))
            return f"{name} {' or '.join(f'`{value}`' for value in names)}" if names else ""
    return ""


def first_sentence(kind: type) -> str:
    """Return the first paragraph of a class' docstring in one line."""
    return " ".join(inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].split())


def type_text(annotation: Any, metadata: Sequence[Any] = (), field: FieldInfo | None = None) -> str:
    """Return in words what a setting may be.

    >>> from pydantic import Field
    >>> type_text(Annotated[int, Field(ge=1)] | None)
    'integer >= 1, or null'
    """
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return type_text(inner, [*metadata, *_flat(more)], field)
    if (names := _listed_names(metadata, field)) is not None:
        return _one_of(names)
    if kinds := sections_of(annotation):
        tags = [_tag(kind) for kind in kinds]
        several = "list of settings" if get_origin(annotation) is tuple else "settings"
        return f"{several}, below" + (f": {', '.join(tags)}" if len(kinds) > 1 else "")
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _one_of(arguments)
    if origin in (Union, UnionType):
        parts = [
            type_text(argument, metadata) for argument in arguments if argument is not NoneType
        ]
        return " or ".join(parts) + (", or null" if NoneType in arguments else "")
    if origin is tuple:
        length = [f", at least {m.min_length}" for m in metadata if getattr(m, "min_length", 0)]
        return f"list of {type_text(arguments[0])}{''.join(length)}"
    if origin is dict:
        return "mapping"
    return f"{_PLAIN.get(annotation, 'text')} {_limits(metadata)}".strip()


def _listed_names(metadata: Sequence[Any], field: FieldInfo | None) -> list[Any] | None:
    """Return the names that a setting chooses from, where its schema or its type lists them."""
    listed = [item.names for item in metadata if isinstance(item, OneOf)]
    extra = field.json_schema_extra if field is not None else None
    names: Any = listed[-1] if listed else extra.get("enum") if isinstance(extra, dict) else None
    return names if isinstance(names, list) else None


def _limits(metadata: Sequence[Any]) -> str:
    """Return the limits of a number, such as `>= 1, <= 9`."""
    return ", ".join(
        text.format(f"{value:g}" if isinstance(value, float) else value)
        for name, text in _LIMITS
        for item in metadata
        if (value := getattr(item, name, None)) is not None
    )


def _flat(metadata: Sequence[Any]) -> list[Any]:
    """Return metadata with that of `Field(...)` opened."""
    return [
        inner
        for item in metadata
        for inner in (item.metadata if isinstance(item, FieldInfo) else [item])
    ]


def _one_of(names: Sequence[Any]) -> str:
    shown = [f"`{name}`" for name in names[:MANY]]
    more = f", ... ({len(names)} in all)" if len(names) > MANY else ""
    return f"{', '.join(shown)}{more}" if len(names) > 1 else shown[0]


def default_text(field: FieldInfo) -> str:
    """Return a default as a recipe writes it."""
    value = field.get_default(call_default_factory=True)
    return _yaml(value)


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Section):
        tags = {name for name in ("kind", "arch") if name in type(value).model_fields}
        settings = {name: getattr(value, name) for name in (*sorted(tags), *value.model_fields_set)}
        return _yaml(settings)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'
