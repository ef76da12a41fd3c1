"""Checks that the library of an importer is installed."""

from __future__ import annotations

from importlib.util import find_spec


def require_package(package: str) -> None:
    """Check that a package is installed, without importing it.

    Importers call this in their constructors. embedonce then says which extra to install.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
