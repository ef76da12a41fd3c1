"""Where the bundle of a test is, and the cache of the project's configuration."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

import embedonce
from embedonce import Cache
from embedonce.config import read_bundle
from embedonce.errors import ConfigError

DEFAULT = Path("tests", "embeddings")
MARKER = "embedonce"


def open_cache(root: Path) -> Cache:
    """Return the cache of the configuration in pytest's root folder, or of the one that ``embedonce.open()`` finds."""
    files = [] if os.environ.get("EMBEDONCE_CONFIG") else list(_read_configurations(root).items())
    # A table that only has `bundle` configures no cache.
    return embedonce.open(next((file for file, content in files if content.keys() != {"bundle"}), None))


def find_bundle(root: Path) -> Path:
    """Return the folder of the bundle for tests whose marker names no other.

    Raises:
        pytest.UsageError: a configuration in the root folder has an invalid ``bundle``.
    """
    try:
        chosen = [read_bundle(file) for file in _read_configurations(root)]
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from None
    return _make_absolute(root / next(filter(None, chosen), DEFAULT))


def _read_configurations(root: Path) -> dict[Path, dict[str, Any]]:
    """Return the content of embedonce.toml, and of ``[tool.embedonce]`` in the pyproject.toml, if a folder has them."""
    found: dict[Path, dict[str, Any]] = {}
    for name in ("embedonce.toml", "pyproject.toml"):
        file = root / name
        try:
            content = tomllib.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else None
        except (OSError, ValueError) as error:
            raise pytest.UsageError(f"{file} cannot be read ({type(error).__name__})") from None
        if content is not None and name == "pyproject.toml":
            content = content.get("tool", {}).get("embedonce")
        if isinstance(content, dict):
            found[file] = content
    return found


def choose_bundle(node: pytest.Item | pytest.Collector | pytest.Session, default: Path) -> Path | None:
    """Return the folder of the bundle for a test, or for the fixtures of a module or a session. None: mode "off".

    Raises:
        ValueError: the arguments of the marker are invalid.
    """
    marker = node.get_closest_marker(MARKER)
    if marker is None:
        return default
    wrong = marker.args or marker.kwargs.keys() - {"path", "mode"}
    path, mode = marker.kwargs.get("path"), marker.kwargs.get("mode")
    if wrong or mode not in (None, "off") or not isinstance(path, str | os.PathLike | None):
        raise ValueError(
            'the marker embedonce takes path="FOLDER", relative to the file of the test, or mode="off"; got '
            f"{', '.join([*map(repr, marker.args), *(f'{name}={value!r}' for name, value in marker.kwargs.items())])}"
        )
    if mode == "off":
        return None
    return default if path is None else _make_absolute(node.path.parent / os.fsdecode(path))


def _make_absolute(path: Path) -> Path:
    return Path(os.path.normpath(path.expanduser().absolute()))
