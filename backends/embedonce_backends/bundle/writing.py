"""Writing a bundle. The manifest is replaced last, so a killed export leaves the previous bundle, or none."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from embedonce.errors import ConfigError, StoreBusy, StoreExists
from embedonce.keys import CARD_PREFIX
from embedonce.store_writers import WrittenStore
from embedonce.vectors import Dtype, Entry, is_valid_metadata

from .manifest import MANIFEST, Card, PartRecord, make_manifest, parse_manifest
from .opened import UNFINISHED, is_own_file
from .rows import ENTRY_KEY, SCOPE_DIGITS, Layout
from .staging import EncryptedStage, PlainStage, sync_file, sync_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_PART_BYTES: Final = 2_000_000_000
"""Size at which a part is finished. Arrow's texts have offsets of 32 bits, so a part must stay below 2 GiB."""
CHUNK_ITEMS: Final = 2048
CHUNK_BYTES: Final = 2**24
"""Number and size of the items whose columns are made at once."""
_CARD_KEY: Final = re.compile(rf"{re.escape(CARD_PREFIX)}[0-9a-f]{{{SCOPE_DIGITS}}}")

_Kind = tuple[Dtype, int] | None
"""The dtype and the dimensions of the entries in a part; None if they are encrypted."""


class BundleWriter:
    """Writes a new bundle into a folder, as :class:`~embedonce.store_writers.StoreWriter` describes.

    Use it in a ``with`` block, which removes everything that was written unless :meth:`commit` was called. Memory does
    not grow with the number of entries. The folder needs room for the new bundle, and for one more part of 2 GB.
    """

    def __init__(self, path: Path, *, replace: bool = False) -> None:
        """Make the folder if it does not exist, and lock it.

        Raises:
            StoreExists: the folder has a bundle and ``replace`` is False, or it has other files.
            StoreBusy: another writer writes to the folder.
            OSError: the folder cannot be made.
        """
        self.path = Path(path).expanduser().absolute()
        self._has_made_folder = _make_folder(self.path)
        self._lock = _lock_folder(self.path)
        self._last = ""
        self._parts: list[PartRecord] = []
        self._spaces: dict[str, Card] = {}
        self._stages: dict[_Kind, PlainStage | EncryptedStage] = {}
        self._scope = ""
        self._kept: set[str] = set()
        """The parts of the previous bundle, which stays valid until the new one is committed."""
        self._is_open = True
        try:
            self._kept = _check_contents(self.path, replace=replace)
            self._remove_own_files(self._kept)
        except BaseException:
            self._is_open = False
            self._unlock()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, items: Mapping[str, Entry | bytes], /) -> None:
        """Add entries and space cards. The keys of entries must be in ascending order, also from call to call.

        Raises:
            ValueError: a key is out of order, or belongs to neither an entry nor a space card; or an entry is invalid.
            TypeError: the metadata of an entry is not JSON.
            OSError: the bundle cannot be written.
        """
        self._check_open()
        groups: dict[_Kind, dict[str, Entry | bytes]] = {}
        for key, value in items.items():
            match = ENTRY_KEY.fullmatch(key)
            if match is None:
                self._add_card(key, value)
                continue
            if key <= self._last:
                raise ValueError(f"{key}: keys must be added in ascending order, and each key only once")
            if match[1] != self._scope:
                self._add_groups(groups)
                groups = {}
                self._finish_stages()
                self._scope = match[1]
            self._last = key
            kind = None if not isinstance(value, Entry) else (value.dtype, value.vector.size)
            groups.setdefault(kind, {})[key] = value
        self._add_groups(groups)

    def commit(self) -> WrittenStore:
        """Write the rest of the parts and then the manifest, and return what the bundle holds.

        When this returns, the bundle is on the disk. Until the manifest is replaced, the previous bundle is valid.

        Raises:
            OSError: the bundle cannot be written. The previous bundle stays.
        """
        self._check_open()
        self._finish_stages()
        manifest = make_manifest(self._spaces, self._parts)
        written = manifest.write()
        sync_folder(self.path)
        unfinished = self.path / f"{MANIFEST}{UNFINISHED}"
        with unfinished.open("wb") as file:
            file.write(written)
            sync_file(file.fileno())
        os.replace(unfinished, self.path / MANIFEST)
        sync_folder(self.path)
        self._is_open = False
        try:
            self._remove_own_files(manifest.files)
        finally:
            self._unlock()
        return WrittenStore(
            entries=manifest.entries,
            parts=len(manifest.parts),
            bytes=len(written) + sum(part.bytes for part in manifest.parts),
        )

    def close(self) -> None:
        """Remove everything that was written, unless it was committed. A second call does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        for stage in self._stages.values():
            stage.close()
        self._stages = {}
        try:
            self._remove_own_files(self._kept)
            if self._has_made_folder and not any(self.path.iterdir()):
                self.path.rmdir()
        finally:
            self._unlock()

    def _check_open(self) -> None:
        if not self._is_open:
            raise ValueError("this writer is closed; create a new one")

    def _add_card(self, key: str, value: Entry | bytes) -> None:
        if _CARD_KEY.fullmatch(key) is None:
            raise ValueError(f"{key!r} is neither the key of an entry nor the key of a space card")
        card = value.metadata if isinstance(value, Entry) else value
        if card is None or (not isinstance(card, bytes) and not is_valid_metadata(card)):
            raise ValueError(f"{key}: a space card needs metadata that is a JSON object of at most 64 KiB")
        self._spaces[key.removeprefix(CARD_PREFIX)] = card if isinstance(card, bytes) else dict(card)

    def _add_groups(self, groups: Mapping[_Kind, Mapping[str, Entry | bytes]]) -> None:
        for kind, items in groups.items():
            for chunk in _split_items(items):
                stage = self._stages.get(kind)
                if stage is None:
                    stage = self._stages[kind] = (
                        EncryptedStage(self.path) if kind is None else PlainStage(self.path, Layout(*kind))
                    )
                stage.add(chunk)
                if stage.size >= MAX_PART_BYTES:
                    self._finish_stage(kind)

    def _finish_stages(self) -> None:
        for kind in list(self._stages):
            self._finish_stage(kind)

    def _finish_stage(self, kind: _Kind) -> None:
        with self._stages.pop(kind) as stage:
            self._parts.append(stage.write_part(self._scope))

    def _remove_own_files(self, kept: set[str]) -> None:
        """Remove the parts and unfinished files that are not in ``kept``: those of this writer or of a killed one."""
        for path in list(self.path.iterdir()):
            if is_own_file(path.name) and path.name not in kept:
                path.unlink(missing_ok=True)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _split_items(items: Mapping[str, Entry | bytes]) -> Iterator[dict[str, Any]]:
    """Split items into the ones whose columns are made at once."""
    chunk: dict[str, Entry | bytes] = {}
    size = 0
    for key, value in items.items():
        chunk[key] = value
        size += len(value) if isinstance(value, bytes) else value.vector.nbytes
        if len(chunk) >= CHUNK_ITEMS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = {}, 0
    if chunk:
        yield chunk


def _make_folder(path: Path) -> bool:
    """Make the folder and its parents; return whether it did not exist."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        if not path.is_dir():
            raise StoreExists(f"{path} is a file; choose another folder for the bundle") from None
        return False
    return True


