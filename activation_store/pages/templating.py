"""The one Jinja environment of pages, and their static files.

Pages have no inline script, no style element and no style attribute, so a strict content-security
policy lets them be; a file that stands alone takes `css` and `scripts` in as they are.
"""

import math
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from activation_store.pages.escaping import shown
from activation_store.printable import number

if TYPE_CHECKING:
    from jinja2 import Environment
else:  # for annotations only: most who open a store look at no page
    Environment = object

OWN = "activation_store.pages"


@cache
def environment(*packages: str) -> Environment:
    """Return the environment over the folders `templates` of some packages, and of this one.

    Every value is shown by `shown` and then escaped; a name that a template does not get is an
    error.
    """
    from jinja2 import ChoiceLoader, PackageLoader, StrictUndefined
    from jinja2 import Environment as Jinja

    # the path is found by the package's name, so a wheel in a zip is fine too
    loaders = [PackageLoader(package) for package in (*packages, OWN)]
    templates = Jinja(
        loader=ChoiceLoader(loaders),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"number": number, "percent": percent, "token": token_text}
    names: dict[str, Any] = templates.globals
    names["log1p"] = math.log1p
    return templates


def static(name: str, package: str = OWN) -> str:
    """Return a static file of a package as text."""
    return files(package).joinpath("static", name).read_text("utf-8")


def percent(value: float | None) -> str:
    """Return a share in percent, in three digits.

    >>> percent(0.01234), percent(None)
    ('1.23 %', '–')
    """
    return "–" if value is None or value != value else f"{number(100.0 * value)} %"


def token_text(token: str | None) -> str:
    r"""Return one token so that its blanks can be seen.

    >>> token_text(" cat\n"), token_text(None)
    ('␣cat↵', '–')
    """
    if token is None:
        return "–"
    bare = token.lstrip(" ")
    return "␣" * (len(token) - len(bare)) + bare.replace("\n", "↵").replace("\t", "⇥")
