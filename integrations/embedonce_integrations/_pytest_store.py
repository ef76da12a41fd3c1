"""Reads the bundles of a session, as the last tier of every cache, and writes them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedonce.contracts import Capabilities
from embedonce.errors import StoreBusy, StoreExists
from embedonce.keys import CARD_PREFIX, KEY_PREFIX
from embedonce.plugins import backend
from embedonce.vectors import Entry

from ._pytest_recording import Recorded

AT_ONCE = 1024
"""Number of entries that are copied in one step."""

MAX_WAIT = 60.0
"""Seconds for which a session waits until another one has written the same bundle."""
POLL = 0.05


class SessionStore:
    """The bundle of the test that runs now, as a backend.

    ``forget`` and ``purge`` remove texts from the other tiers of a cache, and leave the bundle as it is.
    """

    capabilities = Capabilities(
        holds="either", scope="host", blocking=False, deadline=True, delete=True, scan=True, count=True, bounded=True
    )

    def __init__(self, choose_path: Callable[[], Path], *, lists_texts: bool) -> None:
        self._choose_path = choose_path
        self._lists_texts = lists_texts
        self.texts: dict[Path, set[str]] = {}
        """Per bundle, the keys of the texts that it had when this session opened it first, if ``lists_texts`` is set.
        """
        self._opened: dict[Path, Any] = {}
        self._lock = threading.RLock()

    def open(self, path: Path) -> Any:
        """Return the backend of a bundle; None if there is no bundle.

        Raises:
            ConfigError, OSError: there is a bundle, and it cannot be read.
        """
        with self._lock:
            if path not in self._opened:
                has_bundle = (path / "manifest.json").exists()
                self._opened[path] = backend("bundle")(path=path) if has_bundle else None
                if self._lists_texts and path not in self.texts:
                    self.texts[path] = _list_texts(self._opened[path])
            return self._opened[path]

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
    """Return why a bundle cannot be written to a folder; None if it can. Nothing is changed."""
    if not os.path.lexists(path):
        parent = next(folder for folder in path.parents if os.path.lexists(folder))
        if not parent.is_dir():
            return f"{parent} is not a folder"
        return None if os.access(parent, os.W_OK | os.X_OK) else f"{parent} cannot be written to"
    try:
        backend("bundle").create_writer(path, replace=True).close()
    except StoreBusy:
        return None  # another session writes its bundle, and will have finished when this one writes
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

    What another session has added to the bundle meanwhile is kept.

    Raises:
        StoreExists, ConfigError, OSError: the bundle cannot be written.
    """
    store.open(path)
    before = store.texts[path]
    unneeded = before - recorded.needed
    if not recorded.new and not (removes_unneeded and unneeded):
        return WrittenBundle(texts=len(before), new=0, removed=0, unneeded=len(unneeded))
    store.close()
    writer = _create_writer(path)  # from here on, no other session can change the bundle
    try:
        old = store.open(path)
        held = _list_texts(old)
        kept = held - recorded.new.keys() - (unneeded if removes_unneeded else set())
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
    return WrittenBundle(
        texts=len(keys),
        new=len(recorded.new),
        removed=len(held & unneeded) if removes_unneeded else 0,
        unneeded=0 if removes_unneeded else len(unneeded),
    )


def _list_texts(bundle: Any) -> set[str]:
    """Return the keys of the texts in a bundle, or in none."""
    return set() if bundle is None else {key for key in bundle.scan(KEY_PREFIX) if not key.startswith(CARD_PREFIX)}


def _create_writer(path: Path) -> Any:
    """Return a writer of a bundle, as soon as no other session writes it."""
    end = time.monotonic() + MAX_WAIT
    while True:
        try:
            return backend("bundle").create_writer(path, replace=True)
        except StoreBusy:
            if time.monotonic() > end:
                raise
            time.sleep(POLL)
