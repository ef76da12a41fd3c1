"""The lmdb tier: frames in one memory-mapped file of a folder, shared by the processes of a host.

A read takes no system call and no lock: it copies each frame out of the map, inside a transaction. ``README.md``
tells what a power cut does, what makes room, and what it costs.
"""

from __future__ import annotations

import logging
import math
import struct
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import lmdb
from annotated_types import Ge

from embedonce import hookimpl
from embedonce.contracts import Capabilities, time_left
from embedonce.errors import CacheClosed, ConfigError
from embedonce.options import Doc, Size

from ._environment import Environment, Opened, Settings, release, shared

api = 1

log = logging.getLogger("embedonce.lmdb")

GIB = 2**30
LEAST_BYTES = 2**20
PAGE = 512
"""Keys of one page of a scan; between pages no transaction is open, so that a slow reader keeps no old pages alive."""
ITEMS = 4096
BYTES = 2**26
"""Most items and bytes of one write transaction; other processes' writers wait for it."""

HEADER = 16
_STAMP = struct.Struct(">Q")
NEVER = b"\xff" * 8
"""The time of what does not expire: after every other, as bytes are compared."""
LATEST = 2**63


class LmdbBackend:
    """Holds frames in a folder; threads and processes of one host share it, and it outlives them."""

    def __init__(
        self,
        *,
        path: Annotated[Path, Doc("A folder of its own on a local disk, made (for this user only) when first used.")],
        max_bytes: Annotated[
            Size, Ge(LEAST_BYTES), Doc("Keep what is stored below this; the entries stored first make room.")
        ] = 4 * GIB,
        sync: Annotated[
            bool,
            Doc("Wait for the disk after each write. Without, a power cut (not a killed process) may damage the file."),
        ] = True,
    ) -> None:
        if max_bytes < LEAST_BYTES:
            raise ConfigError(f"max_bytes is at least 1 MiB, not {max_bytes} bytes")
        self.path = Path(path).expanduser().resolve()
        self._max_bytes = max_bytes
        self._largest = min(max_bytes // 16, 2**28)
        self.capabilities = Capabilities(
            scope="host",
            deadline=True,
            ttl=True,
            max_value_bytes=self._largest,
            get=True,
            delete=True,
            scan=True,
            count=True,
            add=True,
            bounded=True,
        )
        self.clock: Callable[[], float] = time.time
        """Unix time in seconds, for ttl."""
        self._shared = shared(self.path, Settings(max_bytes, sync))
        self._release = weakref.finalize(self, release, self._shared)
        self._warned = False

    # --- reading ------------------------------------------------------------------------------

    def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return what is there, by one transaction.

        The frames are copies: a view into the map is worth nothing once its transaction has ended, since a
        writer may then use the page again.
        """
        if not keys:
            return {}
        now = self._now()

        def work(opened: Opened, transaction: lmdb.Transaction[bytes]) -> dict[str, bytes]:
            get, frames = transaction.get, opened.frames
            return {
                key: value[HEADER:]
                for key in keys
                if (value := get(key.encode(), None, frames)) is not None and value[:8] > now
            }

        return self._environment.read(work)

    def get(self, key: str, /) -> bytes | None:
        """Return the frame of one key, or None."""
        now = self._now()

        def work(opened: Opened, transaction: lmdb.Transaction[bytes]) -> bytes | None:
            value = transaction.get(key.encode(), None, opened.frames)
            return None if value is None or value[:8] <= now else value[HEADER:]

        return self._environment.read(work)

    def scan(self, prefix: str, /) -> Iterator[str]:
        """Yield the keys that start with ``prefix`` in order, those too whose ttl has passed but that still take space.

        Keys stored or removed meanwhile may or may not be among them.
        """
        begin, start = prefix.encode(), prefix.encode()
        while True:
            page = self._environment.read(partial(_page, start=start, prefix=begin, most=PAGE))
            for key in page:
                yield key.decode()
            if len(page) < PAGE:
                return
            start = page[-1] + b"\0"

    def count(self, prefix: str, /) -> int:
        """Return how many keys ``scan(prefix)`` gives; all of them are walked over, unless it is all there are."""
        begin = prefix.encode()

        def work(opened: Opened, transaction: lmdb.Transaction[bytes]) -> int:
            if not begin:
                return transaction.stat(opened.frames)["entries"]
            return len(_page(opened, transaction, start=begin, prefix=begin))

        return self._environment.read(work)

    # --- writing ------------------------------------------------------------------------------

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item; each transaction of up to 4,096 is there as a whole or not at all.

        When it returns, killing the process loses nothing of it.
        """
        for chunk in self._chunks(items):
            self._store(chunk, ttl, absent=False)

    def add_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> set[str]:
        """Store the items whose key is absent or expired, and return those keys; exactly one caller gets each."""
        return {key for chunk in self._chunks(items) for key in self._store(chunk, ttl, absent=True)}

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys. Their bytes stay in the file until a later write needs the room."""
        if not keys:
            return

        def work(opened: Opened, transaction: lmdb.Transaction[memoryview]) -> None:
            for key in keys:
                _drop(opened, transaction, key.encode())

        self._environment.write(work)

    def close(self) -> None:
        """Let go of the folder; the last of those that share it in this process closes it."""
        self._release()

    # --- one call ---

    @property
    def _environment(self) -> Environment:
        if not self._release.alive:
            raise CacheClosed("the lmdb backend is closed")
        time_left()
        return self._shared

    def _now(self) -> bytes:
        return _stamp(self.clock())

    def _chunks(self, items: Mapping[str, bytes]) -> Iterator[dict[str, bytes]]:
        chunk: dict[str, bytes] = {}
        size = 0
        for key, value in items.items():
            if len(value) > self._largest:
                raise ValueError(f"a value of {len(value)} bytes; with this max_bytes the largest is {self._largest}")
            if chunk and (len(chunk) == ITEMS or size + len(value) > min(BYTES, self._max_bytes // 8)):
                yield chunk
                chunk, size = {}, 0
            chunk[key] = value
            size += len(value)
        if chunk:
            yield chunk

    def _store(self, items: Mapping[str, bytes], ttl: float | None, *, absent: bool) -> set[str]:
        environment = self._environment
        environment.renew()
        ends = NEVER if ttl is None else _stamp(self.clock() + ttl)
        now = self._now()

        def work(opened: Opened, transaction: lmdb.Transaction[memoryview]) -> tuple[set[str], int]:
            evicted = self._make_room(opened, transaction, items, now)
            stored = set()
            number = transaction.id() << 24
            for place, (key, value) in enumerate(items.items()):
                name = key.encode()
                there = transaction.get(name, None, opened.frames)
                if there is not None:
                    if absent and bytes(there[:8]) > now:
                        continue
                    _unlist(opened, transaction, bytes(there[:HEADER]))
                mark = _STAMP.pack(number + place)
                transaction.put(name, b"".join((ends, mark, value)), db=opened.frames)
                transaction.put(mark, name, append=True, db=opened.order)
                if ends != NEVER:
                    transaction.put(ends + mark, name, db=opened.due)
                stored.add(key)
            return stored, evicted

        stored, evicted = environment.write(work)
        if evicted and not self._warned:
            self._warned = True
            log.warning(
                "%s has reached max_bytes (%d): the entries stored first make room. "
                "A larger max_bytes keeps them from being computed again",
                self.path,
                self._max_bytes,
            )
        return stored

    def _make_room(
        self, opened: Opened, transaction: lmdb.Transaction[memoryview], items: Mapping[str, bytes], now: bytes
    ) -> int:
        """Free what has expired and, where ``max_bytes`` would be passed, what was stored first.

        Expired entries go a few at a time, so that no write pays for all that have run out since the last one.

        Returns:
            How many entries were evicted before their time.
        """
        for ends, name in _first(transaction, opened.due, 2 * len(items) + 64):
            if ends[:8] > now:
                break
            _drop(opened, transaction, name)
        page = transaction.stat(opened.frames)["psize"]
        need = sum(_room(len(value), page) for value in items.values())
        evicted = 0
        while opened.used(transaction) + need > self._max_bytes:
            oldest = _first(transaction, opened.order, max(8, len(items) // 4))
            if not oldest:
                break
            for _, name in oldest:
                _drop(opened, transaction, name)
            evicted += len(oldest)
        return evicted


def _stamp(seconds: float) -> bytes:
    """Return a time as eight bytes that sort as it does."""
    return _STAMP.pack(min(LATEST, max(0, math.ceil(seconds * 1000))))


def _room(size: int, page: int) -> int:
    """Return about how many bytes of the file a value takes: up to a third of a page among others, else whole pages."""
    size += HEADER + 250
    return size * 3 // 2 if size < page // 2 else -(-size // page) * page + 300


def _page(
    opened: Opened, transaction: lmdb.Transaction[bytes], *, start: bytes, prefix: bytes, most: int | None = None
) -> list[bytes]:
    """Return keys from ``start`` on, for as long as they start with ``prefix``."""
    page: list[bytes] = []
    with transaction.cursor(opened.frames) as cursor:
        there = cursor.set_range(start)
        while there and len(page) != most and (key := cursor.key()).startswith(prefix):
            page.append(key)
            there = cursor.next()
    return page


def _first(transaction: lmdb.Transaction[memoryview], database: lmdb._Database, most: int) -> list[tuple[bytes, bytes]]:
    """Return copies of the first pairs of a database."""
    pairs: list[tuple[bytes, bytes]] = []
    with transaction.cursor(database) as cursor:
        there = cursor.first()
        while there and len(pairs) < most:
            pairs.append((bytes(cursor.key()), bytes(cursor.value())))
            there = cursor.next()
    return pairs


def _drop(opened: Opened, transaction: lmdb.Transaction[memoryview], name: bytes) -> None:
    there = transaction.get(name, None, opened.frames)
    if there is not None:
        _unlist(opened, transaction, bytes(there[:HEADER]))
        transaction.delete(name, db=opened.frames)


def _unlist(opened: Opened, transaction: lmdb.Transaction[memoryview], header: bytes) -> None:
    """Remove an entry from the lists of what was stored and of what expires."""
    transaction.delete(header[8:], db=opened.order)
    if header[:8] != NEVER:
        transaction.delete(header, db=opened.due)


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    """Name this file's backend."""
    return {"lmdb": LmdbBackend}
