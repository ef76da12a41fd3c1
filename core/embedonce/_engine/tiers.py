"""A tier at work: deadline, breaker, TTL, counters. What a backend never sees."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from embedonce.contracts import Capabilities, deadline
from embedonce.errors import PartialAnswer, TierBusy, TierError, TierTimeout
from embedonce.events import Event, LookedUp, Stored, TierChanged
from embedonce.keys import CARD_PREFIX, KEY_PREFIX, Value
from embedonce.vectors import Decoded, Dtype, Entries, Entry, decode_frames, encode_frames, freeze

from .breaker import Breaker
from .chain import Tier, WriteMode
from .checks import conform
from .counters import Counters
from .flights import Table
from .ports import Port, Ports, step
from .workers import Workers

if TYPE_CHECKING:
    import asyncio


log = logging.getLogger("embedonce")


PROBE_KEY = f"{KEY_PREFIX}probe"
"""A key that no entry has; reading it shows whether a tier answers."""

CALLS = 32
"""Most calls to a backend at once from event loops; more wait, and that is no timeout of the tier."""

PROBED = 64
"""A probe asks again for so many keys of the call that failed: others may be on another node, which answers."""

CHUNK = 1024
"""Keys of one backend call where the backend names no ``max_batch``: the deadline is looked at in between."""

CARD_SECONDS = 600.0
"""A space card is written again after this long: the tier may have evicted it, or somebody purged the scope."""

SILENT_SECONDS = 60.0
"""A background write that fails is logged, and none for so long: a busy tier's writes may all fail, one a call."""

TEXT_PREVIEW = "text_preview"
"""Name of the metadata that holds the beginning of a text, for a tier that keeps it."""

JITTER = 0.05
"""An entry's TTL is shortened by up to this share, so that what was written together does not expire together."""

draining: set[LiveTier] = set()
"""Tiers with background writes under way: kept here, as the cache itself may be gone before they are done."""

_TIMEOUTS: Mapping[str, float | None] = {"process": None, "host": 2.0, "network": 0.25}
_WRITES: Mapping[str, WriteMode] = {"process": "inline", "host": "inline", "network": "background"}


@dataclass(slots=True)
class Read:
    """What one tier gave for one call."""

    entries: Entries = field(default_factory=Entries)
    hits: int = 0
    misses: int = 0
    errors: int = 0
    corrupt: int = 0
    skipped: int = 0
    seconds: float = 0.0
    cause: str | None = None
    failed: bool = False
    """The tier, or its breaker, gave no answer for some keys: it is not written to in this call."""
    unknown: set[str] = field(default_factory=set)
    """Keys for which a part of the tier failed while others answered: these alone are not written."""


@dataclass(frozen=True, slots=True)
class Written:
    """What became of entries that were to be written."""

    stored: int = 0
    refused: int = 0
    """Too large."""
    failed: int = 0
    error: Exception | None = None
    """Of those that failed."""


