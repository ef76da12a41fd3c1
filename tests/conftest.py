"""What every test gets: a home of its own, no settings from outside, hypothesis without a clock, patient tiers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from optional import QUICK

# Redis, Postgres and memcached, started when the first test asks for one; and a real model.
pytest_plugins = ["servers", "minilm"]

# Frameworks send no statistics and fetch nothing by themselves: read when they are imported.
os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run side by side: models that each want every core wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shared CI machine is slow at times: that is no reason to fail. `print_blob` lets a failure be replayed elsewhere.
_common = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", _common, max_examples=50)
settings.register_profile("quick", _common, max_examples=20)
settings.register_profile("thorough", _common, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("quick" if QUICK else "default"))

PATIENT = 60.0
"""Seconds that a call to a tier may take in a test which names no timeout: far more than a busy machine needs."""


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep tests, and the processes that they start, off the user's caches and settings."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.upper().startswith("EMBEDONCE")]:
            patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("USERPROFILE", str(home))
        for kind in ("CACHE", "CONFIG", "DATA", "STATE"):
            patch.setenv(f"XDG_{kind}_HOME", str(home / kind.lower()))
        patch.setenv("COLUMNS", "120")
        patch.setenv("NO_COLOR", "1")
        yield home


@pytest.fixture(scope="session", autouse=True)
def shipped_timeouts() -> Iterator[Mapping[str, float | None]]:
    """Let tiers that name no timeout be patient, and return the timeouts that they have otherwise.

    A machine that tests share stops a thread for a second at times. A store that is well would then count as one that
    hangs: its hit would be a miss, its write would be dropped. What a timeout does is tested with one that is named.
    """
    from embedonce._engine import backend_calls

    shipped = dict(backend_calls.DEFAULT_TIMEOUTS)
    patient = {scope: None if seconds is None else PATIENT for scope, seconds in shipped.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend_calls, "DEFAULT_TIMEOUTS", patient)
        yield shipped
