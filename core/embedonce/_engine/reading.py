"""Reading from a tier. The reader checks and counts the values that the tier returns, and has a breaker with probes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from embedonce.errors import TierError
from embedonce.events import Event, LookedUp
from embedonce.vectors import CostColumns, Dtype, Entries, Entry, sum_costs

from .backend_calls import BackendCalls, split_partial
from .breaker import Breaker, BreakerChange
from .codec import Codec
from .counters import Counters
from .ledger import Ledger
from .ports import Port
from .routes import Route

MAX_PROBE_KEYS = 64
"""Maximum number of keys in a probe.

A probe reads only keys that failed. Other keys may be on a healthy node, so reading them would not show whether the
failed node works again.
"""


class ReadResult:
    """The result of reading one tier in one call.

    Most reads change few of these values. Therefore the usual values are attributes of the class.
    """

    answered = 0
    """Number of keys that were read without an error: hits, misses and corrupt entries."""
    errors = 0
    corrupt = 0
    skipped = 0
    seconds = 0.0
    cause: str | None = None
    failed = False
    """Whether the tier failed or was skipped for some keys. If so, this call writes nothing to the tier."""
    unknown: Set[str] = frozenset()
    """Keys whose node or shard failed while other nodes answered. This call does not write these keys to the tier."""

    def __init__(self) -> None:
        self.entries = Entries()


MISSED = ReadResult()
"""The result of each read of one key that the tier does not have. Do not change it."""


class TierReader:
    """Reads from one tier."""

    def __init__(
        self,
        calls: BackendCalls,
        codec: Codec,
        counters: Counters,
        *,
        ledger: Ledger,
        on_change: BreakerChange,
        emit: Callable[[Event], None],
        has_listeners: Callable[[], bool],
    ) -> None:
        self._calls = calls
        self._codec = codec
        self._counters = counters
        self._ledger = ledger
        self._on_change = on_change
        self._emit = emit
        self._has_listeners = has_listeners
        self.reset()

    def reset(self) -> None:
        """Start over in a forked child."""
        self.breaker = Breaker(self._on_change)
        self.failing: Sequence[str] = ()
        """Some of the keys that failed most recently; the next probe reads these keys."""

    async def read(
        self,
        port: Port,
        keys: Sequence[str],
        *,
        route: Route,
        dtype: Dtype,
        dimensions: int | None,
        is_repeat: bool = False,
        has_use: bool = True,
    ) -> ReadResult:
        """Read the keys of a route, chunk by chunk, and check the values.

        With ``is_repeat``, no misses and no corrupt entries are counted, because the first read of these keys has
        already counted them. Without ``has_use``, hits are not counted either, because they save no work.

        Raises:
            TierError: the tier failed and its ``on_error`` is ``"raise"``.
        """
        read = ReadResult()
        start = time.perf_counter()
        calls, breaker = self._calls, self.breaker
        try:
            for chunk in calls.split_into_chunks(keys):
                admitted = breaker.admit()
                if admitted != "go":
                    if admitted == "probe":
                        self._probe()
                    read.skipped += len(chunk)
                    read.failed = True
                    if calls.on_error == "raise":
                        raise calls.make_skipped_error()
                    continue
                try:
                    values = await calls.get(port, chunk)
                    # Most answers have all keys in order, and comparing lists is faster than making a set.
                    if list(values) != chunk and (len(values) > len(chunk) or not set(chunk).issuperset(values)):
                        # The backend returned keys that were not requested.
                        values = {key: values[key] for key in chunk if key in values}
                except Exception as error:  # noqa: BLE001  (a backend may raise anything)
                    values = self._note_failure(chunk, read, error)
                else:
                    breaker.record_success()
                    read.answered += len(chunk)
                if values:
                    self._accept(values, read, dtype, dimensions)
        except TierError:
            self._count(read, route, start, is_repeat=is_repeat, has_use=has_use)
            raise
        if dimensions is None:
            _drop_odd_dimensions(read)
        self._count(read, route, start, is_repeat=is_repeat, has_use=has_use)
        return read

    def read_one(self, key: str, *, route: Route, dtype: Dtype, dimensions: int) -> Entry | ReadResult | None:
        """Read one key in the caller's thread, and count the read as :meth:`read` does, but emit no event.

        Returns:
            The entry; :data:`MISSED` if the tier does not have it; another result if the read failed or the value needs
            a closer look; None if nothing was read, because the breaker is open.

        Raises:
            TierError: the tier failed and its ``on_error`` is ``"raise"``.
        """
        if self.breaker.is_open:
            return None
        start = time.perf_counter()
        try:
            value = self._calls.get_inline(key)
        except Exception as error:  # noqa: BLE001  (a backend may raise anything)
            read = ReadResult()
            try:
                self._note_failure([key], read, error)
            finally:
                self._count(read, route, start)
            return read
        self.breaker.record_success()
        if value is None:
            self._counters.count_read(1, time.perf_counter() - start)
            return MISSED
        entry = self._codec.decode_plain(key, value, dtype, dimensions)
        if entry is None:
            read = ReadResult()
            read.answered = 1
            self._accept({key: value}, read, dtype, dimensions)
            self._count(read, route, start)
            return read
        self._counters.count_read(0, time.perf_counter() - start)
        costs = [CostColumns(1, (entry.tokens,), (entry.seconds,))]
        self._ledger.count_saved(route.keyer.scope, route.source.price, self._calls.name, costs)
        return entry

    def _note_failure(self, chunk: Sequence[str], read: ReadResult, error: Exception) -> Mapping[str, Any]:
        """Record a chunk that failed, wholly or in part, and return the values that did arrive.

        Raises:
            TierError: the tier's ``on_error`` is ``"raise"``.
        """
        read.cause = self._calls.note_failure(self.breaker, error)
        failed, found = split_partial(chunk, error, Mapping)
        self.failing = failed[:: -(-len(failed) // MAX_PROBE_KEYS)]
        read.errors += len(failed)
        if self._calls.on_error == "raise":
            raise self._calls.make_error(error) from error
        if len(failed) == len(chunk):
            read.failed = True
            return {}
        read.unknown |= set(failed)
        read.answered += len(chunk) - len(failed)
        return {key: found[key] for key in chunk if key in found and key not in read.unknown}

    def _accept(self, values: Mapping[str, Any], read: ReadResult, dtype: Dtype, dimensions: int | None) -> None:
        """Add the valid values to the result, and count the corrupt ones."""
        if len(values) == 1 and dimensions is not None:
            [(key, value)] = values.items()
            entry = self._codec.decode_plain(key, value, dtype, dimensions)
            if entry is not None:
                read.entries[key] = entry
                return
        decoded = self._codec.decode(values, dtype=dtype, dimensions=dimensions)
        # Only a space card has an empty vector. Under the key of a text, an empty vector is invalid.
        if dimensions is None and 0 in decoded.entries.sizes():
            empty = [key for key, entry in decoded.entries.items() if entry.vector.size == 0]
            for key in empty:
                del decoded.entries[key]
            decoded.corrupt.extend(empty)
        entries = self._codec.remove_previews(decoded.entries)
        if read.entries:
            read.entries.add(entries)
        else:
            read.entries = entries
        read.corrupt += len(decoded.corrupt)
        if decoded.corrupt:
            self._calls.warnings.warn(
                "corrupt",
                "tier %r: ignoring {count} corrupt entries; their vectors are recomputed",
                self._calls.name,
                count=len(decoded.corrupt),
            )

    def _count(
        self, read: ReadResult, route: Route, start: float, *, is_repeat: bool = False, has_use: bool = True
    ) -> None:
        read.seconds = time.perf_counter() - start
        name, scope, hits = self._calls.name, route.keyer.scope, len(read.entries)
        misses = 0 if is_repeat else read.answered - hits - read.corrupt
        corrupt = 0 if is_repeat else read.corrupt
        if corrupt or read.errors or read.skipped:
            self._counters.count(
                misses=misses,
                errors=read.errors,
                corrupt=corrupt,
                skipped=read.skipped,
                cause=read.cause,
                seconds=read.seconds,
            )
        else:
            self._counters.count_read(misses, read.seconds)
        costs = read.entries.list_costs() if hits and has_use else []
        if costs:
            self._ledger.count_saved(scope, route.source.price, name, costs)
        if self._has_listeners():
            self._emit(
                LookedUp(
                    tier=name,
                    task=route.task,
                    hits=hits,
                    seconds=read.seconds,
                    cause=read.cause,
                    scope=scope,
                    saved=sum_costs(costs),
                    price=route.source.price,
                    misses=misses,
                    errors=read.errors,
                    corrupt=corrupt,
                    skipped=read.skipped,
                )
            )

    def _probe(self) -> None:
        """Start a background read of some keys that failed recently, and report the result to the breaker."""

        def probe() -> None:
            try:
                self._calls.call_in_this_thread(lambda: self._calls.backend.get_many(self.failing))
            except Exception as error:  # noqa: BLE001  (the breaker gets every failure)
                self._calls.note_failure(self.breaker, error, probe=True)
            else:
                self.breaker.record_success()

        self._calls.run_in_background(probe)


def _drop_odd_dimensions(read: ReadResult) -> None:
    """Keep only entries with the most common number of dimensions. Call this while the right number is unknown."""
    sizes = read.entries.sizes()
    if len(sizes) > 1:
        usual = sizes.most_common(1)[0][0]
        odd = [key for key, entry in read.entries.as_dict().items() if entry.vector.size != usual]
        for key in odd:
            del read.entries[key]
        read.corrupt += len(odd)