class LiveTier:
    """A tier of a running cache."""

    def __init__(
        self,
        tier: Tier,
        name: str,
        *,
        table: Table,
        ports: Ports,
        cards: Mapping[str, Mapping[str, Value]],
        emit: Callable[[Event], None],
        listened: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self.name = name
        self.backend: Any = tier.backend
        self.capabilities: Capabilities = tier.backend.capabilities
        caps = self.capabilities
        self.ttl = tier.ttl
        self.timeout = tier.timeout if tier.timeout is not None else _TIMEOUTS[caps.scope]
        self.on_error = tier.on_error
        self._encryption = tier.encryption
        self.lease = tier.lease
        # Whoever waits for a lease waits for the vector: it is written before the call goes on.
        self.write_mode: WriteMode = "inline" if tier.lease is not None else tier.write or _WRITES[caps.scope]
        self.counters = Counters()
        self._table = table
        self._ports = ports
        self._cards = cards
        self._emit = emit
        self._listened = listened
        self._clock = clock
        self._corrupt = False
        self._twins: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Any, AsyncGenerator[Any, None]]]
        self._twins = WeakKeyDictionary()
        self._inherited: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Start anew, as in a forked child, and keep what is the parent's from being closed."""
        self._lock = threading.RLock()  # a signal handler may use the cache
        self._workers = Workers(CALLS)
        self.counters.renew()
        self._draining = False
        self._silent_until = 0.0
        self._failing: Sequence[str] = ()
        self._carded: dict[str, float] = {}
        self.reads = Breaker(lambda state, cause: self._changed("read", state, cause))
        self.writes = Breaker(lambda state, cause: self._changed("write", state, cause))
        self._inherited += self._twins.values()
        self._twins = WeakKeyDictionary()

    def _changed(
        self, operation: Literal["read", "write"], state: Literal["open", "closed"], cause: str | None
    ) -> None:
        if state == "open":
            log.warning(
                "tier %r: %ss fail (%s); it is left out and tried again until it answers", self.name, operation, cause
            )
        else:
            log.warning("tier %r: %ss work again", self.name, operation)
        self._emit(TierChanged(tier=self.name, state=state, operation=operation, cause=cause))

    @property
    def encrypted(self) -> bool:
        return self._encryption is not None

    # --- calls to the backend -----------------------------------------------------------------

    async def _call(self, port: Port, call: Callable[[], Any], *, listing: bool = False) -> Any:
        caps = self.capabilities
        # A listing walks over everything that a store holds: the timeout of a look-up is not its measure.
        timeout = None if listing else self.timeout
        quick = not caps.blocking and caps.deadline
        return await port.call(call, timeout, self._workers, inline=caps.deadline, quick=quick)

    async def _get(self, port: Port, keys: Sequence[str]) -> Mapping[str, Any]:
        loop = port.loop
        if loop is None or not self.capabilities.twin:
            found: Mapping[str, Any] = await self._call(port, lambda: self.backend.get_many(keys))
            return found
        held = self._twins.get(loop)
        if held is None:
            # A twin holds its loop, and so would stay, with its connections, when the loop has ended.
            for ended in [other for other in list(self._twins) if other.is_closed()]:
                self._twins.pop(ended, None)
            life = self._live()
            held = self._twins[loop] = await anext(life), life
        twin = held[0]

        async def get() -> Mapping[str, Any]:
            with deadline(self.timeout):
                answer: Mapping[str, Any] = await twin.get_many(keys)
                return answer

        return await port.drive(get, self.timeout)

    async def _live(self) -> AsyncGenerator[Any, None]:
        """Yield a twin once. A loop that ends ends its async generators, and so this one."""
        import asyncio

        twin = self.backend.twin()
        try:
            yield twin
        finally:
            try:
                async with asyncio.timeout(self.timeout):
                    await twin.close()
            except Exception as error:  # noqa: BLE001  (the rest is closed all the same)
                log.warning("tier %r: closing its async client failed (%s)", self.name, type(error).__name__)

    async def close_twin(self, port: Port) -> None:
        """Close the native async client of the running loop, if there is one."""
        held = self._twins.pop(port.loop, None) if port.loop is not None else None
        if held is not None:
            await held[1].aclose()

    def _failed(self, breaker: Breaker, error: Exception, *, probe: bool = False) -> str:
        """Take note of a failed call; return its cause."""
        if isinstance(error, PartialAnswer) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        cause = "timeout" if isinstance(error, TimeoutError) else type(error).__name__
        if not isinstance(error, TierBusy):
            breaker.failed(cause)
        elif probe:  # whoever is busy is there; and until its probe is settled a breaker lets nobody else ask
            breaker.succeeded()
        return cause

    def _raised(self, error: Exception) -> TierError:
        cause = type(error).__name__
        if isinstance(error, TimeoutError):
            return TierTimeout(f"tier {self.name!r} did not answer within {self.timeout} s", self.name)
        return TierError(f"tier {self.name!r} failed ({cause})", self.name)

    def _left_out(self) -> TierError:
        return TierError(f"tier {self.name!r} has failed and is left out until it answers again", self.name)

    def _chunks(self, keys: Sequence[str]) -> Iterator[Sequence[str]]:
        size = self.capabilities.max_batch or (CHUNK if self.capabilities.blocking else len(keys) or 1)
        for start in range(0, len(keys), size):
            yield keys[start : start + size]

    # --- reading ------------------------------------------------------------------------------

    async def read(
        self,
        port: Port,
        keys: Sequence[str],
        *,
        task: str,
        dtype: Dtype,
        dimensions: int | None,
        again: bool = False,
    ) -> Read:
        """Ask for the keys, chunk by chunk, and check what comes back.

        ``again``: these keys were counted as misses of this call before.

        Raises:
            TierError: the tier failed and its ``on_error`` is ``"raise"``.
        """
        read = Read()
        start = time.perf_counter()
        for chunk in self._chunks(keys):
            admitted = self.reads.admit()
            if admitted != "go":
                if admitted == "probe":
                    self._probe()
                read.skipped += len(chunk)
                read.failed = True
                if self.on_error == "raise":
                    self._note(read, task, start)
                    raise self._left_out()
                continue
            try:
                values = await self._get(port, chunk)
                if len(values) > len(chunk) or not set(chunk).issuperset(values):  # what nobody asked for
                    values = {key: values[key] for key in chunk if key in values}
            except Exception as error:
                read.cause = self._failed(self.reads, error)
                failed, found = _parted(chunk, error, Mapping)
                self._failing = failed[:: -(-len(failed) // PROBED)]
                read.errors += len(failed)
                if self.on_error == "raise":
                    self._note(read, task, start)
                    raise self._raised(error) from error
                if len(failed) == len(chunk):
                    read.failed = True
                    continue
                read.unknown.update(failed)
                read.misses -= len(failed)
                values = {key: found[key] for key in chunk if key in found and key not in read.unknown}
            else:
                self.reads.succeeded()
            corrupt = self._accept(values, read.entries, dtype, dimensions)
            read.corrupt += corrupt
            read.misses += len(chunk) - corrupt
        read.hits = len(read.entries)
        read.misses -= read.misses if again else read.hits
        self._note(read, task, start)
        return read

    def _accept(self, values: Mapping[str, Any], entries: Entries, dtype: Dtype, dimensions: int | None) -> int:
        """Put what is sound into ``entries`` and return how many are corrupt."""
        if not values:
            return 0
        decoded = self.decoded(values, dtype=dtype, dimensions=dimensions)
        # Only a space card has no values; under a text's key it is somebody's mistake.
        if dimensions is None and 0 in decoded.entries.sizes():
            empty = [key for key, entry in decoded.entries.items() if entry.vector.size == 0]
            for key in empty:
                del decoded.entries[key]
            decoded.corrupt.extend(empty)
        entries.add(self.without_previews(decoded.entries))
        if decoded.corrupt and not self._corrupt:
            log.warning(
                "tier %r: corrupt entries (%d in this call); they are computed again", self.name, len(decoded.corrupt)
            )
        self._corrupt = bool(decoded.corrupt)
        return len(decoded.corrupt)

    def without_previews(self, entries: Entries) -> Entries:
        """Keep texts where they were asked for: other tiers, to which these are promoted, must not get them."""
        if not self.capabilities.text_preview:
            return entries
        for key, entry in entries.as_dict().items():
            if entry.metadata is not None and TEXT_PREVIEW in entry.metadata:
                rest = {name: value for name, value in entry.metadata.items() if name != TEXT_PREVIEW}
                entries[key] = entry._replace(metadata=rest or None)
        return entries

    def decoded(
        self, values: Mapping[str, Any], *, dtype: Dtype, dimensions: int | None, now: float | None = None
    ) -> Decoded:
        """Check what the backend gave, frames or entries, and decrypt it where the tier is encrypted."""
        now = self._clock() if now is None else now
        holds = self.capabilities.holds
        if holds == "entries":
            trusted = self.capabilities.scope == "process"
            return conform(values, now=now, dtype=dtype, dimensions=dimensions, trusted=trusted)
        if holds == "frames" or not (entries := _entries_among(values)):
            return self._decoded_frames(values, now, dtype, dimensions)
        if self._encryption is None:
            decoded = conform(entries, now=now, dtype=dtype, dimensions=dimensions)
        else:  # stored before the tier was encrypted
            decoded = Decoded(missed=list(entries))
        if len(entries) < len(values):
            rest = {key: value for key, value in values.items() if key not in entries}
            frames = self._decoded_frames(rest, now, dtype, dimensions)
            decoded.entries.add(frames.entries)
            decoded.corrupt.extend(frames.corrupt)
            decoded.missed.extend(frames.missed)
        return decoded

    def _decoded_frames(self, frames: Mapping[str, Any], now: float, dtype: Dtype, dimensions: int | None) -> Decoded:
        if self._encryption is None:
            return decode_frames(frames, now=now, dtype=dtype, dimensions=dimensions)
        plain, corrupt, unencrypted = self._encryption.decrypt(frames)
        decoded = decode_frames(plain, now=now, dtype=dtype, dimensions=dimensions)
        decoded.corrupt.extend(corrupt)
        decoded.missed.extend(unencrypted)
        return decoded

    def _encoded(self, entries: Mapping[str, Entry]) -> Mapping[str, Any]:
        """Return what the backend is given for entries."""
        if self._encryption is not None:
            return self._encryption.encrypt(encode_frames(entries))
        return encode_frames(entries) if self.capabilities.holds == "frames" else entries

    def _note(self, read: Read, task: str, start: float) -> None:
        read.seconds = time.perf_counter() - start
        counts = {
            "hits": read.hits,
            "misses": read.misses,
            "errors": read.errors,
            "corrupt": read.corrupt,
            "skipped": read.skipped,
        }
        self.counters.count(seconds=read.seconds, cause=read.cause, **counts)
        if self._listened():
            self._emit(LookedUp(tier=self.name, task=task, seconds=read.seconds, cause=read.cause, **counts))

    def _probe(self) -> None:
        """See off the caller's path whether the tier answers again what it did not."""

        def probe() -> None:
            try:
                with deadline(self.timeout):
                    self.backend.get_many(self._failing)
            except Exception as error:  # noqa: BLE001  (the breaker is what it is for)
                self._failed(self.reads, error, probe=True)
            else:
                self.reads.succeeded()

        self._off_path(probe)

    def _off_path(self, call: Callable[[], None]) -> bool:
        try:
            self._ports.workers.submit(call)
        except RuntimeError:  # the interpreter is ending and starts no threads any more
            return False
        return True

    # --- writing ------------------------------------------------------------------------------

    def dated(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Return the entries with this tier's expiry: the sooner of the tier's TTL and what remains."""
        if self.ttl is None:
            return dict(entries)
        now = self._clock()
        dated = {}
        for key, entry in entries.items():
            share = int(key[-4:], 16) / 0xFFFF
            expires = now + self.ttl * (1 - JITTER * share)
            if entry.expires is None or expires < entry.expires:
                entry = entry._replace(expires=expires)
            dated[key] = entry
        return dated

    async def store(
        self,
        port: Port,
        ticket: int,
        entries: Mapping[str, Entry],
        previews: Callable[[str], str] | None = None,
        *,
        patience: bool = True,
    ) -> None:
        """Write entries in this tier's mode. Promotions have no ``patience``: a full queue drops them.

        ``previews`` gives the beginning of a key's text to a tier that keeps it.

        Raises:
            TierError: an inline write failed and the tier's ``on_error`` is ``"raise"``.
        """
        if self.write_mode == "none" or not entries:
            return
        if self.capabilities.text_preview and previews is not None:
            entries = {
                key: entry._replace(metadata={**(entry.metadata or {}), TEXT_PREVIEW: previews(key)})
                for key, entry in entries.items()
            }
        if self.write_mode == "background":
            await self._queue(port, ticket, entries, patience=patience)
            return
        dated = self.dated(entries)
        for chunk in self._chunks(list(dated)):
            part = {key: dated[key] for key in chunk}
            admitted = self.writes.admit()
            if admitted == "skip":
                self._wrote(0, dropped=len(part), cause="skipped")
                if self.on_error == "raise":
                    raise self._left_out()
                continue
            if admitted == "probe":
                self._off_path(lambda part=part: self._write_caught(ticket, part, probe=True))  # type: ignore[misc]
                continue
            start = time.perf_counter()
            try:
                written = await self._call(port, lambda part=part: self._write(ticket, part))  # type: ignore[misc]
            except Exception as error:  # noqa: BLE001  (as in read)
                written = Written(failed=len(part), error=error)
            self._settle(written, start)
            if written.error is not None and self.on_error == "raise":
                raise self._raised(written.error) from written.error

    async def add(self, port: Port, items: Mapping[str, bytes], ttl: float) -> set[str] | None:
        """Set what is absent and return those keys, and the keys of a part of the tier that failed.

        None where the tier fails or its breaker is open.
        """
        added: set[str] = set()
        for chunk in self._chunks(list(items)):
            if self.writes.open:
                return None
            part = {key: items[key] for key in chunk}
            start = time.perf_counter()
            try:
                added |= await self._call(port, lambda part=part: self.backend.add_many(part, ttl))  # type: ignore[misc]
            except Exception as error:  # noqa: BLE001  (as in read)
                failed, others = _parted(list(part), error, Set)
                self._wrote(0, errors=len(failed), cause=self._failed(self.writes, error), start=start)
                if len(failed) == len(part):
                    return None
                added.update(failed, others)
            else:
                self.writes.succeeded()
        return added

    def _write(self, ticket: int, entries: Mapping[str, Entry]) -> Written:
        """Write what may still be stored."""
        with self._table.writing(self.name, ticket, entries) as permitted:
            return self._set(permitted)

    def _set(self, entries: Mapping[str, Entry]) -> Written:
        if not entries:
            return Written()
        expires = [entry.expires for entry in entries.values()]
        ends = [end for end in expires if end is not None]
        ttl = max(1e-3, max(ends) - self._clock()) if len(ends) == len(expires) else None
        values = self._encoded(entries)
        limit = self.capabilities.max_value_bytes
        if limit is not None:
            values = {k: v for k, v in values.items() if not isinstance(v, bytes) or len(v) <= limit}
        failed: Sequence[str] = ()
        problem = None
        if values:
            try:
                self.backend.set_many(values, ttl)
            except PartialAnswer as error:
                problem = error
                failed, _ = _parted(list(values), error, object)
        self._set_cards(entries)
        return Written(len(values) - len(failed), len(entries) - len(values), len(failed), problem)

    def _set_cards(self, keys: Iterable[str]) -> None:
        """Store the space card of each scope, now and again.

        In a call of its own: a card has no TTL. An in-process tier needs none, as this cache is the
        only one that writes to it.
        """
        if self.capabilities.scope == "process":
            return
        now = time.monotonic()
        scopes = {key.split(".", 2)[1] for key in keys} & self._cards.keys()
        due = {scope for scope in scopes if now - self._carded.get(scope, -CARD_SECONDS) >= CARD_SECONDS}
        cards = {CARD_PREFIX + scope: Entry(freeze(()), self._clock(), metadata=self._cards[scope]) for scope in due}
        if cards:
            try:
                self.backend.set_many(self._encoded(cards), None)
            except (PartialAnswer, TierBusy):  # the entries are stored all the same; the card comes with later ones
                return
            self._carded.update(dict.fromkeys(due, now))

    def _settle(self, written: Written, start: float, *, probe: bool = False) -> str | None:
        """Count what became of a write, and tell the breaker; return the cause of what was not stored."""
        if written.error is None:
            self.writes.succeeded()
            cause = "too large" if written.refused else None
        else:
            cause = self._failed(self.writes, written.error, probe=probe)
            if written.refused:
                self._wrote(0, dropped=written.refused, cause="too large")
                written = replace(written, refused=0)
        self._wrote(written.stored, dropped=written.refused, errors=written.failed, cause=cause, start=start)
        return cause

    def _wrote(
        self, stored: int, *, dropped: int = 0, errors: int = 0, cause: str | None = None, start: float | None = None
    ) -> None:
        seconds = 0.0 if start is None else time.perf_counter() - start
        self.counters.count(stored=stored, dropped=dropped, errors=errors, cause=cause, seconds=seconds)
        if self._listened():
            self._emit(
                Stored(tier=self.name, stored=stored, dropped=dropped, errors=errors, seconds=seconds, cause=cause)
            )

    # --- background writes --------------------------------------------------------------------

    async def _queue(self, port: Port, ticket: int, entries: Mapping[str, Entry], *, patience: bool) -> None:
        dated = self.dated(entries)
        end = time.monotonic() + (self.timeout or 0.0)
        while True:
            force = patience and time.monotonic() >= end
            room, dropped = self._table.queue(self.name, ticket, dated, force=force)
            self.start_draining()
            if not room and not patience:
                dropped = len(dated)
            if dropped:
                self._wrote(0, dropped=dropped, cause="queue full")
            if room or not patience:
                return
            await port.sleep(0.002)

    def start_draining(self) -> None:
        """See that somebody writes what is queued; one thread at a time."""
        with self._lock:
            if self._draining or not self._table.queued(self.name):
                return
            self._draining = True
            draining.add(self)
        if not self._off_path(self._drain):
            self._drain()  # the interpreter is ending: here and now, or never

    def _drain(self) -> None:
        while True:
            self.drain()
            with self._lock:
                if not self._table.queued(self.name):
                    self._drained()
                    return

    def _drained(self) -> None:
        self._draining = False
        draining.discard(self)

    def wait_until_drained(self, timeout: float) -> bool:
        """Wait for the writes under way; False after ``timeout`` seconds."""
        return self._table.flushed(timeout)

    def drain(self) -> None:
        """Write what is queued, in this thread."""
        while (write := self._table.next_write(self.name)) is not None:
            try:
                for chunk in self._chunks(list(write.entries)):
                    part = {key: write.entries[key] for key in chunk}
                    admitted = self.writes.admit()
                    if admitted == "skip":
                        self._wrote(0, dropped=len(part), cause="skipped")
                    else:
                        self._write_caught(write.ticket, part, probe=admitted == "probe")
            finally:
                self._table.wrote(write)

    def _write_caught(self, ticket: int, entries: Mapping[str, Entry], *, probe: bool) -> None:
        """Write where nobody waits for the result: a failure is counted and logged."""
        start = time.perf_counter()
        try:
            written: Written = step(self._call(self._ports.blocking, lambda: self._write(ticket, entries)))
        except Exception as error:  # noqa: BLE001  (as in read)
            written = Written(failed=len(entries), error=error)
        cause = self._settle(written, start, probe=probe)
        now = time.monotonic()
        if written.error is not None and not self.writes.open and now >= self._silent_until:
            self._silent_until = now + SILENT_SECONDS
            log.warning("tier %r: a background write of %d entries failed (%s)", self.name, written.failed, cause)

    # --- erasing and listing ------------------------------------------------------------------

    async def erase(self, port: Port, keys: Sequence[str]) -> None:
        """Remove keys. It never fails open.

        Raises:
            TierError: the backend has no ``delete_many``, or it failed.
        """
        if not self.capabilities.delete:
            raise TierError("it cannot delete", self.name)
        for chunk in self._chunks(keys):
            await self._strictly(port, lambda chunk=chunk: self.backend.delete_many(chunk))  # type: ignore[misc]

    async def scan(self, port: Port, prefix: str) -> list[str]:
        """Return the keys that start with ``prefix``.

        Raises:
            TierError: the backend has no ``scan``, or it failed.
        """
        if not self.capabilities.scan:
            raise TierError("it cannot list its keys", self.name)
        keys: list[str] = await self._strictly(port, lambda: list(self.backend.scan(prefix)), listing=True)
        return keys

    async def describe(self, port: Port) -> str:
        """Return how the backend stores vectors, in its own words; nothing where it has none."""
        if not hasattr(self.backend, "describe"):
            return ""
        words: str = await self._strictly(port, self.backend.describe)
        return words

    async def migrate(self, port: Port) -> str:
        """Bring the store's layout up to date, for as long as that takes, and return what was done."""
        done: str = await self._strictly(port, self.backend.migrate, listing=True)
        return done

    async def peek(self, port: Port, keys: Sequence[str]) -> Mapping[str, Any]:
        """Return the raw values of some keys, uncounted.

        Raises:
            TierError: the backend failed.
        """
        values: dict[str, Any] = {}
        for chunk in self._chunks(keys):
            values.update(await self._strictly(port, lambda chunk=chunk: self.backend.get_many(chunk)))  # type: ignore[misc]
        return values

    async def _strictly(self, port: Port, call: Callable[[], Any], *, listing: bool = False) -> Any:
        try:
            return await self._call(port, call, listing=listing)
        except TierError as error:
            raise TierError(str(error), self.name) from error
        except TimeoutError as error:
            raise TierTimeout(f"no answer within {self.timeout} s", self.name) from error
        except Exception as error:
            raise TierError(f"{type(error).__name__}", self.name) from error

    def forget_cards(self, scopes: Iterable[str]) -> None:
        """Write the cards of these scopes again with the next entries."""
        for scope in scopes:
            self._carded.pop(scope, None)


def _parted(keys: Sequence[str], error: Exception, kind: type) -> tuple[Sequence[str], Any]:
    """Return the keys that a call failed for and the answer for the others; without a sound one all have failed."""
    if isinstance(error, PartialAnswer) and isinstance(error.answer, kind):
        failed = [key for key in keys if key in error.failed]
        if failed:
            return failed, error.answer
    return keys, ()


def _entries_among(values: Mapping[str, Any]) -> Mapping[str, Entry]:
    return values if isinstance(values, Entries) else {k: v for k, v in values.items() if type(v) is Entry}
