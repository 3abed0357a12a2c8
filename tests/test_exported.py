"""The public names: listed once and sorted, importable, and free until they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import activation_store
import lmmono

HEAVY = ("torch", "transformers", "datasets", "duckdb", "pyarrow", "sae_lens", "transformer_lens")


def names_for_type_checkers() -> set[str]:
    """Names that a type checker sees through the guarded imports of `lmmono/__init__.py`."""
    tree = ast.parse(Path(lmmono.__file__).read_text())
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports for alias in node.names}


def test_public_names_are_sorted_and_the_same_for_people_and_type_checkers():
    assert lmmono.__all__ == sorted(lmmono.__all__)
    assert names_for_type_checkers() == set(lmmono.__all__)
    homes = [name for names in lmmono._HOMES.values() for name in names]
    assert sorted(homes) == lmmono.__all__
    assert dir(lmmono) == lmmono.__all__


@pytest.mark.parametrize("name", lmmono.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name):
    assert getattr(lmmono, name).__doc__


@pytest.mark.parametrize("name", activation_store.__all__)
def test_every_public_name_of_the_store_is_there_whatever_was_imported_before(name):
    import activation_store.catalog.compaction
    import activation_store.catalog.verification
    import activation_store.read.exporting

    assert activation_store.__all__ == sorted(activation_store.__all__)
    found = getattr(activation_store, name)
    assert callable(found) and found.__doc__


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'lmmono' has no attribute 'trian'"):
        lmmono.trian  # noqa: B018


def test_importing_the_package_and_reading_recipes_loads_nothing_heavy():
    script = (
        "import sys, lmmono, lmmono.cli.app\n"
        "lmmono.Recipe, lmmono.open_run, lmmono.LmmonoError\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
