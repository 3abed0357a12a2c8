"""The public names: listed once and sorted, importable, and free until they are used."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import activation_store
import lmmono

HEAVY = (
    *("torch", "transformers", "datasets", "duckdb", "pyarrow", "numpy", "scipy"),
    *("sae_lens", "transformer_lens"),
)
ROOT = Path(lmmono.__file__).parent
STUBS = sorted(ROOT.rglob("__init__.pyi"))
PACKAGES = [".".join(stub.parent.relative_to(ROOT.parent).parts) for stub in STUBS]


def test_the_package_has_about_thirty_names_and_the_rest_in_its_rooms():
    rooms = {package.rpartition(".")[2] for package in PACKAGES} | {"planted"}
    names = [name for name in lmmono.__all__ if name not in rooms]
    assert lmmono.__all__ == sorted(lmmono.__all__) == dir(lmmono)
    assert len(names) <= 40


@pytest.mark.parametrize(("stub", "package"), [*zip(STUBS, PACKAGES, strict=True)], ids=PACKAGES)
def test_a_stub_lists_each_name_once_as_type_checkers_export_it(stub, package):
    imports = ast.parse(stub.read_text()).body
    assert all(isinstance(node, ast.ImportFrom) and len(node.names) == 1 for node in imports)
    aliases = [node.names[0] for node in imports]
    assert all(alias.asname == alias.name for alias in aliases), "x as x: else it is private"
    assert sorted(alias.name for alias in aliases) == import_module(package).__all__


@pytest.mark.parametrize(
    ("package", "name"), [(p, name) for p in PACKAGES for name in import_module(p).__all__]
)
def test_every_public_name_is_there_and_says_what_it_is(package, name):
    assert getattr(import_module(package), name).__doc__
    # an imported submodule of the name would hide it
    modules = {path.stem for path in Path(import_module(package).__file__).parent.glob("*.py")}
    assert name not in modules


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
        "lmmono.Recipe, lmmono.open_run, lmmono.LmmonoError, lmmono.tasks, lmmono.interop\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
