"""Settings as plain nested values that remember which line or override each came from.

Reads YAML 1.2 and nothing else: no aliases or merge keys, no tags, no dates. A scalar that YAML 1.2
does not read as null, bool, int or float is text.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    Event,
    NodeEvent,
)
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from lmmono.errors import RecipeError

Path = tuple[str | int, ...]
"""Keys from the top of a recipe; an int is a position in a list."""

Values = dict[str, Any]
"""A mapping of plain values: None, bool, int, float, str, tuples and mappings of these."""

MAX_BYTES = 1_000_000
"""Bytes of a recipe file; the longest of ours has 4,000."""
MAX_DEPTH = 50
"""Lists and mappings inside each other; a recipe needs 6, and ruamel recurses 3 calls for each."""
MAX_VALUES = 10_000
"""Keys and values of a file: ruamel reads some thousands per second, and recipes have 100."""
MAX_DIGITS = 400
"""Characters of a number: the largest float has 309 digits, and int() refuses 4,301."""

_CORE = "tag:yaml.org,2002:"
_SCALARS = {_CORE + name for name in ("null", "bool", "int", "float", "str", "timestamp")}


def dotted(path: Path) -> str:
    """Return a path as people write it.

    >>> dotted(("capture", "splits", 1))
    'capture.splits[1]'
    """
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """Where a value was written: a line of a file, or an override."""

    source: str
    """The file as it was named, or `override key=value`."""
    line: int = 0
    """Line in the file, from 1; 0 for an override."""
    path: Path = ()
    """The override's own path; empty for a file."""

    def __str__(self) -> str:
        """Return `file:line`, or the override."""
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One thing wrong with a recipe; as text it is one line that says where and what."""

    origin: Origin
    path: Path
    message: str
    arm: str = ""
    """The arm that has the fault, where the recipe without its arms does not."""

    def __str__(self) -> str:
        """Return `where: arm x: path: message`, without what the origin already says."""
        parts = [str(self.origin)]
        parts += [f"arm {self.arm}"] if self.arm else []
        parts += [dotted(self.path)] if self.path and self.path != self.origin.path else []
        return ": ".join([*parts, self.message])


@dataclass(slots=True)
class Tree:
    """Nested settings, the origin of every value, and the faults met while reading them."""

    top: Origin
    """Where the whole was read from."""
    values: Values = field(default_factory=dict[str, Any])
    origins: dict[Path, Origin] = field(default_factory=dict[Path, Origin])
    faults: list[Fault] = field(default_factory=list[Fault])

    def copy(self, *, without: str) -> "Tree":
        """Return a tree that can be changed without changing this one, a top-level key left out."""
        values = copy.deepcopy({key: value for key, value in self.values.items() if key != without})
        return Tree(self.top, values, dict(self.origins), list(self.faults))

    def origin(self, path: Path) -> Origin:
        """Return where `path` was written, or the nearest written thing above it."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, self.top)

    def set(self, path: Path, value: Any, origins: dict[Path, Origin]) -> None:
        """Put `value` at `path`, replacing what was there; `origins` are relative to `path`."""
        node = self.values
        for depth, key in enumerate(path[:-1]):
            node = node.setdefault(str(key), {})
            self.origins.setdefault(path[: depth + 1], origins[()])
            if not isinstance(node, dict):
                message = f"cannot set {dotted(path)}: {dotted(path[: depth + 1])} is {node!r}"
                self.faults.append(Fault(origins[()], path, message))
                return
        node[str(path[-1])] = value
        self._forget(path)
        self.origins.update({path + inner: origin for inner, origin in origins.items()})

    def remove(self, *path: str) -> None:
        """Take a setting out, if it is there."""
        node: Any = self.values
        for key in path[:-1]:
            node = node.get(key, {})
        node.pop(path[-1], None)
        self._forget(path)

    def _forget(self, path: Path) -> None:
        self.origins = {p: o for p, o in self.origins.items() if p[: len(path)] != path}

    def below(self, path: Path) -> dict[Path, Origin]:
        """Return the origins of `path` and everything under it, relative to `path`."""
        n = len(path)
        return {p[n:]: origin for p, origin in self.origins.items() if p[:n] == path}


def read_tree(text: str, source: str) -> Tree:
    """Return the settings that a YAML text holds.

    Raises:
        RecipeError: The text is not YAML, or is not a mapping. Duplicate keys and the like do not
            raise: they are in `faults`, so that a caller can tell them with all others.
    """
    tree = Tree(Origin(source, 1))
    node = _compose(text, tree.top)
    if not isinstance(node, MappingNode):
        kind = "a list" if isinstance(node, SequenceNode) else repr(node and node.value)
        got = "nothing" if node is None else kind
        raise RecipeError([f"{tree.top}: want a mapping such as `name: my_run`, got {got}"])
    tree.values = _plain(node, (), tree)
    return tree


