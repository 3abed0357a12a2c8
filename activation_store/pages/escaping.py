"""Text of corpora, models and judges on its way to a page: the one place where it is made safe.

Templates send every value through `shown`, then escape it; Python that builds markup itself calls
`escaped`. Nothing else may make markup of text.
"""

from typing import Any

from markupsafe import Markup, escape

from activation_store.printable import printable


def shown(value: Any) -> Any:
    r"""Return text with control and direction characters shown by their number, as in a terminal.

    What is no text, and markup that this package made, stays as it is. Not yet escaped.

    >>> shown("a\x1b]0;title\x07 b\u202ec")
    'a<U+001B>]0;title<U+0007> b<U+202E>c'
    """
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return printable(value) if is_text else value


def escaped(value: Any) -> Markup:
    r"""Return a value as markup that shows it and does nothing.

    >>> escaped("<script>\x1b")
    Markup('&lt;script&gt;&lt;U+001B&gt;')
    """
    return escape(shown(value))
