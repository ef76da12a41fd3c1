"""Requests per minute of each tenant, counted by all worker processes of a host together.

The counts are in one memory-mapped file. Each tenant has a slot of two integers: a hash of its name, and the time at
which its bucket of requests is full again (the generic cell rate algorithm, GCRA). Times are nanoseconds of the
monotonic clock, which all processes of a host share. As integers they are exact: a bucket of 600 requests admits
600 requests at once, and not 599.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from embedonce.config import Tenant

log = logging.getLogger("embedonce.serve")

MINUTE = 60_000_000_000
"""Nanoseconds in a minute."""
SECOND = 1_000_000_000
LONGEST = 365 * 24 * 60 * MINUTE
"""Longest time between two requests, so that every time fits into 64 bits."""
SLOTS = 16_384
PROBES = 64
"""Number of slots in which a tenant can be. If other tenants use all of them, the one that rested longest loses its."""
MAX_LOCK_WAIT = 50_000_000
"""Maximum number of nanoseconds to wait for the lock. A process holds it for about a microsecond, but it may be
suspended meanwhile. The other processes then go on without the lock, so that their requests are still answered."""
STALE = SECOND
"""A time that is further in the future than a full minute, and this margin, was written before the host restarted."""

_MAGIC = int.from_bytes(b"eorates1", "little")
_HEADER = 2
"""Number of integers before the first slot: the magic number, and one that is unused."""
_SIZE = 8 * (_HEADER + 2 * SLOTS)


class Rates:
    """Admits requests as long as a tenant stays within its ``requests_per_minute``.

    A tenant that made no request for a minute may make ``requests_per_minute`` requests at once. After that, one more
    is admitted each time ``60 / requests_per_minute`` seconds have passed. A refused request costs nothing.

    Slots belong to names. So a changed configuration needs no other file, even while other processes still use the old
    one. A tenant whose ``requests_per_minute`` changes keeps the part of its minute that it has used.

    Args:
        path: the file, which is created if it is missing. It must be on a local file system.
        clock: function that returns the monotonic time in nanoseconds, for tests.

    Raises:
        OSError: the file cannot be created or locked.
    """

    def __init__(self, path: Path, *, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._path = path
        self._clock = clock
        self._slots: dict[str, tuple[int, int]] = {}
        """Place of each tenant's slot in the file, and the hash of the name, by name."""
        self._mutex = threading.Lock()
        """Threads of this process share a file descriptor, and so they would not lock each other out with ``flock``."""
        self._gives_up_until = 0
        """Until this time, the lock is not waited for, because another process is holding it for very long."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # flock belongs to the open file, unlike lockf, whose locks end when any descriptor of the file is closed.
            # The kernel releases both when a process is killed.
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                self._memory = self._map_file()
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
        except BaseException:
            os.close(self._file)
            raise
        self._cells = memoryview(self._memory).cast("q")

    def _map_file(self) -> mmap.mmap:
        """Map the file. A file that is new, or of another format, is filled with zeros. Hold the lock."""
        magic = _MAGIC.to_bytes(8, "little")
        if os.fstat(self._file).st_size < _SIZE or os.pread(self._file, 8, 0) != magic:
            # Zeros are written, because a full disk would kill a process that writes to a hole of a mapped file. The
            # file is never made smaller, because that would kill the processes that have mapped it.
            content = magic + bytes(_SIZE - len(magic))
            written = 0
            while written < _SIZE:
                written += os.pwrite(self._file, content[written:], written)
        return mmap.mmap(self._file, _SIZE)

    def admit(self, tenant: Tenant) -> float:
        """Count a request of a tenant and return 0.0; or return the seconds to wait, and count nothing."""
        rate = tenant.requests_per_minute
        if rate is None:
            return 0.0
        period = int(min(MINUTE / rate, LONGEST))
        # Below one request per minute, one request must still fit.
        longest = max(MINUTE, period)
        cells, name = self._cells, tenant.name
        with self._mutex:
            is_locked = self._lock()
            try:
                # The clock is read with the lock held, so that it is not before a time that is in the file.
                now = self._clock()
                place, owner = self._slots.get(name) or self._find_slot(name, now)
                if cells[place] != owner:
                    place, owner = self._find_slot(name, now)
                full = cells[place + 1]
                if full < now or full > now + longest + STALE:
                    full = now
                wait = full + period - longest - now
                if wait <= 0:
                    cells[place + 1] = full + period
            finally:
                if is_locked:
                    fcntl.flock(self._file, fcntl.LOCK_UN)
        return wait / SECOND if wait > 0 else 0.0

    def _lock(self) -> bool:
        """Lock the file. Return False, without a lock, if another process holds the lock for too long."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._wait_for_lock()
        return True

    def _wait_for_lock(self) -> bool:
        # Real time, because an injected clock may stand still.
        start = time.monotonic_ns()
        while (now := time.monotonic_ns()) < start + MAX_LOCK_WAIT and now >= self._gives_up_until:
            time.sleep(0)  # let the process that holds the lock run
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            return True
        if now >= self._gives_up_until:
            self._gives_up_until = now + SECOND
            log.warning("%s: a suspended process holds the lock, so requests per minute may be exceeded", self._path)
        return False

    def _find_slot(self, name: str, now: int) -> tuple[int, int]:
        """Return the place and the hash of a tenant's slot. A tenant without a slot gets a free one, or the oldest."""
        owner = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True) or 1
        places = [_HEADER + 2 * ((owner + i) % SLOTS) for i in range(PROBES)]
        cells = self._cells
        place = next((place for place in places if cells[place] in (owner, 0)), None)
        if place is None:
            # Times from before a restart of the host are the oldest, although they are in the future.
            place = min(places, key=lambda place: cells[place + 1] if cells[place + 1] <= now + 2 * MINUTE else 0)
        if cells[place] != owner:
            cells[place], cells[place + 1] = owner, 0
        self._slots[name] = place, owner
        return place, owner

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        with self._mutex:
            if self._file >= 0:
                self._cells.release()
                self._memory.close()
                os.close(self._file)
                self._file = -1

    def __repr__(self) -> str:
        return f"<Rates {len(self._slots)} tenants>"
