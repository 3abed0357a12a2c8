"""Shared test settings: where the real text lies, and a skip with its reason where it does not."""

from pathlib import Path

import pytest
from hypothesis import settings

# a busy machine is no fault
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture
def shared() -> Path:
    """Folder with real text and reference outputs; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the reference data in {SHARED.name}/ beside the checkout")
    return SHARED
