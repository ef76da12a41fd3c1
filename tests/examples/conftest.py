"""Fixtures that the tests of examples share."""

from __future__ import annotations

import pytest


@pytest.fixture
def patient_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the timeout of the disk tier in an example's configuration, for busy machines."""
    monkeypatch.setenv("EMBEDONCE__TIERS__DISK__TIMEOUT", "60s")
