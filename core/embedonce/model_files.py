"""A digest of a model's folder, so that a model whose weights change in place counts as a different model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ._cache_folder import NoCacheFolder, find_cache_path
from .errors import SpaceError
from .keys import canonical

DOCUMENTS: Final = frozenset({".md"})
OTHER_FRAMEWORKS: Final = DOCUMENTS | {".h5", ".msgpack", ".onnx", ".ot"}
"""Suffixes of files that PyTorch does not use for vectors: documents, and weights of other frameworks."""
OTHER_FRAMEWORK_FOLDERS: Final = frozenset({"onnx", "openvino"})

SMALL: Final = 1 << 20
"""Maximum size, in bytes, of a file that is hashed every time. The digests of larger files are remembered."""
SETTLED: Final = 10.0
"""The digest of a file is remembered only if the last change of the file is more than this number of seconds ago. Two
changes within one tick of the file system's clock give the file the same times. If the file was hashed between two such
changes, a remembered digest of the earlier content would be used for the later content."""
REMEMBERED: Final = 1000
"""Maximum number of remembered digests; the oldest digests are removed first."""


def digest(folder: Path, *, pytorch: bool = False) -> str:
    """Return the SHA-256, in hex, of the files that determine the vectors of the model in a folder.

    The digest covers the relative name and the SHA-256 of every file, except hidden files and documents (``.md``). The
    digest does not depend on the path or the age of the folder. With ``pytorch``, the digest also leaves out the
    weights of other frameworks: files with a suffix in :data:`OTHER_FRAMEWORKS`, and folders with a name in
    :data:`OTHER_FRAMEWORK_FOLDERS`.

    Raises:
        SpaceError: a file cannot be read.
    """
    memo = _Memo()
    try:
        files = {file.relative_to(folder).as_posix(): memo.sha256(file) for file in _list_files(folder, pytorch)}
    except OSError as error:
        raise SpaceError(f"cannot read the model's folder: {error}") from error
    memo.save()
    return hashlib.sha256(b"embedonce/model-folder/1" + canonical(files)).hexdigest()


def _list_files(folder: Path, pytorch: bool) -> Iterator[Path]:
    skipped_suffixes = OTHER_FRAMEWORKS if pytorch else DOCUMENTS
    skipped_folders = {"__pycache__", *(OTHER_FRAMEWORK_FOLDERS if pytorch else ())}
    seen = set()
    for where, folders, files in os.walk(folder, followlinks=True, onerror=_raise_error):
        real = os.path.realpath(where)
        folders[:] = sorted(name for name in folders if name not in skipped_folders and not name.startswith("."))
        if real in seen:  # a link led back to this folder
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() not in skipped_suffixes:
                yield Path(where, name)


def _raise_error(error: OSError) -> None:
    raise error


class _Memo:
    """Digests of large files, kept in a file of the user's cache folder; see :func:`_identify` for the keys.

    Hashing 90 MB takes 0.2 s, and hashing 2 GB takes several seconds. That would be too long at every warm start.
    """

    def __init__(self) -> None:
        self._file: Path | None = None
        with contextlib.suppress(NoCacheFolder):  # without this folder, digests are computed again at each start
            self._file = find_cache_path("model-files.json")
        self._known: dict[str, str] | None = None
        self._new: dict[str, str] = {}

    def sha256(self, file: Path) -> str:
        with file.open("rb") as stream:
            before = os.fstat(stream.fileno())
            identity = _identify(before)
            known = self._read().get(identity) if before.st_size > SMALL else None
            if known is not None:
                return known
            computed = hashlib.file_digest(stream, "sha256").hexdigest()
            is_settled = time.time() - max(before.st_ctime, before.st_mtime) > SETTLED
            if before.st_size > SMALL and is_settled and _identify(os.fstat(stream.fileno())) == identity:
                self._new[identity] = computed
            return computed

    def _read(self) -> dict[str, str]:
        if self._known is None:
            self._known = {}
            if self._file is None:
                return self._known
            with contextlib.suppress(OSError, ValueError):  # if the file cannot be read, digests are computed again
                content = json.loads(self._file.read_text("utf-8"))
                self._known = {key: value for key, value in content.items() if isinstance(value, str)}
        return self._known

    def save(self) -> None:
        if not self._new or self._file is None:
            return
        kept = list((self._read() | self._new).items())[-REMEMBERED:]
        temporary = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # if the file cannot be written, the next start computes the digests again
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(dict(kept)), "utf-8")
            temporary.replace(self._file)


def _identify(stat: os.stat_result) -> str:
    """Return a string that changes when a file changes, except for changes within one tick of the file system's clock.

    The string contains the ctime, because no program can set it.
    """
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
