"""Shared test settings: where the real text lies, and a skip with its reason where it does not."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# a busy machine is no fault
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

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