def read_override(text: str) -> Tree:
    """Return the one setting that `a.b=value` makes; the value is a YAML scalar or flow.

    >>> read_override("train.lr=1e-3").values
    {'train': {'lr': 0.001}}

    Raises:
        RecipeError: There is no `=`, the key has an empty part, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    path: Path = tuple(part.strip() for part in key.split("."))
    tree = Tree(Origin(f"override {text}", 0, path))
    if not equals or not all(path):
        raise RecipeError([f"{tree.top}: want key=value such as train.steps=500"])
    if len(path) > MAX_DEPTH:
        raise RecipeError([f"{tree.top}: want at most {MAX_DEPTH} parts of a key, got {len(path)}"])
    inner = Tree(tree.top)
    node = _compose(value, tree.top)
    plain = None if node is None else _plain(node, (), inner)
    # a flow value's lines mean nothing on the command line: all of it comes from the override
    tree.set(path, plain, {p: tree.top for p in [(), *inner.origins]})
    tree.faults += [Fault(tree.top, path + f.path, f.message) for f in inner.faults]
    return tree


# each stage opens its run, and a run's recipe of 4,000 bytes takes 48 ms to parse
@lru_cache(maxsize=64)
def _compose(text: str, top: Origin) -> Node | None:
    """Return the nodes of a YAML text, refused before they are built where they are too many."""
    try:
        for line, message in _excess(YAML(typ="safe", pure=True).parse(text)):
            raise RecipeError([f"{_at(top, line)}: {message}"])
        return YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = top if mark is None else _at(top, mark.line)
        problem = " ".join(f"{error.problem or error.context}".split())
        raise RecipeError([f"{where}: not YAML: {problem}"]) from None
    except (YAMLError, ValueError) as error:  # ValueError: "\U00110000" is no character
        where = str(top).removesuffix(":1")
        raise RecipeError([f"{where}: not YAML: {' '.join(str(error).split())}"]) from None


def _excess(events: Iterator[Event]) -> Iterator[tuple[int, str]]:
    """Yield the line and the fault of an alias, and of more depth or values than a recipe has.

    Events come one by one, so nothing is built of a text that is refused: aliases inside aliases
    grow without bound, and nodes are made by recursion.
    """
    depth = n_values = 0
    for event in events:
        line = event.start_mark.line if event.start_mark is not None else 0
        if isinstance(event, AliasEvent):
            yield line, f"aliases are not read; write the value of *{event.anchor} out"
        depth += isinstance(event, CollectionStartEvent)
        depth -= isinstance(event, CollectionEndEvent)
        n_values += isinstance(event, NodeEvent)
        if depth > MAX_DEPTH:
            yield line, f"want at most {MAX_DEPTH} lists and mappings inside each other"
        if n_values > MAX_VALUES:
            yield line, f"want at most {MAX_VALUES:,} keys and values"


def _at(top: Origin, line: int) -> Origin:
    """Return a line of a file, counted from 0; an override has none."""
    return Origin(top.source, line + 1) if top.line else top


def _plain(node: Node, path: Path, tree: Tree) -> Any:
    """Return a node's value; origins and faults go to the tree."""
    tree.origins.setdefault(path, _at(tree.top, node.start_mark.line))
    if isinstance(node, SequenceNode):
        return tuple(_plain(item, (*path, i), tree) for i, item in enumerate(node.value))
    if not isinstance(node, MappingNode):
        assert isinstance(node, ScalarNode)
        return _plain_scalar(node, path, tree)
    values: Values = {}
    for key_node, value_node in node.value:
        origin = _at(tree.top, key_node.start_mark.line)
        if not isinstance(key_node, ScalarNode):
            tree.faults.append(Fault(origin, path, "want text as a key, got a list or mapping"))
            continue
        key = str(key_node.value)
        inner = (*path, key)
        if key in values:
            first = tree.origins[inner].line
            tree.faults.append(Fault(origin, inner, f"written twice, first in line {first}"))
            continue
        tree.origins[inner] = origin
        values[key] = _plain(value_node, inner, tree)
    return values


def _plain_scalar(node: ScalarNode, path: Path, tree: Tree) -> Any:
    tag, text = str(node.tag), str(node.value)
    message = ""
    if tag not in _SCALARS:
        message = f"want a plain value, got the tag {tag}"
    elif tag == _CORE + "timestamp":
        return text
    elif tag == _CORE + "str":
        if not any(0xD800 <= ord(letter) < 0xE000 or letter == "\0" for letter in text):
            return text
        message = "want text that a file can hold, got half of a surrogate pair or a null character"
    elif tag != _CORE + "null" and len(text) > MAX_DIGITS:
        message = f"want a number of at most {MAX_DIGITS} characters, got {len(text):,}"
    else:
        try:
            return YAML(typ="safe", pure=True).constructor.construct_object(node)
        except (ValueError, KeyError):  # a tag that the text does not fit: !!int '4x'
            message = f"want a plain value, got {text!r} with the tag !!{tag.removeprefix(_CORE)}"
    tree.faults.append(Fault(tree.origin(path), path, message))
    return None
