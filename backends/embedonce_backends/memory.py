"""The memory tier: entries in this process, bounded by number and by bytes.

Nothing is copied: the entry that was stored is the entry that is returned, and its array is
read-only. ``docs/memory.md`` has the measurements behind the library and the default policy.
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
from embedonce.contracts import Capabilities, time_left
from embedonce.errors import ConfigError
from embedonce.options import Doc, Size
from embedonce.vectors import Entry

api = 1

ENTRY_BYTES = 500
"""What an entry costs beside its payload; ``max_bytes`` counts it.

Measured as resident memory (CPython 3.11, Linux) by ``benchmarks/policies.py``: the key 144, the array 128,
its place in the queue 82, the tuple 80, around the payload 48, and 32 where it has a ``created`` of its own.
"""

# Guards the bookkeeping of every memory backend; a hit on a hot entry does not take it. There is one for all
# so that a fork can wait for it and the child never inherits it locked by a thread that it does not have; whoever
# holds it waits for nothing else. Re-entrant, because a signal handler may embed while its thread holds it.
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class MemoryBackend:
    """Holds entries in this process; what is least worth keeping makes room for what is new."""

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
    """Return the entry of a key, or None: the policy's own method, so that a hit costs one call."""

    def __init__(
        self,
        *,
        max_entries: Annotated[int, Gt(0), Doc("Hold at most this many entries.")] = 2048,
        max_bytes: Annotated[
            Annotated[Size, Gt(0)] | None,
            Doc("Hold at most this many bytes: payload, metadata and 500 bytes more per entry."),
        ] = None,
        policy: Annotated[
            Literal["segmented", "lru"],
            Doc(
                "What makes room. segmented: a scan of new texts cannot flush what was read twice. "
                "lru: always what was used least recently."
            ),
        ] = "segmented",
    ) -> None:
        for name, value in (("max_entries", max_entries), ("max_bytes", max_bytes)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is at least 1, not {value}")
        if policy not in _POLICIES:
            raise ConfigError(f"policy is one of {', '.join(_POLICIES)}, not {policy!r}")
        self._max_bytes = max_bytes
        self._held = _POLICIES[policy](max_entries, max_bytes)
        self.get = self._held.get

    def get_many(self, keys: Sequence[str], /) -> dict[str, Entry]:
        """Return what is held of ``keys``."""
        time_left()
        get = self.get
        return {key: entry for key in keys if (entry := get(key)) is not None}

    def set_many(self, items: Mapping[str, Entry], ttl: float | None, /) -> None:
        """Hold the entries, the last of them where there are more than fit. ``ttl`` frees nothing here.

        An entry that alone exceeds ``max_bytes`` is not held, rather than everything else dropped for it.
        """
        time_left()
        with _lock:
            for key, entry in items.items():
                if self._max_bytes is not None and entry_bytes(entry) > self._max_bytes:
                    self._held.remove(key)
                else:
                    self._held.put(key, entry)

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Drop the keys."""
        time_left()
        with _lock:
            for key in keys:
                self._held.remove(key)

    def scan(self, prefix: str, /) -> list[str]:
        """Return every key that starts with ``prefix``, as of this moment."""
        with _lock:
            held = self._held.keys()
        return [key for key in held if key.startswith(prefix)]

    def count(self, prefix: str, /) -> int:
        """Return how many keys start with ``prefix``."""
        return len(self.scan(prefix))

    def close(self) -> None:
        """Drop everything. Every later call raises: a miss that comes from a closed tier would be paid for again."""
        with _lock:
            self._held.clear()
            self._held = _Closed()
            self.get = self._held.get


def entry_bytes(entry: Entry) -> int:
    """Return what an entry takes in memory, its key and its place in the table included."""
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
    """What is held, in the order in which it will go. All but ``get`` are called under the lock."""

    get: Callable[[str], Entry | None]

    def put(self, key: str, entry: Entry) -> None: ...

    def remove(self, key: str) -> None: ...

    def keys(self) -> list[str]: ...

    def clear(self) -> None: ...


class _Queue:
    """Entries from the least to the most recently used, with their number and bytes.

    cachebox evicts by number or by size, not by both, and does not say what it evicted; its own
    bound is therefore off (0). ``get`` is its method: it moves a key to the end, under cachebox's own lock.
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
        self._left(self.entries.pop(key, None))

    def oldest(self) -> tuple[str, Entry]:
        """Take out the least recently used entry."""
        key, entry = self.entries.popitem()
        self._left(entry)
        return key, entry

    def _left(self, entry: Entry | None) -> None:
        if entry is not None and self.max_bytes is not None:
            # Metadata that its owner changed since would leave a remainder; an empty queue has none.
            self.bytes = self.bytes - entry_bytes(entry) if len(self.entries) else 0

    def over(self) -> bool:
        """Tell whether something has to go."""
        return len(self.entries) > self.max_entries or (self.max_bytes is not None and self.bytes > self.max_bytes)

    def keys(self) -> list[str]:
        # Copying is atomic in cachebox. A hit in another thread takes no lock of ours, and would break an iteration.
        return list(self.entries.copy())

    def clear(self) -> None:
        self.entries.clear()
        self.bytes = 0


class _Lru:
    """The least recently used entry goes first."""

    def __init__(self, max_entries: int, max_bytes: int | None) -> None:
        self._queue = _Queue(max_entries, max_bytes)
        self.get = self._queue.get
        self.remove = self._queue.remove
        self.keys = self._queue.keys
        self.clear = self._queue.clear

    def put(self, key: str, entry: Entry) -> None:
        self._queue.put(key, entry)
        while self._queue.over():
            self._queue.oldest()


class _Segmented:
    """Two LRU queues: what is new is on probation, what is read there is protected.

    The protected queue has half the room at most; what falls out of it is on probation again, and what
    falls out of that is gone. A scan of texts that are read once passes through probation only. With
    nothing read twice, probation has all the room. Segmented LRU: Karedla, Love and Wherry, "Caching
    strategies to improve disk system performance", Computer 27(3), 1994.
    """

    def __init__(self, max_entries: int, max_bytes: int | None) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._probation = _Queue(max_entries, max_bytes)
        self._protected = _Queue(max_entries // 2, None if max_bytes is None else max_bytes // 2)
        self.get = self._reader()

    def _reader(self) -> Callable[[str], Entry | None]:
        # A closure rather than a method: a hit on a protected entry is to cost one call into cachebox and little else.
        protected = self._protected.get
        on_probation = self._read_on_probation

        def get(key: str) -> Entry | None:
            entry = protected(key)
            return on_probation(key) if entry is None else entry

        return get

    def _read_on_probation(self, key: str) -> Entry | None:
        # Another thread may have moved the key between the two queues since it was looked for: without the lock
        # and the second look this would now and then be a miss for what is held, and a text computed twice.
        with _lock:
            entry = self._probation.get(key)
            if entry is None:
                return self._protected.get(key)
            self._protected.put(key, entry)
            self._probation.remove(key)
            self._demote()
            return entry

    def _demote(self) -> None:
        while self._protected.over():
            self._probation.put(*self._protected.oldest())

    def put(self, key: str, entry: Entry) -> None:
        probation, protected = self._probation, self._protected
        (protected if key in protected.entries else probation).put(key, entry)
        self._demote()
        while self._over():
            # What is new is always let in: where it is alone on probation, a protected entry goes.
            alone = len(probation.entries) <= 1 and len(protected.entries) > 0
            (protected if alone else probation).oldest()

    def _over(self) -> bool:
        probation, protected = self._probation, self._protected
        return len(probation.entries) + len(protected.entries) > self._max_entries or (
            self._max_bytes is not None and probation.bytes + protected.bytes > self._max_bytes
        )

    def remove(self, key: str) -> None:
        self._probation.remove(key)
        self._protected.remove(key)

    def keys(self) -> list[str]:
        return self._probation.keys() + self._protected.keys()

    def clear(self) -> None:
        self._probation.clear()
        self._protected.clear()


class _Closed:
    """What a closed backend holds: nothing, and it says so."""

    def __init__(self) -> None:
        self.get: Callable[[str], Entry | None] = self._refuse

    def put(self, key: str, entry: Entry) -> None:
        self._refuse(key)

    def remove(self, key: str) -> None:
        self._refuse(key)

    def keys(self) -> list[str]:
        return self._refuse("")

    def clear(self) -> None: ...

    def _refuse(self, key: str) -> NoReturn:
        raise RuntimeError("this memory backend is closed")


_POLICIES: Mapping[str, Callable[[int, int | None], _Policy]] = {"segmented": _Segmented, "lru": _Lru}


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    """Register the memory backend."""
    return {"memory": MemoryBackend}
