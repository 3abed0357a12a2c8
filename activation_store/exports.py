"""The public names of a package, written once: in `__init__.pyi` next to its `__init__.py`.

Type checkers and editors read the stub, and so does this: each name is imported when it is first
used, so `import lmmono` loads no torch, and nothing has to be kept equal to anything.
"""

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy_exports(
    package: str, file: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package, as its stub says.

    The stub holds `from module import name as name` and nothing else; a name may be a module.

    Args:
        package: The package's `__name__`.
        file: Its `__file__`.
    """
    imports = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8")).body
    homes = {
        alias.name: str(node.module)
        for node in imports
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        if home == package:  # a room of this package: asking it for the name would come back here
            return import_module(f"{home}.{name}")
        module = import_module(home)
        return getattr(module, name) if hasattr(module, name) else import_module(f"{home}.{name}")

    return get, lambda: sorted(homes), sorted(homes)
