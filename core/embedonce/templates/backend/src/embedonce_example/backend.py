"""A backend that stores each vector as a file in one folder. Replace the methods' bodies with calls to your store."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from embedonce import Capabilities, hookimpl
from embedonce.options import Doc

api = 1
"""Version of the plugin contract that this module implements."""


class ExampleBackend:
    """Stores frames (bytes) under keys. Each keyword argument of ``__init__`` is an option in TOML."""

    # Declare only what this class implements, because the conformance tests check every declared capability.
    # The scope says who shares the entries: "process", "single" (one process at a time), "host" or "network".
    capabilities = Capabilities(scope="host", delete=True, scan=True)

    def __init__(self, *, path: Annotated[Path, Doc("Folder for the files.")]) -> None:
        self._path, self._closed = path, False
        path.mkdir(parents=True, exist_ok=True)

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, bytes]:
        """Return the frames of the keys that are stored; leave out missing keys."""
        found: dict[str, bytes] = {}
        for key in keys:
            try:
                found[key] = self._file(key).read_bytes()
            except FileNotFoundError:
                continue
        return found

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item. A file gets its final name when it is complete, so no reader sees an incomplete file."""
        for key, frame in items.items():
            target = self._file(key)
            with tempfile.NamedTemporaryFile(dir=self._path, suffix="~", delete=False) as file:
                file.write(frame)
            os.replace(file.name, target)

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys; ignore missing keys."""
        for key in keys:
            self._file(key).unlink(missing_ok=True)

    def scan(self, prefix: str, /) -> Iterator[str]:
        """Yield every key that starts with ``prefix``."""
        self._file(prefix)
        return (name for name in os.listdir(self._path) if name.startswith(prefix) and not name.endswith("~"))

    def close(self) -> None:
        """Release open resources; a second call does nothing."""
        self._closed = True

    def _file(self, key: str) -> Path:
        # Keys consist of a-z, 0-9 and full stops, so nothing needs escaping.
        if self._closed:
            raise RuntimeError("the backend is closed")
        return self._path / key


@hookimpl
def embedonce_backends() -> Mapping[str, type[ExampleBackend]]:
    """Register the backend under its name in TOML."""
    return {"example": ExampleBackend}
