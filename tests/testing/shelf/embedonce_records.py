"""A correct importer, over a file of JSON Lines; the broken importers of the tests derive from it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from embedonce.contracts import FoundVectors, Source, time_left
from embedonce.errors import SourceError
from embedonce.options import Doc

PART = 1000


def write_records(path: Path, texts: Sequence[str], vectors: Any) -> None:
    """Write texts and their vectors, one record of JSON per line."""
    with path.open("w", newline="\n") as file:
        for text, vector in zip(texts, vectors, strict=True):
            file.write(json.dumps({"text": text, "vector": np.asarray(vector).tolist()}) + "\n")


class RecordsImporter:
    """Reads a file in which each line is a record of JSON with a text and a vector."""

    def __init__(self, *, path: Annotated[Path, Doc("The file.")], password: str = "") -> None:
        self.path = path
        self.password = password
        self.closed = False
        self.stalled = threading.Event()
        """Set while the store hangs."""

    def __reduce__(self) -> Any:
        return partial(type(self), path=self.path, password=self.password), ()

    @property
    def source(self) -> Source:
        return Source(f"records in {self.path}")

    def check(self) -> None:
        self.find_rows()

    def lookup(self, texts: Sequence[str], /) -> FoundVectors:
        rows, unreadable = self.find_rows(frozenset(texts))
        return FoundVectors(list(rows), list(rows.values()), unreadable)

    def scan(self) -> Iterator[FoundVectors]:
        rows, unreadable = self.find_rows()
        texts = list(rows)
        for start in range(0, len(texts), PART):
            part = texts[start : start + PART]
            yield FoundVectors(part, [rows[text] for text in part], unreadable if start == 0 else {})

    def count(self) -> int | None:
        return len(self.find_rows()[0])

    def close(self) -> None:
        self.closed = True

    def find_rows(self, wanted: frozenset[str] | None = None) -> tuple[dict[str, Any], Mapping[str, int]]:
        """Return the vectors by text, and the number of unreadable records. ``wanted`` limits the texts."""
        self.wait()
        rows, unreadable = {}, 0
        for record in map(json.loads, self.read().splitlines()):
            if wanted is not None and record["text"] not in wanted:
                continue
            if isinstance(record["vector"], list):
                rows[record["text"]] = np.array(record["vector"], np.float32)
            else:
                unreadable += 1
        return rows, {"the vector is not a list": unreadable} if unreadable else {}

    def read(self) -> str:
        if self.closed:
            raise RuntimeError("the importer is closed")
        try:
            return self.path.read_text()
        except FileNotFoundError:
            raise SourceError(f"there is no file {self.path}; check the option path") from None

    def wait(self) -> None:
        while self.stalled.is_set():
            time_left()  # raises when the deadline has passed


class LooksUpOnly(RecordsImporter):
    """Can only look up."""

    scan = None  # type: ignore[assignment]
    count = None  # type: ignore[assignment]


class ScansOnly(RecordsImporter):
    """Can only scan."""

    lookup = None  # type: ignore[assignment]


class NamesItsSourceByHash(RecordsImporter):
    """Names its source by Python's `hash()`, which differs in every process."""

    @property
    def source(self) -> Source:
        return Source(f"records {hash(str(self.path))}")


class LosesItsPathInAPickle(RecordsImporter):
    """Can be pickled, but a copy that was made with pickle has no path."""

    def __reduce__(self) -> Any:
        return object.__new__, (type(self),)

    def close(self) -> None:
        pass


def damage_record(path: Path, text: str) -> None:
    """Replace the vector of a text by null."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["text"] == text:
            record["vector"] = None
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