def _lock_folder(path: Path) -> int | None:
    """Lock the folder, and return the descriptor that holds the lock; None where folders cannot be locked.

    The system releases the lock if the process is killed. Readers need no lock.

    Raises:
        StoreBusy: another writer holds the lock.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreBusy(f"another export writes to {path} at this moment; wait until it has finished") from None
    except OSError:  # a network file system without locks
        os.close(descriptor)
        return None
    return descriptor


def _check_contents(path: Path, *, replace: bool) -> set[str]:
    """Return the names of the parts of the bundle that is in the folder now.

    Raises:
        StoreExists: the folder has a bundle that must not be replaced, or files of another program.
    """
    names = {found.name for found in path.iterdir()}
    others = {name for name in names - {MANIFEST} if not is_own_file(name)}
    if MANIFEST not in names:
        if others:
            raise StoreExists(
                f"{path} has files that do not belong to a bundle, such as {min(others)!r}; choose another folder"
            )
        return set()
    if not replace:
        raise StoreExists(f"{path} already has a bundle; replace it with --replace, or choose another folder")
    try:
        return parse_manifest((path / MANIFEST).read_bytes(), path).files
    except ConfigError:
        # A damaged bundle, or one of a newer version, may be replaced, but not a file of another program.
        if not others and names != {MANIFEST}:
            return names & {name for name in names if is_own_file(name) and not name.endswith(UNFINISHED)}
        raise StoreExists(
            f"{path / MANIFEST} is not the manifest of a bundle that this embedonce can read; remove the folder, or "
            "choose another one"
        ) from None
