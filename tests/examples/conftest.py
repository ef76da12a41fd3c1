"""What tests of examples share."""

from __future__ import annotations

import pytest


@pytest.fixture
def patient_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk tier of an example's configuration take its time: a busy machine is no fault."""
    monkeypatch.setenv("EMBEDONCE__TIERS__DISK__TIMEOUT", "60s")
