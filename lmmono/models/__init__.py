"""Networks and their named activations; importing this registers CRATE with the `Auto*` classes."""

import lmmono.models.crate  # pyright: ignore[reportUnusedImport]  # noqa: F401  # registers
from lmmono.exports import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
