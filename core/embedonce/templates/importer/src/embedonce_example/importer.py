"""An importer that reads a folder of JSON files. Replace the methods' bodies with reads of your store."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from embedonce import hookimpl
from embedonce.contracts import FoundVectors, Source
from embedonce.errors import SourceError
from embedonce.options import Doc

api = 1
"""Version of the plugin contract that this module implements."""

PART = 1000
"""Number of files that are read for one part of a scan."""


def make_file_name(text: str) -> str:
    """Return the name of the file in which the other program stores the vector of a text."""
    return sha256(text.encode()).hexdigest() + ".json"


class ExampleImporter:
    """Finds vectors that another program has stored. Each keyword argument of ``__init__`` is an option."""

    def __init__(self, *, path: Annotated[Path, Doc("Folder of the files.")]) -> None:
        # Open nothing here, so that a missing store is an error of the first call and not of the configuration.
        self._path = path

    @property
    def source(self) -> Source:
        """Describe the store. The name contains all options that determine which vector a text gets."""
        return Source(f"example files in {self._path}", task="document")

    def check(self) -> None:
        """Open the store.

        Raises:
            SourceError: the folder is missing.
        """
        if not self._path.is_dir():
            raise SourceError(f"there is no folder {self._path}; check the option path")

    # If the key of a vector cannot be made from its text, delete this method.
    def lookup(self, texts: Sequence[str], /) -> FoundVectors:
        """Return the texts that the store has, with their vectors; leave out the other texts."""
        self.check()
        return self._read_files(map(make_file_name, texts))

    # If the store does not keep the texts, delete this method and count.
    def scan(self) -> Iterator[FoundVectors]:
        """Yield all texts with their vectors, in the same order each time."""
        names = self._list_files()
        for start in range(0, len(names), PART):
            yield self._read_files(names[start : start + PART])

    def count(self) -> int | None:
        """Return about how many texts ``scan`` yields."""
        return len(self._list_files())

    def close(self) -> None:
        """Close files and connections; a second call does nothing."""

    def _list_files(self) -> list[str]:
        self.check()
        return sorted(name for name in os.listdir(self._path) if name.endswith(".json"))

    def _read_files(self, names: Iterable[str]) -> FoundVectors:
        texts: list[str] = []
        vectors: list[list[float]] = []
        unreadable = 0
        for name in names:
            try:
                record = json.loads((self._path / name).read_bytes())
            except FileNotFoundError:  # a miss
                continue
            except ValueError:
                record = None
            # A value that cannot be read is counted. It is not an error, and never a wrong vector.
            if _is_record(record) and make_file_name(record["text"]) == name:
                texts.append(record["text"])
                vectors.append(record["vector"])
            else:
                unreadable += 1
        return FoundVectors(texts, vectors, {"not a record with a text and a vector": unreadable} if unreadable else {})


def _is_record(record: Any) -> bool:
    """Return whether a file has a text and a non-empty, flat list of numbers."""
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        return False
    vector = record.get("vector")
    return isinstance(vector, list) and bool(vector) and all(type(value) in (int, float) for value in vector)


@hookimpl
def embedonce_importers() -> Mapping[str, type[ExampleImporter]]:
    """Register the importer under its name."""
    return {"example": ExampleImporter}
