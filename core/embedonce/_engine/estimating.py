"""Estimate what it would cost to embed a stream of texts.

An estimate reads the tiers. It computes and stores nothing, and changes no counter and no breaker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from embedonce.answers import Estimate
from embedonce.contracts import Limits
from embedonce.errors import LoopBusy, PartialAnswer, TierBusy
from embedonce.vectors import Dtype, Entries, Entry

from .backend_calls import split_partial
from .batch_sizes import count_bytes
from .flights import InFlight
from .ports import Port
from .provider_calls import count_exactly, count_sent_tokens
from .rate import MINUTE
from .routes import Route
from .tiers import LiveTier
from .token_sample import TokenSample

SKIPPED = "skipped"
"""The cause in ``Estimate.errors`` if the breaker of a tier is open."""


class KnownTexts:
    """The texts of a stream so far, as hashes of 8 bytes.

    Two texts with the same hash count as one text. Among ten million texts, the probability that any two have the same
    hash is 3 in a million.
    """

    def __init__(self) -> None:
        self._runs: list[NDArray[np.uint64]] = []
        """Sorted hashes. Each array is at least twice as long as the next one, so there are few of them."""

    def add(self, hashes: Sequence[int]) -> list[bool]:
        """Add the different hashes of some texts, and return for each one whether it is new."""
        added = np.array(hashes, np.uint64)
        is_new = np.ones(len(added), np.bool_)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, added), len(run) - 1)
            is_new &= run[places] != added
        if is_new.any():
            self._runs.append(np.sort(added[is_new]))
            while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
                last = self._runs.pop()
                # This sort merges two sorted halves in linear time.
                self._runs[-1] = np.sort(np.concatenate([self._runs[-1], last]), kind="stable")
        return is_new.tolist()


class Estimator:
    """Makes an estimate from a stream of texts, window by window. It keeps 8 bytes per distinct text, and no text."""

    def __init__(self, tiers: Sequence[LiveTier], in_flight: InFlight, route: Route, dtype: Dtype) -> None:
        self._tiers = tiers
        self._in_flight = in_flight
        self._route = route
        self._dtype: Dtype = dtype
        self._dimensions = route.dimensions
        self._known = KnownTexts()
        self._errors: dict[str, str] = {}
        self._failed: set[str] = set()
        """Names of the tiers that have failed, and are not asked again."""
        self._hits: Counter[str] = Counter()
        self.texts = 0
        """Number of texts so far, which is the position of the next one."""
        self._invalid = 0
        self._missing = 0
        self._bytes = 0
        self._counted: int | None = 0
        """Tokens of the missing texts, or None if the provider cannot count them."""
        self._sent_tokens = 0.0
        """Tokens of the missing texts, as the provider's limits count them."""
        self._sample = TokenSample()
        self._timed_bytes = 0
        self._timed_seconds = 0.0

    # --- adding texts -------------------------------------------------------------------------

    async def add(self, port: Port, texts: Sequence[str]) -> None:
        """Add the next texts of the stream. They must be plain ``str``."""
        self.texts += len(texts)
        normalized = self._select_new(texts)
        sizes = {key: count_bytes(text) for key, text in normalized.items()}
        missing = list(normalized)
        for tier in self._tiers:
            if missing:
                missing = await self._read(port, tier, missing, sizes)
        if missing and self._tiers:
            # These entries are queued for a background write. A call would use them too.
            landed = self._in_flight.find_landed(missing)
            entries = {key: flight.entry for key, flight in landed.items() if flight.entry is not None}
            self._count_hits(self._tiers[-1].name, entries, sizes)
            missing = [key for key in missing if key not in entries]
        self._missing += len(missing)
        self._bytes += sum(sizes[key] for key in missing)
        if missing:
            await self._count_tokens(port, [normalized[key] for key in missing])

    def _select_new(self, texts: Sequence[str]) -> dict[str, str]:
        """Return by key the normalized texts that have not been added before. Count the texts without a key."""
        keyer = self._route.keyer
        normalized: dict[str, str] = {}
        invalid: dict[bytes, None] = {}
        for text in dict.fromkeys(texts):
            # The memo of keys is not used, because it would keep these texts and drop those of recent calls.
            try:
                changed = keyer.normalize(text)
                normalized.setdefault(keyer.key(changed), changed)
            except Exception:  # noqa: BLE001  (a plugin's normalisation step may raise anything)
                invalid[text.encode("utf-8", "surrogatepass")] = None
        items = [*(key.encode() for key in normalized), *invalid]
        new = self._known.add(list(map(xxhash.xxh3_64_intdigest, items)))
        self._invalid += sum(new[len(normalized) :])
        return {key: text for (key, text), is_new in zip(normalized.items(), new, strict=False) if is_new}

    async def _count_tokens(self, port: Port, texts: list[str]) -> None:
        source, task = self._route.source, self._route.task
        provider, limits = source.provider, source.provider.limits

        def count() -> tuple[int | None, float]:
            exact = None if self._counted is None else count_exactly(provider, texts, task)
            is_limited = limits.max_tokens is not None or limits.tokens_per_minute is not None
            return exact, count_sent_tokens(provider, texts) if is_limited else 0.0

        # A tokenizer takes long for many texts, so on an event loop it runs in a thread.
        exact, sent = await port.call(count, None, source.workers, inline=False, quick=False)
        self._counted = None if exact is None or self._counted is None else self._counted + exact
        self._sent_tokens += sent

    # --- reading tiers ------------------------------------------------------------------------

    async def _read(self, port: Port, tier: LiveTier, keys: Sequence[str], sizes: Mapping[str, int]) -> list[str]:
        """Look for keys in a tier, and return those that it does not have. A failed tier is not asked again."""
        if tier.reader.breaker.is_open and tier.name not in self._failed:
            self._failed.add(tier.name)
            self._errors.setdefault(tier.name, SKIPPED)
        found: set[str] = set()
        for chunk in tier.calls.split_into_chunks(keys):
            if tier.name in self._failed:
                break
            entries = self._decode(tier, await self._peek(port, tier, chunk))
            self._count_hits(tier.name, entries, sizes)
            found.update(entries)
        return [key for key in keys if key not in found]

    async def _peek(self, port: Port, tier: LiveTier, keys: Sequence[str]) -> dict[str, Any]:
        try:
            values = await tier.peek(port, keys)
            return {key: values[key] for key in keys if key in values}
        except Exception as error:  # noqa: BLE001  (a backend may return anything)
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            failed, values = split_partial(keys, cause, Mapping)
            if isinstance(cause, PartialAnswer) and isinstance(cause.__cause__, Exception):
                cause = cause.__cause__
            # A busy tier answers immediately, so asking it again takes no time. Its other nodes may have entries.
            if len(failed) == len(keys) or not isinstance(cause, TierBusy):
                self._failed.add(tier.name)
            self._errors.setdefault(tier.name, _name_cause(cause))
            return {key: values[key] for key in keys if key in values and key not in failed}

    def _decode(self, tier: LiveTier, values: Mapping[str, Any]) -> dict[str, Entry]:
        """Return the entries that a call would use."""
        entries = tier.decode(values, dtype=self._dtype, dimensions=self._dimensions).entries
        if self._dimensions is None:
            self._dimensions = _find_usual_dimensions(entries)
        return {key: entry for key, entry in entries.as_dict().items() if entry.vector.size == self._dimensions}

    def _count_hits(self, tier: str, entries: Mapping[str, Entry], sizes: Mapping[str, int]) -> None:
        if entries:
            self._hits[tier] += len(entries)
        for key, entry in entries.items():
            if entry.tokens is not None:
                self._sample.add(entry.created, entry.tokens, sizes[key])
            if entry.seconds is not None:
                self._timed_seconds += entry.seconds
                self._timed_bytes += sizes[key]

    # --- the result ---------------------------------------------------------------------------

    def finish(self) -> Estimate:
        """Return the estimate for all texts that were added."""
        bound = self._sample.estimate(self._missing, self._bytes)
        counted = self._counted if hasattr(self._route.source.provider, "count_exact_tokens") else None
        return Estimate(
            texts=self.texts,
            distinct=self._hits.total() + self._missing + self._invalid,
            invalid=self._invalid,
            hits={tier.name: self._hits[tier.name] for tier in self._tiers},
            missing=self._missing,
            bytes=self._bytes,
            tokens=bound.tokens if counted is None else counted,
            min_tokens=bound.least if counted is None else counted,
            max_tokens=bound.most if counted is None else counted,
            method="counted" if counted is not None else "measured" if bound.is_measured else "guessed",
            sample=self._sample.texts,
            seconds=self._estimate_seconds(),
            price=self._route.source.price,
            errors=dict(self._errors),
        )

    def _estimate_seconds(self) -> float | None:
        if not self._missing:
            return 0.0
        limits = self._route.source.provider.limits
        chunks = self._count_chunks(limits)
        least = _compute_least_seconds(limits, chunks, self._sent_tokens)
        if not self._timed_bytes:
            return least or None
        pace = self._timed_seconds / self._timed_bytes
        return max(least, pace * self._bytes / min(limits.concurrency, chunks))

    def _count_chunks(self, limits: Limits) -> int:
        sizes = [size for size in (limits.max_tokens, limits.tokens_per_minute) if size is not None]
        by_tokens = self._sent_tokens / min(sizes) if sizes else 0.0
        return max(1, -(-self._missing // limits.max_batch), int(-(-by_tokens // 1)))


def _compute_least_seconds(limits: Limits, chunks: int, tokens: float) -> float:
    """Return the seconds that must pass before the last call may begin, according to the limits per minute."""
    seconds = 0.0
    if limits.requests_per_minute is not None:
        per_window = max(1, int(limits.requests_per_minute))
        seconds = (chunks - 1) // per_window * MINUTE / min(1.0, limits.requests_per_minute)
    if limits.tokens_per_minute is not None:
        seconds = max(seconds, (-(-tokens // limits.tokens_per_minute) - 1) * MINUTE)
    return seconds


def _find_usual_dimensions(entries: Entries) -> int | None:
    """Return the most common number of dimensions. A vector of a text is never empty."""
    sizes = entries.sizes()
    del sizes[0]
    return sizes.most_common(1)[0][0] if sizes else None


def _name_cause(error: Exception) -> str:
    if isinstance(error, LoopBusy):
        return "busy_loop"
    return "timeout" if isinstance(error, TimeoutError) else type(error).__name__
