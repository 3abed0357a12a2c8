"""Shared test settings: what is checked how, where corpora and the real text lie, and a skip."""

import functools
import gc
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from hypothesis import settings

# a busy machine is no fault
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_jaxtyped = jaxtyping.jaxtyped


CHECKED_CALLS = 20
"""Calls of a function that each test checks: the checks of all took a tenth of the suite's time."""

tests_begun = 0


def pytest_runtest_setup() -> None:
    """Have every function checked again."""
    global tests_begun
    tests_begun += 1


def first_calls(checked: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is `checked` for the first calls of each test, then `plain`."""
    test = calls = 0

    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal test, calls
        test, calls = tests_begun, calls + 1 if test == tests_begun else 1
        return (checked if calls <= CHECKED_CALLS else plain)(*args, **kwargs)

    return call


def jaxtyped(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Check functions and dataclasses that annotate shapes, each argument once.

    jaxtyping's own way checks the arguments before the call and again with what it returns, for a
    message of its own; types without shapes are for pyright, which costs no test a second.
    A function that a test calls a thousand times is checked the first times only.
    """

    def decorate(thing: Any) -> Any:
        hints = inspect.get_annotations(thing).values()
        if any(isinstance(hint, str) for hint in hints):
            return _jaxtyped(typechecker=typechecker)(thing)
        if not any("jaxtyping." in repr(hint) for hint in hints):
            return thing
        if inspect.isfunction(thing):
            checked = _jaxtyped(typechecker=None)(typechecker(thing))
            return thing if checked is thing else first_calls(checked, thing)
        return _jaxtyped(typechecker=typechecker)(thing)

    return decorate


# what imports under test decorate with; --jaxtyping-packages in pyproject.toml says which
jaxtyping.jaxtyped = jaxtyped


WARMING = pytest.StashKey[subprocess.Popen[bytes]]()


def pytest_configure(config: pytest.Config) -> None:
    """Have what numba compiles compiled once, while the workers import: see `warm.py`."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        program = [sys.executable, str(Path(__file__).with_name("warm.py"))]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        config.stash[WARMING] = subprocess.Popen(program, **silent)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Wait for the program, which has ended long before unless few tests were asked for."""
    if (warming := config.stash.get(WARMING, None)) is not None:
        warming.wait()


def pytest_collection_finish() -> None:
    """Keep what is imported out of later collections: one of all its objects takes a second."""
    gc.collect()
    gc.freeze()


SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def prepared(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepare each corpus once for all tests and the processes that they start."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["LMMONO_CACHE"] = str(folder / "corpora")


@pytest.fixture
def shared() -> Path:
    """Folder with real text and reference outputs; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the reference data in {SHARED.name}/ beside the checkout")
    return SHARED
