"""What is in a model's folder, so that one whose weights change in place is another model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from .errors import SpaceError
from .keys import canonical

DOCUMENTS: Final = frozenset({".md"})
OF_OTHERS: Final = DOCUMENTS | {".h5", ".msgpack", ".onnx", ".ot"}
"""Suffixes of files from which PyTorch makes no vector: documents, and weights of other frameworks."""
FOLDERS_OF_OTHERS: Final = frozenset({"onnx", "openvino"})

SMALL: Final = 1 << 20
"""Bytes up to which a file is hashed each time; what a larger one gave is remembered."""
SETTLED: Final = 10.0
"""Seconds after a file's last change from which its digest is remembered: within a tick of the file system's clock,
a second change leaves no trace in its times."""
REMEMBERED: Final = 1000


def digest(folder: Path, *, pytorch: bool = False) -> str:
    """Return the SHA-256, in hex, of what decides the vectors of the model in a folder.

    It is taken over the relative name and the SHA-256 of every file, except hidden ones and documents (``.md``): where
    the folder lies and how old it is changes nothing. With ``pytorch`` the weights of other frameworks do not count
    either, :data:`OF_OTHERS` and :data:`FOLDERS_OF_OTHERS`.

    Raises:
        SpaceError: a file cannot be read.
    """
    memo = _Memo()
    try:
        files = {file.relative_to(folder).as_posix(): memo.sha256(file) for file in _files(folder, pytorch)}
    except OSError as error:
        raise SpaceError(f"the model's folder cannot be read: {error}") from error
    memo.save()
    return hashlib.sha256(b"embedonce/model-folder/1" + canonical(files)).hexdigest()


def _files(folder: Path, pytorch: bool) -> Iterator[Path]:
    left_out = OF_OTHERS if pytorch else DOCUMENTS
    folders_left_out = {"__pycache__", *(FOLDERS_OF_OTHERS if pytorch else ())}
    seen = set()
    for where, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(where)
        folders[:] = sorted(name for name in folders if name not in folders_left_out and not name.startswith("."))
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() not in left_out:
                yield Path(where, name)


def _raise(error: OSError) -> None:
    raise error


class _Memo:
    """Digests of large files, by what changes whenever their content does; a file of the user's cache folder.

    Hashing 90 MB takes 0.2 s and 2 GB several seconds, which a warm start must not pay each time.
    """

    def __init__(self) -> None:
        import platformdirs

        self._file = platformdirs.user_cache_path("embedonce", appauthor=False) / "model-files.json"
        self._known: dict[str, str] | None = None
        self._new: dict[str, str] = {}

    def sha256(self, file: Path) -> str:
        with file.open("rb") as stream:
            before = os.fstat(stream.fileno())
            identity = _identity(before)
            known = self._read().get(identity) if before.st_size > SMALL else None
            if known is not None:
                return known
            made = hashlib.file_digest(stream, "sha256").hexdigest()
            settled = time.time() - max(before.st_ctime, before.st_mtime) > SETTLED
            if before.st_size > SMALL and settled and _identity(os.fstat(stream.fileno())) == identity:
                self._new[identity] = made
            return made

    def _read(self) -> dict[str, str]:
        if self._known is None:
            self._known = {}
            with contextlib.suppress(OSError, ValueError):  # what is lost is worked out again
                content = json.loads(self._file.read_text("utf-8"))
                self._known = {key: value for key, value in content.items() if isinstance(value, str)}
        return self._known

    def save(self) -> None:
        if not self._new:
            return
        kept = list((self._read() | self._new).items())[-REMEMBERED:]
        own = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # a cache folder that cannot be written costs time, and nothing else
            self._file.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(json.dumps(dict(kept)), "utf-8")
            own.replace(self._file)


def _identity(stat: os.stat_result) -> str:
    """Name a state of a file: the time of its last change (ctime) is the system's own, nobody can set it."""
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
