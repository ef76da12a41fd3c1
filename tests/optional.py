"""What the quick set does without: `make quick` installs no optional library, and starts no server.

`make quick` sets ``QUICK``. A test that needs a library says so, and is skipped there where the library is missing.
Without ``QUICK`` this file skips nothing, so that `make test` fails where a library is missing.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

QUICK = bool(os.environ.get("QUICK"))


def needs(library: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test of the quick set where ``library`` is not installed."""
    missing = QUICK and importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"make quick does not install {library}; make test runs this test")
