"""Helpers for tests of the reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embedonce.cli.embedding.passages import Broken, Passage
from embedonce.cli.embedding.sources import Reader


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_items(*paths: Path, **options: Any) -> list[Passage | Broken]:
    return list(Reader([str(path) for path in paths], **options))


def read_texts(*paths: Path, **options: Any) -> list[str]:
    """Return the text of every passage; no item may be broken."""
    items = read_items(*paths, **options)
    assert not [str(one) for one in items if isinstance(one, Broken)]
    return [one.text for one in items if isinstance(one, Passage)]


def read_reasons(*paths: Path, **options: Any) -> list[tuple[int | None, str]]:
    """Return the line and the message of every broken item."""
    items = read_items(*paths, **options)
    return [(one.line, one.reason + one.detail) for one in items if isinstance(one, Broken)]
