"""Marks for tests that require an optional library. `make quick` installs no such library and starts no server.

`make quick` sets ``QUICK``; then a test whose library is missing is skipped. Without ``QUICK`` this file skips
nothing, so that `make test` fails if a library is missing.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

QUICK = bool(os.environ.get("QUICK"))


def needs(library: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test in `make quick` if ``library`` is not installed."""
    missing = QUICK and not _is_installed(library)
    return pytest.mark.skipif(missing, reason=f"make quick does not install {library}; make test runs this test")


def _is_installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:  # the package that contains it is missing
        return False
