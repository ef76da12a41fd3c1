"""Fixtures of every test: a separate home folder, no outside settings, no hypothesis deadlines, long tier timeouts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from optional import QUICK

# These modules have fixtures for a model and for Redis, Postgres and memcached. A server starts on its first use.
pytest_plugins = ["servers", "minilm"]

# Frameworks must send no statistics and download nothing; they read these variables at import.
os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run in parallel, and models that each use every core would slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadlines, because a shared CI machine is slow at times. `print_blob` prints how to repeat a failure elsewhere.
_common = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", _common, max_examples=50)
settings.register_profile("quick", _common, max_examples=20)
settings.register_profile("thorough", _common, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("quick" if QUICK else "default"))

PATIENT = 60.0
"""Timeout in seconds of tiers for which a test sets no timeout. It is far longer than a busy machine needs."""


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep tests and their child processes away from the user's caches and settings."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.upper().startswith("EMBEDONCE")]:
            patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("USERPROFILE", str(home))
        for kind in ("CACHE", "CONFIG", "DATA", "STATE"):
            patch.setenv(f"XDG_{kind}_HOME", str(home / kind.lower()))
        # Clients of HTTP load all authorities for each client, in 0.05 s, although tests use TLS only with servers of
        # their own. This file has one authority.
        patch.setenv("SSL_CERT_FILE", str(Path(__file__).with_name("authority.pem")))
        # Test runs of plugins, in processes of their own, need only hypothesis beside pytest. The frameworks bring more
        # plugins of pytest, which take longer to import than the tests of a plugin take to run.
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        patch.setenv("PYTEST_PLUGINS", "_hypothesis_pytestplugin")
        patch.setenv("COLUMNS", "120")
        patch.setenv("NO_COLOR", "1")
        yield home


@pytest.fixture(scope="session", autouse=True)
def shipped_timeouts() -> Iterator[Mapping[str, float | None]]:
    """Give a long timeout to every tier for which a test sets no timeout, and return the original default timeouts.

    A busy machine sometimes suspends a thread for a second. With the default timeout, a healthy store would then
    count as hanging: a hit would become a miss, and a write would be dropped. Tests of timeouts set their own
    timeouts.
    """
    from embedonce._engine import backend_calls

    shipped = dict(backend_calls.DEFAULT_TIMEOUTS)
    patient = {scope: None if seconds is None else PATIENT for scope, seconds in shipped.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend_calls, "DEFAULT_TIMEOUTS", patient)
        yield shipped
