"""Reads the bundles of a session, as the last tier of every cache, and writes them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedonce.contracts import Capabilities
from embedonce.errors import StoreExists
from embedonce.keys import CARD_PREFIX, KEY_PREFIX
from embedonce.plugins import backend
from embedonce.vectors import Entry

from ._pytest_recording import Recorded

AT_ONCE = 1024
"""Number of entries that are copied in one step."""


class SessionStore:
    """The bundle of the test that runs now, as a backend.

    ``forget`` and ``purge`` remove texts from the other tiers of a cache, and leave the bundle as it is.
    """

    capabilities = Capabilities(
        holds="either", scope="host", blocking=False, deadline=True, delete=True, scan=True, count=True, bounded=True
    )

    def __init__(self, choose_path: Callable[[], Path], *, skips_damaged: bool) -> None:
        self._choose_path = choose_path
        self._skips_damaged = skips_damaged
        self._opened: dict[Path, Any] = {}
        self._lock = threading.RLock()

    def open(self, path: Path) -> Any:
        """Return the backend of a bundle; None if there is no bundle, or if it is damaged and the session records."""
        with self._lock:
            if path not in self._opened:
                self._opened[path] = self._open(path)
            return self._opened[path]

    def _open(self, path: Path) -> Any:
        if not (path / "manifest.json").exists():
            return None
        try:
            return backend("bundle")(path=path)
        except Exception:
            if self._skips_damaged:
                return None
            raise

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, Any]:
        bundle = self.open(self._choose_path())
        return {} if bundle is None else bundle.get_many(keys)

    def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None:
        """Store nothing: the answers of calls are recorded, and not what is written to tiers."""

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove nothing."""

    def scan(self, prefix: str, /) -> Iterable[str]:
        return ()

    def count(self, prefix: str, /) -> int:
        return 0

    def close(self) -> None:
        """Close the bundles. They are opened again if they are needed."""
        with self._lock:
            for bundle in self._opened.values():
                if bundle is not None:
                    bundle.close()
            self._opened.clear()


def find_obstacle(path: Path) -> str | None:
    """Return why a bundle cannot be written to a folder; None if it can."""
    try:
        backend("bundle").create_writer(path, replace=True).close()
    except (StoreExists, OSError) as error:
        return str(error)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenBundle:
    """What a session has changed in a bundle."""

    texts: int
    """Number of texts in the bundle."""
    new: int
    removed: int
    unneeded: int
    """Number of texts that the session did not need, and that are kept."""


def write_bundle(store: SessionStore, path: Path, recorded: Recorded, *, removes_unneeded: bool) -> WrittenBundle:
    """Write what a session has recorded, together with what the bundle has. If nothing has changed, write nothing.

    Raises:
        StoreExists, OSError: the bundle cannot be written.
    """
    old = store.open(path)
    held = {key for key in old.scan(KEY_PREFIX) if not key.startswith(CARD_PREFIX)} if old is not None else set()
    replaced = held & recorded.new.keys()
    unneeded = held - recorded.needed
    kept = held - replaced - (unneeded if removes_unneeded else set())
    written = WrittenBundle(
        texts=len(kept) + len(recorded.new),
        new=len(recorded.new),
        removed=len(unneeded) if removes_unneeded else 0,
        unneeded=0 if removes_unneeded else len(unneeded),
    )
    if not written.new and not written.removed:
        return written
    writer = backend("bundle").create_writer(path, replace=True)
    try:
        keys = sorted(kept | recorded.new.keys())
        for start in range(0, len(keys), AT_ONCE):
            window = keys[start : start + AT_ONCE]
            copied = old.get_many([key for key in window if key in kept]) if old is not None else {}
            values = {key: recorded.new.get(key) or copied.get(key) for key in window}
            writer.add({key: value for key, value in values.items() if value})  # a damaged row is b""
        scopes = sorted({key.split(".", 2)[1] for key in keys})
        cards: dict[str, Entry | bytes] = {f"{CARD_PREFIX}{scope}": recorded.cards[scope] for scope in recorded.cards}
        if old is not None:
            cards |= old.get_many([CARD_PREFIX + scope for scope in scopes])
        writer.add({key: card for key, card in cards.items() if key.removeprefix(CARD_PREFIX) in scopes and card})
        store.close()  # a file that is open cannot be removed on every system
        writer.commit()
    finally:
        writer.close()
    return written
