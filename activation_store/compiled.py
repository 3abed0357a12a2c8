"""The one way this package compiles a loop to machine code.

A compiled function holds no Python object, so it releases the interpreter's lock while it runs. The
machine code is kept beside the source and renewed when that file changes. It includes the functions
called from other files, so after a change to one of those remove `__pycache__`.
A user who can write neither there nor in a home has no cache: each process then compiles anew.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile `function` on its first call and keep the machine code beside the source file.

    Floating point follows the source strictly: the same input gives the same bits on every call.
    """
    try:
        return cast(F, numba.njit(nogil=True, cache=True)(function))  # pyright: ignore[reportUntypedFunctionDecorator]
    except RuntimeError as fault:
        if "no locator available" not in str(fault):
            raise
        # not a folder that others can write, such as /tmp: numba unpickles what it finds there
        return cast(F, numba.njit(nogil=True)(function))  # pyright: ignore[reportUntypedFunctionDecorator]
