"""Importers and a provider for tests of ``embedonce import``. The tests install this module as a plugin."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import embedonce
from embedonce.contracts import Embedded, FoundVectors, Source, Task
from embedonce.errors import SourceError
from embedonce.testing import CountingProvider

PART = 100
"""Number of texts in a part of a scan."""


class LoggingProvider(CountingProvider):
    """Appends the task and the text of each computation to the file ``log``, as lines of JSON."""

    def __init__(
        self,
        *,
        log: Path,
        model: str = "counting",
        symmetric: bool = True,
        tells_dimensions: bool = True,
        dimensions: int = 8,
        refuses: Sequence[str] = (),
        is_down: bool = False,
    ) -> None:
        super().__init__(model=model, symmetric=symmetric, tells_dimensions=tells_dimensions, dimensions=dimensions)
        self._log = log
        self._refuses = refuses
        self._is_down = is_down

    def _answer(self, texts: Sequence[str], task: Task) -> Embedded:
        if self._is_down:
            raise ConnectionError("the provider is down")
        bad = [place for place, text in enumerate(texts) if text in self._refuses]
        if bad:
            raise embedonce.errors.TextRefused("too long", bad)
        with self._log.open("a") as file:
            file.writelines(f"{json.dumps([task, text])}\n" for text in texts)
        return super()._answer(texts, task)


class Shelf:
    """Reads lines of JSON: a text and its vector. A vector that is a text counts as unreadable."""

    def __init__(
        self,
        *,
        path: Path | None = None,
        url: str | None = None,
        shelf: Literal["upper", "lower"] = "lower",
        rows: int | None = None,
        password: str = "",
        task_of: str | None = None,
        mixing: str = "",
        fails: Literal["", "source", "client", "bug", "library", "strange", "unasked"] = "",
        stop_after: int | None = None,
    ) -> None:
        if path is None and url is None:
            raise ValueError("give a path or a url")
        if password == "leak":
            raise ValueError(f"the password {password} is too short")
        self._path = Path(str(url).partition("://")[2]) if path is None else path
        self._rows = rows
        self._secret = password or str(url)
        self._fails = fails
        self._stop_after = stop_after
        self._scans = 0
        self.source = Source(f"the shelf {self._path.name}", task=task_of, mixing=mixing)

    def check(self) -> None:
        if not self._path.exists():
            raise SourceError(f"there is no shelf {self._path.name}; check the path")
        if self._fails == "source":
            raise SourceError(f"cannot log in with {self._secret}")
        if self._fails == "client":
            raise ConnectionRefusedError(111, "Connection refused")
        if self._fails == "library":
            importlib.import_module("a_library_that_is_missing")

    def scan(self) -> Iterator[FoundVectors]:
        rows = self._read()
        self._scans += 1
        for start in range(0, len(rows), PART):
            if self._fails == "bug":
                raise KeyError(rows[0][0])
            # The first scan is that of the verification.
            if self._scans == 2 and self._stop_after is not None and start >= self._stop_after:
                self._path.with_suffix(".stopped").touch()
                threading.Event().wait()
            yield self._make_found(rows[start : start + PART])

    def count(self) -> int | None:
        return len(self._read())

    def lookup(self, texts: Sequence[str]) -> FoundVectors:
        wanted = set(texts)
        if self._fails == "unasked":
            wanted |= {text for text, _ in self._read()}
        return self._make_found([row for row in self._read() if row[0] in wanted])

    def close(self) -> None: ...

    def _read(self) -> list[tuple[Any, Any]]:
        lines = self._path.read_text().splitlines()[: self._rows]
        return [(row["text"], row["vector"]) for row in map(json.loads, lines)]

    def _make_found(self, rows: Sequence[tuple[Any, Any]]) -> Any:
        if self._fails == "strange":
            return [vector for _, vector in rows]
        readable = [row for row in rows if not isinstance(row[1], str)]
        unreadable = {"not a list": len(rows) - len(readable)} if len(readable) < len(rows) else {}
        return FoundVectors([text for text, _ in readable], [vector for _, vector in readable], unreadable)


class Pile(Shelf):
    """A shelf that can only be scanned."""

    lookup = None  # type: ignore[assignment]


class Drawer(Shelf):
    """A shelf that can only be asked for texts."""

    scan = None  # type: ignore[assignment]
    count = None  # type: ignore[assignment]


class Cupboard:
    """Reads nothing, and its location has another name."""

    def __init__(self, *, place: str) -> None: ...


class Wire(Shelf):
    """Reads from a server."""

    def __init__(self, *, url: str, size: int) -> None:
        super().__init__(url=url)


@embedonce.hookimpl
def embedonce_importers() -> dict[str, type[Any]]:
    return {"shelf": Shelf, "pile": Pile, "drawer": Drawer, "cupboard": Cupboard, "wire": Wire}


@embedonce.hookimpl
def embedonce_providers() -> dict[str, type[Any]]:
    return {"logging": LoggingProvider}
