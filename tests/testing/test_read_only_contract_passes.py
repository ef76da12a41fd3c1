"""Correct read-only backends pass every test of their contract."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from embedonce_slate import SlateBackend, damage_slate, write_slate
from read_only_stores import ReadOnlyDict

from embedonce.testing import ReadOnlyContract, Recipe
from embedonce.vectors import Entry


class TestAFile(ReadOnlyContract):
    """Frames in one file, with every optional method."""

    examples = 20
    _folder: TemporaryDirectory[str] | None = None
    _number = 0

    def make(self, items: Mapping[str, Any]) -> SlateBackend:
        self._folder = self._folder or TemporaryDirectory()
        self._number += 1
        path = Path(self._folder.name) / f"{self._number}.slate"
        write_slate(path, items)
        return SlateBackend(path=str(path))

    def reopen(self, backend: Any) -> SlateBackend:
        return SlateBackend(path=backend.path)

    def recipe(self, backend: Any) -> Recipe:
        return Recipe(SlateBackend, {"path": backend.path})

    def damage(self, backend: Any, name: str) -> None:
        damage_slate(Path(backend.path), name)

    def folder(self, backend: Any) -> Path:
        return Path(backend.path)


class TestEntriesInADict(ReadOnlyContract):
    """Entries in this process, without any optional method of the contract."""

    def make(self, items: Mapping[str, Entry]) -> ReadOnlyDict:
        return ReadOnlyDict(items, scope="process", holds="entries", get=True)


class TestEither(ReadOnlyContract):
    """A backend of this process whose values can be damaged."""

    def make(self, items: Mapping[str, Entry]) -> ReadOnlyDict:
        return ReadOnlyDict(items, scope="process")

    def damage(self, backend: Any, name: str) -> None:
        backend.items[name] = b""
        backend.damaged = True


class _Twin:
    def __init__(self, backend: ReadOnlyDict) -> None:
        self._backend = backend

    async def get_many(self, keys: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        return self._backend.get_many(keys)

    async def close(self) -> None:
        pass


class _WithATwin(ReadOnlyDict):
    def twin(self) -> _Twin:
        return _Twin(self)


class TestWithATwin(ReadOnlyContract):
    """A backend with an async client that only reads."""

    def make(self, items: Mapping[str, Entry]) -> ReadOnlyDict:
        return _WithATwin(items, scope="process", twin=True)
