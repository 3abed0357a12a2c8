"""Settings as plain nested values that remember which line or override each came from.

Reads YAML 1.2 and nothing else: no merge keys, no tags, no dates. A scalar that YAML 1.2 does not
read as null, bool, int or float is text.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from lmmono.errors import RecipeError

Path = tuple[str | int, ...]
"""Keys from the top of a recipe; an int is a position in a list."""

Values = dict[str, Any]
"""A mapping of plain values: None, bool, int, float, str, tuples and mappings of these."""

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

    def copy(self) -> "Tree":
        """Return a tree that can be changed without changing this one."""
        return Tree(self.top, copy.deepcopy(self.values), dict(self.origins), list(self.faults))

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
        self.remove_origins(path)
        self.origins.update({path + inner: origin for inner, origin in origins.items()})

    def remove(self, key: str) -> None:
        """Take a top-level key out, if it is there."""
        self.values.pop(key, None)
        self.remove_origins((key,))

    def remove_origins(self, path: Path) -> None:
        """Forget where `path` and everything under it came from."""
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
    node = _compose(text, source)
    tree = Tree(Origin(source, 1))
    if not isinstance(node, MappingNode):
        found = "nothing" if node is None else _kind(node)
        raise RecipeError([f"{tree.top}: want a mapping such as `name: my_run`, got {found}"])
    tree.values = _plain(node, (), tree)
    return tree


def read_override(text: str) -> Tree:
    """Return the one setting that `a.b=value` makes; the value is a YAML scalar or flow.

    >>> read_override("train.lr=1e-3").values
    {'train': {'lr': 0.001}}

    Raises:
        RecipeError: There is no `=`, the key has an empty part, or the value is not YAML.
    """
    source = f"override {text}"
    key, equals, value = text.partition("=")
    path: Path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise RecipeError([f"{source}: want key=value such as train.steps=500"])
    tree = Tree(Origin(source, 0, path))
    inner = Tree(tree.top)
    node = _compose(value, source)
    plain = None if node is None else _plain(node, (), inner)
    # a flow value's lines mean nothing on the command line: all of it comes from the override
    tree.set(path, plain, {p: tree.top for p in [(), *inner.origins]})
    tree.faults += [Fault(tree.top, path + f.path, f.message) for f in inner.faults]
    return tree


def _compose(text: str, source: str) -> Node | None:
    try:
        return YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = source if mark is None or source.startswith("override") else _at(source, mark.line)
        problem = " ".join(f"{error.problem or error.context}".split())
        raise RecipeError([f"{where}: not YAML: {problem}"]) from None
    except YAMLError as error:
        raise RecipeError([f"{source}: not YAML: {' '.join(str(error).split())}"]) from None


def _at(source: str, line: int) -> str:
    return f"{source}:{line + 1}"


def _plain(node: Node, path: Path, tree: Tree) -> Any:
    tree.origins.setdefault(path, Origin(tree.top.source, node.start_mark.line + 1))
    if isinstance(node, MappingNode):
        return _plain_mapping(node, path, tree)
    if isinstance(node, SequenceNode):
        return tuple(_plain(item, (*path, i), tree) for i, item in enumerate(node.value))
    assert isinstance(node, ScalarNode)
    return _plain_scalar(node, path, tree)


def _plain_mapping(node: MappingNode, path: Path, tree: Tree) -> Values:
    values: Values = {}
    for key_node, value_node in node.value:
        origin = Origin(tree.top.source, key_node.start_mark.line + 1)
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
    if str(node.tag) not in _SCALARS:
        message = f"want a plain value, got the tag {node.tag}"
        tree.faults.append(Fault(tree.origin(path), path, message))
        return None
    if str(node.tag) == _CORE + "timestamp":
        return str(node.value)
    return YAML(typ="safe", pure=True).constructor.construct_object(node)


def _kind(node: Node) -> str:
    return "a list" if isinstance(node, SequenceNode) else f"{node.value!r}"
