"""Reading from a tier: the read breaker and its probe, which entries of an answer are valid, and what is counted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from embedonce.errors import TierError
from embedonce.events import Event, LookedUp
from embedonce.vectors import Dtype, Entries

from .backend_calls import BackendCalls, split_partial
from .breaker import Breaker, BreakerChange
from .codec import Codec
from .counters import Counters
from .ports import Port

log = logging.getLogger("embedonce")

PROBED = 64
"""A probe asks again for up to this many keys of the call that failed: other keys may be on a node that answers."""


@dataclass(slots=True)
class Read:
    """What one tier gave for one call."""

    entries: Entries = field(default_factory=Entries)
    answered: int = 0
    """Keys for which the tier answered anything at all: a hit, a miss or something corrupt."""
    errors: int = 0
    corrupt: int = 0
    skipped: int = 0
    seconds: float = 0.0
    cause: str | None = None
    failed: bool = False
    """The tier, or its breaker, gave no answer for some keys: it is not written to in this call."""
    unknown: set[str] = field(default_factory=set)
    """Keys for which a part of the tier failed while others answered: these alone are not written."""


class Reading:
    """Reads from one tier."""

    def __init__(
        self,
        calls: BackendCalls,
        codec: Codec,
        counters: Counters,
        *,
        changed: BreakerChange,
        emit: Callable[[Event], None],
        has_listeners: Callable[[], bool],
    ) -> None:
        self._calls = calls
        self._codec = codec
        self._counters = counters
        self._changed = changed
        self._emit = emit
        self._has_listeners = has_listeners
        self._was_corrupt = False
        self.reset()

    def reset(self) -> None:
        """Start anew, as in a forked child."""
        self.breaker = Breaker(self._changed)
        self.failing: Sequence[str] = ()
        """Some of the keys of the last call that failed; a probe asks for them."""

    async def read(
        self,
        port: Port,
        keys: Sequence[str],
        *,
        task: str,
        dtype: Dtype,
        dimensions: int | None,
        is_repeat: bool = False,
    ) -> Read:
        """Ask for the keys, chunk by chunk, and check what comes back.

        ``is_repeat``: these keys were counted as misses of this call before.

        Raises:
            TierError: the tier failed and its ``on_error`` is ``"raise"``.
        """
        read = Read()
        start = time.perf_counter()
        calls, breaker = self._calls, self.breaker
        try:
            for chunk in calls.chunks(keys):
                admitted = breaker.admit()
                if admitted != "go":
                    if admitted == "probe":
                        self._probe()
                    read.skipped += len(chunk)
                    read.failed = True
                    if calls.on_error == "raise":
                        raise calls.skipped_error()
                    continue
                try:
                    values = await calls.get(port, chunk)
                    if len(values) > len(chunk) or not set(chunk).issuperset(values):  # what nobody asked for
                        values = {key: values[key] for key in chunk if key in values}
                except Exception as error:  # noqa: BLE001  (whatever it is, it is the tier's)
                    values = self._note_failure(chunk, read, error)
                else:
                    breaker.succeeded()
                    read.answered += len(chunk)
                if values:
                    read.corrupt += self._accept(values, read.entries, dtype, dimensions)
        except TierError:
            self._count(read, task, start, is_repeat=is_repeat)
            raise
        if dimensions is None:
            _leave_out_odd(read)
        self._count(read, task, start, is_repeat=is_repeat)
        return read

    def _note_failure(self, chunk: Sequence[str], read: Read, error: Exception) -> Mapping[str, Any]:
        """Take note of a chunk that failed, wholly or in part, and return what was answered of it.

        Raises:
            TierError: the tier's ``on_error`` is ``"raise"``.
        """
        read.cause = self._calls.note_failure(self.breaker, error)
        failed, found = split_partial(chunk, error, Mapping)
        self.failing = failed[:: -(-len(failed) // PROBED)]
        read.errors += len(failed)
        if self._calls.on_error == "raise":
            raise self._calls.tier_error(error) from error
        if len(failed) == len(chunk):
            read.failed = True
            return {}
        read.unknown.update(failed)
        read.answered += len(chunk) - len(failed)
        return {key: found[key] for key in chunk if key in found and key not in read.unknown}

    def _accept(self, values: Mapping[str, Any], entries: Entries, dtype: Dtype, dimensions: int | None) -> int:
        """Put what is sound into ``entries`` and return how many are corrupt."""
        decoded = self._codec.decode(values, dtype=dtype, dimensions=dimensions)
        # Only a space card has no values; under a text's key it is somebody's mistake.
        if dimensions is None and 0 in decoded.entries.sizes():
            empty = [key for key, entry in decoded.entries.items() if entry.vector.size == 0]
            for key in empty:
                del decoded.entries[key]
            decoded.corrupt.extend(empty)
        entries.add(self._codec.remove_previews(decoded.entries))
        if decoded.corrupt and not self._was_corrupt:
            log.warning(
                "tier %r: corrupt entries (%d in this call); they are computed again",
                self._calls.name,
                len(decoded.corrupt),
            )
        self._was_corrupt = bool(decoded.corrupt)
        return len(decoded.corrupt)

    def _count(self, read: Read, task: str, start: float, *, is_repeat: bool) -> None:
        read.seconds = time.perf_counter() - start
        hits = len(read.entries)
        counts = {
            "hits": hits,
            "misses": 0 if is_repeat else read.answered - hits - read.corrupt,
            "errors": read.errors,
            "corrupt": read.corrupt,
            "skipped": read.skipped,
        }
        self._counters.count(seconds=read.seconds, cause=read.cause, **counts)
        if self._has_listeners():
            self._emit(LookedUp(tier=self._calls.name, task=task, seconds=read.seconds, cause=read.cause, **counts))

    def _probe(self) -> None:
        """See off the caller's path whether the tier answers again what it did not."""

        def probe() -> None:
            try:
                self._calls.call_now(lambda: self._calls.backend.get_many(self.failing))
            except Exception as error:  # noqa: BLE001  (the breaker is what it is for)
                self._calls.note_failure(self.breaker, error, probe=True)
            else:
                self.breaker.succeeded()

        self._calls.run_off_path(probe)


def _leave_out_odd(read: Read) -> None:
    """Leave out entries of another dimension, where only the entries themselves can tell the right one."""
    sizes = read.entries.sizes()
    if len(sizes) > 1:
        usual = sizes.most_common(1)[0][0]
        odd = [key for key, entry in read.entries.as_dict().items() if entry.vector.size != usual]
        for key in odd:
            del read.entries[key]
        read.corrupt += len(odd)
