"""Requests per minute of each tenant, counted by all worker processes of a host together.

The counts are in one file. Each tenant has a slot of two integers: a hash of its name, and the time at
which its bucket of requests is full again (the generic cell rate algorithm, GCRA). Times are nanoseconds of the
monotonic clock, which all processes of a host share. As integers they are exact: a bucket of 600 requests admits
600 requests at once, and not 599.

The file is read and written, and not mapped into memory. The system kills a process that uses a mapped file if somebody
truncates the file, or if the disk fails. Instead, the tenants then start with an unused minute, or are not counted.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
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

_MAGIC = b"eorates1"
_SLOT = struct.Struct("<qq")
"""The hash of a tenant's name, and a time."""
_HEADER = 16
"""Number of bytes before the first slot: the magic number, and 8 that are unused."""
_SIZE = _HEADER + _SLOT.size * SLOTS


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
        self._check_at = 0
        """Time of the next check whether the file was replaced."""
        self._warn_at = 0
        """Time of the next log line about an error."""
        self._file = -1
        try:
            self._open_file()
        except BaseException:
            self.close()
            raise

    def _open_file(self) -> None:
        """Open the file, and close the one that was open. Fill a file that is new, or of another format."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if self._file >= 0:
            os.close(self._file)
        self._file = file
        is_locked = self._lock()
        try:
            if os.fstat(file).st_size < _SIZE or os.pread(file, len(_MAGIC), 0) != _MAGIC:
                self._fill_file()
        finally:
            if is_locked:
                fcntl.flock(file, fcntl.LOCK_UN)

    def _fill_file(self) -> None:
        """Fill the file with empty slots, so that later writes need no more space on the disk."""
        content = _MAGIC + bytes(_SIZE - len(_MAGIC))
        written = 0
        while written < _SIZE:
            written += os.pwrite(self._file, content[written:], written)

    def _check_file(self, now: int) -> None:
        """Open the file again if it was deleted or replaced, because workers that start later use the new one."""
        self._check_at = now + SECOND
        with suppress(OSError):  # the folder is gone, so the workers go on with the file that all of them have open
            if not self._path.exists() or not os.path.samestat(self._path.stat(), os.fstat(self._file)):
                self._open_file()

    def admit(self, tenant: Tenant) -> float:
        """Count a request of a tenant and return 0.0; or return the seconds to wait, and count nothing."""
        rate = tenant.requests_per_minute
        if rate is None:
            return 0.0
        period = int(min(MINUTE / rate, LONGEST))
        # Below one request per minute, one request must still fit.
        longest = max(MINUTE, period)
        with self._mutex:
            try:
                wait = self._count(tenant.name, period, longest)
            except OSError as error:  # the disk has failed
                self._warn(error)
                return 0.0
        return wait / SECOND if wait > 0 else 0.0

    def _count(self, name: str, period: int, longest: int) -> int:
        """Return the nanoseconds to wait. If there is nothing to wait for, count a request."""
        now = self._clock()
        if now >= self._check_at:
            self._check_file(now)
        is_locked = self._lock()
        try:
            # The clock is read with the lock held, so that it is not before a time that is in the file.
            now = self._clock()
            place, owner = self._slots.get(name) or self._find_slot(name, now)
            found, full = self._read_slot(place)
            if found != owner:
                place, owner = self._find_slot(name, now)
                _, full = self._read_slot(place)
            if full < now or full > now + longest + STALE:
                full = now
            wait = full + period - longest - now
            if wait <= 0:
                os.pwrite(self._file, _SLOT.pack(owner, full + period), place)
        finally:
            if is_locked:
                fcntl.flock(self._file, fcntl.LOCK_UN)
        return wait

    def _warn(self, error: OSError) -> None:
        now = self._clock()
        if now >= self._warn_at:
            self._warn_at = now + MINUTE
            log.warning("%s: requests per minute are not counted: %s", self._path, error.strerror)

    def _lock(self) -> bool:
        """Lock the file. Return False, without a lock, if another process holds the lock for too long.

        The lock belongs to the open file, unlike that of ``lockf``, which ends when any descriptor of the file is
        closed. The system releases both when a process is killed.
        """
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
        places = [_HEADER + _SLOT.size * ((owner + i) % SLOTS) for i in range(PROBES)]
        slots = {place: self._read_slot(place) for place in places}
        place = next((place for place, (found, _) in slots.items() if found in (owner, 0)), None)
        if place is None:
            # Times from before a restart of the host are the oldest, although they are in the future.
            place = min(places, key=lambda place: slots[place][1] if slots[place][1] <= now + 2 * MINUTE else 0)
        if slots[place][0] != owner:
            os.pwrite(self._file, _SLOT.pack(owner, 0), place)
        self._slots[name] = place, owner
        return place, owner

    def _read_slot(self, place: int) -> tuple[int, int]:
        """Return the hash and the time of a slot; zeros if it is empty."""
        data = os.pread(self._file, _SLOT.size, place)
        if len(data) < _SLOT.size:  # somebody has truncated the file
            self._fill_file()
            return 0, 0
        found, full = _SLOT.unpack(data)
        return found, full

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        with self._mutex:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def __repr__(self) -> str:
        return f"<Rates {len(self._slots)} tenants>"
