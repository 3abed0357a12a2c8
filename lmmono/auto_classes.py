"""CRATE among transformers' `Auto*` classes from `import lmmono` on, which imports neither.

`AutoConfig`'s table of models gets an entry that imports `lmmono.models` when it is asked for; that
then registers the classes.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_TABLE = "transformers.models.auto.configuration_auto"


class _Lazily(dict[str, Any]):
    """Models that were registered, with CRATE among them before it is."""

    def __contains__(self, key: object) -> bool:
        return key == "crate" or super().__contains__(key)

    def __missing__(self, key: str) -> Any:
        if key != "crate":
            raise KeyError(key)
        import lmmono.models.crate

        return lmmono.models.crate.CrateConfig


def _add(table: ModuleType) -> None:
    mapping = getattr(table, "CONFIG_MAPPING", None)
    registered = getattr(mapping, "_extra_content", None)
    if mapping is not None and type(registered) is dict:
        mapping._extra_content = _Lazily(registered)  # pyright: ignore[reportAttributeAccessIssue]


class _WhenImported:
    """A finder that adds the entry right after the table is imported, and then goes away."""

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        """Return the spec that others find, its module followed by the entry."""
        if fullname != _TABLE or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_add(module: ModuleType) -> None:
                run(module)
                _add(module)

            spec.loader.exec_module = run_and_add  # pyright: ignore[reportAttributeAccessIssue]
        return spec


def register_lazily() -> None:
    """Add CRATE to the table, now or when it is imported."""
    if _TABLE in sys.modules:
        _add(sys.modules[_TABLE])
    else:
        sys.meta_path.insert(0, _WhenImported())
