"""Every test of an operation runs with poisoned memory."""

import pytest


@pytest.fixture(autouse=True)
def _poison(poisoned_empty: None) -> None:
    """Applies `poisoned_empty`."""
