"""Units of a hook to browse in a notebook: a widget that works in Jupyter, VS Code and marimo."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import activation_store as astore
from activation_store.pages import unit_page
from activation_store.pages.templating import static
from lmmono.errors import RunError
from lmmono.reports.pages.interest import ranked

if TYPE_CHECKING:
    from anywidget import AnyWidget
else:  # for annotations only: an extra
    AnyWidget = object

_ALL = "SELECT unit FROM unit_stats WHERE hook = $hook ORDER BY unit"
_DENSITY = "SELECT unit FROM unit_stats WHERE hook = $hook ORDER BY density DESC NULLS LAST, unit"
_KURTOSIS = "SELECT unit FROM unit_stats WHERE hook = $hook ORDER BY kurtosis DESC NULLS LAST, unit"


def browse(store: astore.Store, hook: str, *, units: Sequence[int] | None = None) -> AnyWidget:
    """Return a widget that shows one unit of a hook after another; pages are read when asked for.

    Order by number, density, kurtosis, or what is most worth a look first. The store must stay
    open.

    Args:
        store: Open store.
        hook: Hook stored as rows.
        units: Units to browse; by default all.

    Raises:
        RunError: The extra is not installed, or the store has no such units.
    """
    try:
        import anywidget
        import traitlets
    except ImportError:
        raise RunError("browse needs an extra: pip install 'lmmono[notebook]'") from None

    orders = {
        "worth a look": [row["unit"] for row in ranked(store, 10_000, hook)],
        "number": [unit for (unit,) in store.sql(_ALL, hook=hook).fetchall()],
        "density": [unit for (unit,) in store.sql(_DENSITY, hook=hook).fetchall()],
        "kurtosis": [unit for (unit,) in store.sql(_KURTOSIS, hook=hook).fetchall()],
    }
    asked = set(orders["number"]) if units is None else set(units)
    orders = {name: [u for u in order if u in asked] for name, order in orders.items()}
    orders = {name: order for name, order in orders.items() if order}
    if not orders:
        raise RunError(f"browse: {store.path} holds no such unit of hook {hook!r}")

    class UnitBrowser(anywidget.AnyWidget):
        """The units of one hook; `unit` is the one that is shown, and can be set."""

        _esm = static("browse.js", "lmmono.reports.pages")
        _css = static("unit.css")
        hook = traitlets.Unicode().tag(sync=True)
        orders = traitlets.Dict().tag(sync=True)
        unit = traitlets.Int().tag(sync=True)
        page = traitlets.Unicode().tag(sync=True)

        @traitlets.observe("unit")
        def _read(self, change: Any) -> None:
            self.page = str(unit_page(store, self.hook, change["new"]).html)

    first = next(iter(orders.values()))[0]
    page = str(unit_page(store, hook, first).html)
    return UnitBrowser(hook=hook, orders=orders, unit=first, page=page)
