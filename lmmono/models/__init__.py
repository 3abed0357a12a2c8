"""Networks and their named activations; importing this registers CRATE with `Auto*` classes."""

from lmmono.models import crate as _crate  # noqa: F401  # registers the Auto* classes
