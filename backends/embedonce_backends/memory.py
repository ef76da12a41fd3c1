"""The memory tier: entries in this process, bounded by number and by bytes.

Entries are not copied. ``get`` returns the same object that was stored. The array of an entry is read-only.
``docs/memory.md`` has the measurements behind the choice of library and of the default policy.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from sys import getsizeof
from typing import Annotated, Any, Literal, NoReturn, Protocol

from annotated_types import Gt
from cachebox import LRUCache

from embedonce import hookimpl
from embedonce.contracts import Capabilities, StoredSize, time_left
from embedonce.errors import ConfigError
from embedonce.options import Doc, Size
from embedonce.vectors import Entry

api = 1

ENTRY_BYTES = 550
"""Bytes that an entry takes in addition to its payload; ``max_bytes`` includes them.

``benchmarks/policies.py`` measures them as resident memory (CPython 3.11, Linux). The key takes 144 bytes, the array
object 128, the slot in the queue 82, the tuple 96, the ``seconds`` 32, and the allocation of the payload another 48.
If the entry does not share the float object of its ``created`` with other entries, this object takes 32 more bytes, and
so does a number of tokens above 256.
"""

# This lock guards the bookkeeping of every memory backend. A hit takes the lock only if its entry is on probation (see
# ``_Segmented``).
# All backends share the same lock, so that a fork can wait until no thread holds it. Otherwise, the lock could stay
# locked in the child forever, because the thread that holds it exists only in the parent.
# A thread that holds the lock never waits for another lock. The lock is re-entrant, because a signal handler may
# embed a text while the thread that it interrupted holds the lock.
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class MemoryBackend:
    """Holds entries in this process and evicts the least useful ones to make room for new ones."""

    capabilities = Capabilities(
        holds="entries",
        scope="process",
        blocking=False,
        deadline=True,
        get=True,
        delete=True,
        scan=True,
        count=True,
        bounded=True,
    )

    get: Callable[[str], Entry | None]
    """Method that returns the entry of a key, or None.

    It is the policy's own method, so that a hit needs only one function call."""

    def __init__(
        self,
        *,
        max_entries: Annotated[int, Gt(0), Doc("Hold at most this many entries.")] = 2048,
        max_bytes: Annotated[
            Annotated[Size, Gt(0)] | None,
            Doc("Hold at most this many bytes: payload and metadata, plus 550 bytes per entry."),
        ] = None,
        policy: Annotated[
            Literal["segmented", "lru"],
            Doc(
                "Which entry to evict. segmented: usually an entry that was never read, so a flood of new texts does "
                "not push out the entries in use. lru: the least recently used entry."
            ),
        ] = "segmented",
    ) -> None:
        for name, value in (("max_entries", max_entries), ("max_bytes", max_bytes)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if policy not in _POLICIES:
            raise ConfigError(f"policy must be one of {', '.join(_POLICIES)}, got {policy!r}")
        self._max_bytes = max_bytes
        self._held = _POLICIES[policy](max_entries, max_bytes)
        self.get = self._held.get

    def get_many(self, keys: Sequence[str], /) -> dict[str, Entry]:
        """Return the stored entries by key, without the keys that have no entry."""
        time_left()
        if len(keys) == 1:
            entry = self.get(keys[0])
            return {} if entry is None else {keys[0]: entry}
        return self._held.get_many(keys)

    def set_many(self, items: Mapping[str, Entry], ttl: float | None, /) -> None:
        """Store the entries. If there is not enough room for all of them, the entries at the end of ``items`` stay.

        ``ttl`` is ignored, because this backend frees space only by eviction.

        An entry that is larger than ``max_bytes`` by itself is not stored, because it would evict everything else.
        """
        time_left()
        with _lock:
            for key, entry in items.items():
                if self._max_bytes is not None and entry_bytes(entry) > self._max_bytes:
                    self._held.remove(key)
                else:
                    self._held.put(key, entry)

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys."""
        time_left()
        with _lock:
            for key in keys:
                self._held.remove(key)

    def scan(self, prefix: str, /) -> list[str]:
        """Return the keys that start with ``prefix`` at the moment of the call."""
        with _lock:
            held = self._held.keys()
        return [key for key in held if key.startswith(prefix)]

    def count(self, prefix: str, /) -> int:
        """Return how many keys start with ``prefix``."""
        return len(self.scan(prefix))

    def measure(self, prefix: str, /) -> StoredSize:
        """Return the size and the dates of the entries whose keys start with ``prefix``. This is not a use."""
        with _lock:
            entries = [entry for key, entry in self._held.items() if key.startswith(prefix)]
        dates = [entry.created for entry in entries]
        return StoredSize(
            bytes=sum(map(entry_bytes, entries)),
            oldest=min(dates, default=None),
            newest=max(dates, default=None),
            dimensions=next((entry.vector.size for entry in entries), None),
        )

    def close(self) -> None:
        """Drop every entry.

        Later calls raise RuntimeError. If they returned no entries instead, all texts would silently be embedded again.
        """
        with _lock:
            self._held.clear()
            self._held = _Closed()
            self.get = self._held.get


def entry_bytes(entry: Entry) -> int:
    """Return the bytes that an entry takes in memory, including its key and its slot in the queue."""
    metadata = 0 if entry.metadata is None else _metadata_bytes(entry.metadata)
    return ENTRY_BYTES + entry.vector.nbytes + metadata


def _metadata_bytes(value: Any) -> int:
    size = getsizeof(value)
    if isinstance(value, Mapping):
        return size + sum(getsizeof(key) + _metadata_bytes(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return size + sum(map(_metadata_bytes, value))
    return size


# --- policies ---------------------------------------------------------------------------------


class _Policy(Protocol):
    """Keeps the entries and evicts some if necessary. The caller of every method except ``get`` holds the lock."""

    get: Callable[[str], Entry | None]

    def get_many(self, keys: Sequence[str]) -> dict[str, Entry]: ...

    def put(self, key: str, entry: Entry) -> None: ...

    def remove(self, key: str) -> None: ...

    def keys(self) -> list[str]: ...

    def items(self) -> list[tuple[str, Entry]]: ...

    def clear(self) -> None: ...


class _Queue:
    """Entries in the order of their last use. The least recently used entry is the first.

    ``bytes`` is the size of all entries together. It is not counted, and stays 0, if ``max_bytes`` is None.

    cachebox's own limit is off (0), because cachebox limits either the number or the size, but not both, and does not
    report what it evicted. ``get`` is cachebox's method, which moves the key to the end under cachebox's own lock.
    """

    __slots__ = ("bytes", "entries", "get", "max_bytes", "max_entries")

    def __init__(self, max_entries: int, max_bytes: int | None) -> None:
        self.entries: LRUCache[str, Entry] = LRUCache(0)
        self.get: Callable[[str], Entry | None] = self.entries.get
        self.bytes = 0
        self.max_entries = max_entries
        self.max_bytes = max_bytes

    def put(self, key: str, entry: Entry) -> None:
        replaced = self.entries.insert(key, entry)
        if self.max_bytes is not None:
            self.bytes += entry_bytes(entry) - (0 if replaced is None else entry_bytes(replaced))

    def remove(self, key: str) -> None:
        self._subtract_bytes(self.entries.pop(key, None))

    def pop_oldest(self) -> tuple[str, Entry]:
        """Remove and return the least recently used entry."""
        key, entry = self.entries.popitem()
        self._subtract_bytes(entry)
        return key, entry

    def _subtract_bytes(self, entry: Entry | None) -> None:
        if entry is not None and self.max_bytes is not None:
            # `bytes` becomes wrong if a caller changes an entry's metadata after storing the entry. To correct this,
            # `bytes` is set to 0 when the queue is empty.
            self.bytes = self.bytes - entry_bytes(entry) if len(self.entries) else 0

    def is_over_limit(self) -> bool:
        """Return whether an entry must be evicted."""
        return len(self.entries) > self.max_entries or (self.max_bytes is not None and self.bytes > self.max_bytes)

    def keys(self) -> list[str]:
        # A hit in another thread may change the order without taking `_lock`, and an iteration over `entries` would
        # then fail. This uses cachebox's copy(), because it is atomic.
        return list(self.entries.copy())

    def items(self) -> list[tuple[str, Entry]]:
        return list(self.entries.copy().items())

    def clear(self) -> None:
        self.entries.clear()
        self.bytes = 0


def _find_all(get: Callable[[str], Entry | None], keys: Sequence[str]) -> dict[str, Entry | None]:
    """Return what ``get`` returns for each key. ``map`` calls it in C, which is faster than a loop."""
    return dict(zip(keys, map(get, keys), strict=True))


def _drop_missing(found: dict[str, Entry | None]) -> dict[str, Entry]:
    # An entry is a tuple, so it is true. The search for None would compare each entry with None, which is slower.
    if all(found.values()):
        return found  # type: ignore[return-value]
    return {key: entry for key, entry in found.items() if entry is not None}


class _Lru:
    """Evicts the least recently used entry first."""

    def __init__(self, max_entries: int, max_bytes: int | None) -> None:
        self._queue = _Queue(max_entries, max_bytes)
        self.get = self._queue.get
        self.remove = self._queue.remove
        self.keys = self._queue.keys
        self.items = self._queue.items
        self.clear = self._queue.clear

    def get_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        return _drop_missing(_find_all(self.get, keys))

    def put(self, key: str, entry: Entry) -> None:
        self._queue.put(key, entry)
        while self._queue.is_over_limit():
            self._queue.pop_oldest()


class _Segmented:
    """Two LRU queues: a new entry is on probation and becomes protected when it is read.

    The protected queue takes at most half of the capacity. An entry that no longer fits there goes back on probation.
    An entry that no longer fits on probation is evicted. Therefore, entries that are stored but never read cannot push
    out protected entries. While no entry is protected, probation has the whole capacity. Segmented LRU comes from:
    Karedla, Love and Wherry, "Caching strategies to improve disk system performance", Computer 27(3), 1994.
    """

    def __init__(self, max_entries: int, max_bytes: int | None) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._probation = _Queue(max_entries, max_bytes)
        self._protected = _Queue(max_entries // 2, None if max_bytes is None else max_bytes // 2)
        self.get = self._make_get()

    def _make_get(self) -> Callable[[str], Entry | None]:
        # A closure is faster than a method. A hit on a protected entry takes little longer than cachebox's own `get`.
        get_protected = self._protected.get
        get_from_probation = self._get_from_probation

        def get(key: str) -> Entry | None:
            entry = get_protected(key)
            return get_from_probation(key) if entry is None else entry

        return get

    def get_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        found = _find_all(self._protected.get, keys)
        if not all(found.values()):
            missing = [key for key, entry in found.items() if entry is None]
            with _lock:
                # A batch of new texts is on neither queue. Finding this out in C takes a third of the time.
                is_on_probation = any(map(self._probation.get, missing))
                find = self._take_from_probation if is_on_probation else self._protected.get
                found.update(zip(missing, map(find, missing), strict=True))
        return _drop_missing(found)

    def _get_from_probation(self, key: str) -> Entry | None:
        # After `get` looked into the protected queue, another thread may have moved the key there. So this method takes
        # the lock and looks into both queues. Otherwise, a stored entry would sometimes not be found, and its text
        # would be embedded again.
        with _lock:
            return self._take_from_probation(key)

    def _take_from_probation(self, key: str) -> Entry | None:
        entry = self._probation.get(key)
        if entry is None:
            return self._protected.get(key)
        self._protected.put(key, entry)
        self._probation.remove(key)
        self._demote()
        return entry

    def _demote(self) -> None:
        while self._protected.is_over_limit():
            self._probation.put(*self._protected.pop_oldest())

    def put(self, key: str, entry: Entry) -> None:
        probation, protected = self._probation, self._protected
        if key in protected.entries:
            protected.put(key, entry)
            self._demote()
        else:
            probation.put(key, entry)
        while self._is_over_limit():
            # A new entry is always stored. If no other entry is on probation, a protected entry is evicted.
            is_alone = len(probation.entries) <= 1 and len(protected.entries) > 0
            (protected if is_alone else probation).pop_oldest()

    def _is_over_limit(self) -> bool:
        probation, protected = self._probation, self._protected
        return len(probation.entries) + len(protected.entries) > self._max_entries or (
            self._max_bytes is not None and probation.bytes + protected.bytes > self._max_bytes
        )

    def remove(self, key: str) -> None:
        self._probation.remove(key)
        self._protected.remove(key)

    def keys(self) -> list[str]:
        return self._probation.keys() + self._protected.keys()

    def items(self) -> list[tuple[str, Entry]]:
        return self._probation.items() + self._protected.items()

    def clear(self) -> None:
        self._probation.clear()
        self._protected.clear()


class _Closed:
    """The policy of a closed backend. Every call except ``clear`` raises RuntimeError."""

    def __init__(self) -> None:
        self.get: Callable[[str], Entry | None] = self._raise_closed

    def get_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        return self._raise_closed("")

    def put(self, key: str, entry: Entry) -> None:
        self._raise_closed(key)

    def remove(self, key: str) -> None:
        self._raise_closed(key)

    def keys(self) -> list[str]:
        return self._raise_closed("")

    def items(self) -> list[tuple[str, Entry]]:
        return self._raise_closed("")

    def clear(self) -> None: ...

    def _raise_closed(self, key: str) -> NoReturn:
        raise RuntimeError("this memory backend is closed")


_POLICIES: Mapping[str, Callable[[int, int | None], _Policy]] = {"segmented": _Segmented, "lru": _Lru}


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    """Register the memory backend."""
    return {"memory": MemoryBackend}
