"""What answers SQL over a store, and the first question to it: does a unit exist?"""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from activation_store.errors import ContentError


@runtime_checkable
class Queried(Protocol):
    """What answers SQL over the tables of a store: all that reading needs of one."""

    @property
    def path(self) -> Path:
        """What to call it in a message."""
        ...

    def sql(self, query: str, /, **params: Any) -> Any:
        """Run one query."""
        ...


def unit_stats(store: Queried, hook: str, unit: int) -> dict[str, Any]:
    """Return the row of `unit_stats` of a unit.

    Raises:
        ContentError: the store has no statistics of that unit; names the hooks it has.
    """
    result = store.sql("FROM unit($hook, $unit)", hook=hook, unit=unit)
    rows = result.fetchall()
    if not rows:
        widths = store.sql(
            "SELECT hook, d FROM hooks WHERE kind = 'rows' ORDER BY hook LIMIT 20"
        ).fetchall()
        listing = ", ".join(f"{name} (units 0 to {d - 1})" for name, d in widths) or "none"
        raise ContentError(
            f"{store.path}: no unit {unit} of hook {hook!r}; hooks captured as rows: {listing}."
        )
    return dict(zip(result.columns, rows[0], strict=True))
