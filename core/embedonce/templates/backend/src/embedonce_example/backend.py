"""A backend with a file for each vector, in one folder. Replace what is in the methods by your store."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from embedonce import Capabilities, hookimpl
from embedonce.options import Doc

api = 1
"""The version of the plugin contract that this module is written for."""


class ExampleBackend:
    """Holds frames (bytes) under keys. A keyword argument of ``__init__`` is an option in TOML."""

    # Declare what is there and no more: the conformance tests hold you to it.
    capabilities = Capabilities(scope="host", delete=True, scan=True)

    def __init__(self, *, path: Annotated[Path, Doc("Folder of the files.")]) -> None:
        self._path, self._closed = path, False
        path.mkdir(parents=True, exist_ok=True)

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, bytes]:
        """Return what is there; a key that is not there is absent."""
        found: dict[str, bytes] = {}
        for key in keys:
            try:
                found[key] = self._file(key).read_bytes()
            except FileNotFoundError:
                continue
        return found

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item. A file gets its name when it is whole, so that nobody reads half of it."""
        for key, frame in items.items():
            target = self._file(key)
            with tempfile.NamedTemporaryFile(dir=self._path, suffix="~", delete=False) as file:
                file.write(frame)
            os.replace(file.name, target)

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys; one that is not there is no error."""
        for key in keys:
            self._file(key).unlink(missing_ok=True)

    def scan(self, prefix: str, /) -> Iterator[str]:
        """Yield every key that starts with ``prefix``."""
        self._file(prefix)
        return (name for name in os.listdir(self._path) if name.startswith(prefix) and not name.endswith("~"))

    def close(self) -> None:
        """Let go of what is open; twice does nothing."""
        self._closed = True

    def _file(self, key: str) -> Path:
        # Keys are made of a-z, 0-9 and full stops: nothing needs escaping.
        if self._closed:
            raise RuntimeError("the backend is closed")
        return self._path / key


@hookimpl
def embedonce_backends() -> Mapping[str, type[ExampleBackend]]:
    """Register the backend under the name that TOML says."""
    return {"example": ExampleBackend}
