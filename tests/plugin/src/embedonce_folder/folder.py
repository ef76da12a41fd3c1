"""A backend that stores one file per key in a folder."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from embedonce import Capabilities, hookimpl
from embedonce.options import Doc


class FolderBackend:
    capabilities = Capabilities(scope="host")

    def __init__(self, *, path: Annotated[Path, Doc("Folder of the files.")]) -> None:
        self._folder, self._closed = path, False
        path.mkdir(parents=True, exist_ok=True)

    def _file(self, key: str) -> Path:
        if self._closed:
            raise ValueError("the backend is closed")
        return self._folder / key

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, bytes]:
        files = {key: self._file(key) for key in keys}
        return {key: file.read_bytes() for key, file in files.items() if file.exists()}

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        for key, frame in items.items():
            target = self._file(key)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                file.write(frame)
            os.replace(file.name, target)

    def close(self) -> None:
        self._closed = True


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    return {"folder": FolderBackend}
