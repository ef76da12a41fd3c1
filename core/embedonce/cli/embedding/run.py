"""One run of ``embedonce embed``: read windows of passages, embed them with the cache, and write them to the sink."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embedonce.errors import ReplayMiss, TextError, TextRefused
from embedonce.keys import NORMALIZERS

from .passages import Passage, ReadItem, format_place

if TYPE_CHECKING:
    from embedonce.answers import Fetched
    from embedonce.cache import Cache
    from embedonce.events import Stats, TierStats
    from embedonce.keys import VectorSpace

    from .progress import Bar, NoBar
    from .sinks import Sink
    from .sources import Reader

WINDOW = 2048
"""Maximum number of passages in a window. The passages of a window are looked up and embedded together."""
WINDOW_CHARACTERS = 8 * 2**20
"""A window also ends at this many characters, so that long passages do not fill the memory."""
FLUSH = 60.0
"""Seconds to wait for the background writes of one window."""
OUTAGE = 2
"""The run stops after this many windows in a row for which the provider returned no vector. The provider is then
probably down, and calling it for the rest of a large corpus would waste time."""
MERGE_HASHES = 2**20
"""Minimum number of new hashes that :class:`DistinctTexts` merges at a time."""


@dataclass(slots=True)
class Summary:
    """Result of a run, counted in passages.

    ``texts`` is ``computed`` + the sum of ``hits`` + ``repeated`` + the passages that could not be embedded.
    """

    texts: int = 0
    """Passages that were read."""
    unique: int = 0
    """Distinct passages, compared as they were read, before the key policy normalises them."""
    computed: int = 0
    """Passages that the provider embedded."""
    hits: dict[str, int] = field(default_factory=dict)
    """Passages whose vector a tier had, by tier name."""
    repeated: int = 0
    """Passages that got the vector of an equal passage in the same window; that vector was computed only once."""
    failed: int = 0
    """Broken lines, unreadable files, and passages that could not be embedded."""
    rows: int = 0
    """Rows of the output."""
    dimensions: int | None = None
    files: int = 0
    binary: int = 0
    """Number of binary files that were found in folders and skipped."""
    trouble: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of failures by tier and kind.

    The kinds are errors, corrupt entries, dropped writes, and texts for which the tier was skipped.

    Tiers without failures are left out.
    """
    causes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of errors and dropped writes by tier and cause. Tiers that have none are left out."""
    unstored: list[str] = field(default_factory=list)
    """Tiers that outlive the process, had errors or dropped writes, and stored no vector at all."""
    bytes: int = 0
    seconds: float = 0.0
    out: str | None = None
    """Path of the output. None means that no output was written and that an earlier output is unchanged."""
    index: str | None = None
    """Path of the file with the source of each row of a .npy output."""
    stopped: str | None = None
    """Reason why the run ended early, or None."""


class Stopped(Exception):
    """Raised to end the run early, for example because of ``--strict`` or because the provider is down.

    ``is_temporary`` means that the same command may succeed later without a change.
    """

    def __init__(self, message: str, *, is_temporary: bool = False) -> None:
        super().__init__(message)
        self.is_temporary = is_temporary


class DistinctTexts:
    """Counts distinct texts by their hashes: 8 bytes of BLAKE2b per text.

    The counter keeps the hash of every distinct text. New hashes are first collected in a list. The list is merged
    into the known hashes when it takes more than 8 MiB and more memory than the known hashes. Two texts with the same
    hash count as one text. Among ten million texts, the probability that any two have the same hash is 3 in a million.
    """

    def __init__(self) -> None:
        self._known = np.empty(0, np.uint64)
        """Sorted hashes without duplicates."""
        self._new: list[NDArray[np.uint64]] = []
        self._new_count = 0

    def add(self, texts: Sequence[str]) -> None:
        hashes = b"".join([blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest() for text in texts])
        self._new.append(np.frombuffer(hashes, np.uint64))
        self._new_count += len(texts)
        # Every merge processes all hashes, which is slow. Therefore merge only when the number of hashes has doubled.
        if self._new_count > max(MERGE_HASHES, len(self._known)):
            self._merge()

    def count(self) -> int:
        """Return the number of distinct texts so far."""
        self._merge()
        return len(self._known)

    def _merge(self) -> None:
        new = np.concatenate([*self._new, np.empty(0, np.uint64)])
        self._new, self._new_count = [], 0
        new.sort()
        merged = np.concatenate([self._known, new])
        merged.sort(kind="stable")  # timsort: it merges two sorted halves in linear time
        self._known = merged[np.append(True, merged[1:] != merged[:-1])] if len(merged) else merged


class Run:
    """Embeds every passage of a reader and keeps the counts in ``summary``."""

    def __init__(
        self,
        cache: Cache,
        reader: Reader,
        sink: Sink,
        *,
        task: str,
        strict: bool,
        report: Callable[[str], None],
        persistent_tiers: Sequence[str] = (),
    ) -> None:
        self._cache = cache
        self._reader = reader
        self._sink = sink
        self._task = task
        self._strict = strict
        self._report = report
        self._persistent_tiers = persistent_tiers
        self._computed_before = self._count_computed_texts()
        self._space = cache.lookup([], task=task).space
        self._distinct = DistinctTexts()
        self._outage = 0
        """Number of windows in a row for which the provider returned no vector."""
        self.summary = Summary(hits=dict.fromkeys(cache.tiers, 0))

    def embed(self, bar: Bar | NoBar) -> None:
        """Read, embed and write all passages, and move the output into place.

        Raises:
            Stopped: the run ended early. No output was written, but the tiers have the vectors computed so far.
        """
        started = time.monotonic()
        try:
            for window in split_windows(self._read_passages(self._reader)):
                bar.start_window(len(window), self._reader.bytes_read)
                self._distinct.add([passage.text for passage in window])
                self._embed_window(window)
                bar.finish_window(sum(self.summary.hits.values()))
            if self.summary.failed and not self.summary.rows:
                raise Stopped("no passage could be embedded", is_temporary=self._outage > 0)
            self._finish_output()
        finally:
            self._complete_summary(time.monotonic() - started)

    def _embed_window(self, window: Sequence[Passage]) -> None:
        texts = [passage.text for passage in window]
        self.summary.texts += len(texts)
        fetched = self._cache.fetch(texts, task=self._task)
        self._check_space(fetched.space)
        # Wait for the queued writes, so that no write is dropped and a killed run loses at most this window. Each write
        # has its tier's timeout, so only a very slow store can exceed FLUSH.
        self._cache.flush(timeout=FLUSH)
        good = [position for position, row in enumerate(fetched.rows) if row is not None]
        self._count_hits(fetched, good)
        if len(good) < len(window):
            self._report_failures(window, fetched)
        if good:
            rows: list[Any] = [fetched.rows[position] for position in good]
            self._sink.write([_replace_surrogates(window[position]) for position in good], np.stack(rows))
            self.summary.rows += len(good)
            self.summary.dimensions = len(rows[0])

    def _check_space(self, space: VectorSpace) -> None:
        if space != self._space:
            raise Stopped(
                f"the provider failed, and the fallback ({space.provider} {space.model}) has a different vector space; "
                "one output cannot mix two vector spaces",
                is_temporary=True,
            )

    # --- counting -----------------------------------------------------------------------------

    def _count_computed_texts(self) -> int:
        return sum(provider.texts for provider in self._cache.stats().providers.values())

    def _count_hits(self, fetched: Fetched, good: Sequence[int]) -> None:
        hits = self.summary.hits
        for position in good:
            source = fetched.sources[position]
            if source is not None and source != "provider":
                hits[source] += 1
        self._outage = self._outage + 1 if _is_outage(fetched) else 0

    def _complete_summary(self, seconds: float) -> None:
        summary, reader = self.summary, self._reader
        summary.files, summary.binary, summary.bytes = reader.files, reader.binary, reader.bytes_read
        summary.unique = self._distinct.count()
        summary.computed = self._count_computed_texts() - self._computed_before
        answered = summary.rows - sum(summary.hits.values())
        summary.repeated = max(answered - summary.computed, 0)
        stats = self._cache.stats()
        summary.trouble = collect_tier_failures(stats)
        summary.causes = collect_causes(stats)
        if summary.computed:
            summary.unstored = [name for name in self._persistent_tiers if _failed_to_store(stats.tiers[name])]
        summary.seconds = round(seconds, 3)

    def _finish_output(self) -> None:
        if self.summary.dimensions is None:
            self.summary.dimensions = int(self._cache.embed_batch([], task=self._task).shape[1])
        self._sink.finish(self.summary.dimensions)

    # --- failures -----------------------------------------------------------------------------

    def _read_passages(self, items: Iterable[ReadItem]) -> Iterator[Passage]:
        """Yield the passages; report and count the broken items."""
        for item in items:
            if isinstance(item, Passage):
                yield item
                continue
            self._report(str(item))
            self.summary.failed += 1
            if self._strict:
                raise Stopped("an input could not be read, and --strict is set")

    def _report_failures(self, window: Sequence[Passage], fetched: Fetched) -> None:
        failed = sorted(position for position, row in enumerate(fetched.rows) if row is None)
        self.summary.failed += len(failed)
        for message in describe_failures([(window[position], fetched.failed.get(position)) for position in failed]):
            self._report(message)
        if self._strict:
            raise Stopped("a passage failed, and --strict is set")
        if self._outage >= OUTAGE:
            raise Stopped("every call to the provider fails", is_temporary=True)


def collect_tier_failures(stats: Stats) -> dict[str, dict[str, int]]:
    """Return the number of failures per tier and kind. Tiers and kinds without failures are left out."""
    kinds = ("errors", "corrupt", "skipped", "dropped")
    by_tier = {name: {kind: getattr(tier, kind) for kind in kinds} for name, tier in stats.tiers.items()}
    found = {name: {kind: number for kind, number in counted.items() if number} for name, counted in by_tier.items()}
    return {name: counted for name, counted in found.items() if counted}


def collect_causes(stats: Stats) -> dict[str, dict[str, int]]:
    """Return the number of errors and dropped writes per tier and cause. Leave out tiers that have none."""
    found = {name: {**tier.causes, **tier.drops} for name, tier in stats.tiers.items()}
    return {name: by_cause for name, by_cause in found.items() if by_cause}


def _failed_to_store(tier: TierStats) -> bool:
    return not tier.stored and bool(tier.errors or tier.dropped)


def split_windows(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    """Yield the passages in lists of at most WINDOW passages and about WINDOW_CHARACTERS characters."""
    window: list[Passage] = []
    size = 0
    for passage in passages:
        window.append(passage)
        size += len(passage.text)
        if len(window) == WINDOW or size >= WINDOW_CHARACTERS:
            yield window
            window, size = [], 0
    if window:
        yield window


TEXT_ERRORS = (TextRefused, TextError, ReplayMiss)
"""Errors about a single text. Any other error concerns all texts that were sent to the provider together."""


def _is_outage(fetched: Fetched) -> bool:
    """Return whether the provider was called and returned no vector at all."""
    # An invalid text is found before the provider is called.
    errors = [error for error in fetched.failed.values() if not isinstance(error, TextError)]
    has_text_errors = any(isinstance(error, TEXT_ERRORS) for error in errors)
    return bool(errors) and not has_text_errors and "provider" not in fetched.sources


def _replace_surrogates(passage: Passage) -> Passage:
    """Return a passage whose text can be written, as the normalisation step ``surrogates`` changes it."""
    return passage._replace(text=NORMALIZERS["surrogates"](passage.text))


def describe_failures(failed: Sequence[tuple[Passage, Exception | None]]) -> Iterator[str]:
    """Yield one message per failure; adjacent passages that failed with the same error share a message."""
    start = 0
    while start < len(failed):
        passage, error = failed[start]
        reason = describe_error(error, passage.text)
        end = start + 1
        if not isinstance(error, TEXT_ERRORS):
            while end < len(failed) and _are_alike(failed[end][1], error):
                end += 1
        span = f" (and {end - start - 1:,} more, to {_format_place(failed[end - 1][0])})" if end - start > 1 else ""
        yield f"{_format_place(passage)}{span}: {reason}"
        start = end


def _format_place(passage: Passage) -> str:
    return format_place(passage.source, passage.line)


def _are_alike(one: Exception | None, other: Exception | None) -> bool:
    return type(one) is type(other) and str(one) == str(other)


def describe_error(error: Exception | None, text: str) -> str:
    """Return a description of an error, in one line and without the text.

    A vendor's message may quote the text. A message that contains the beginning of the text is left out.
    """
    if error is None:
        return "the provider returned no vector"
    name, message = type(error).__name__, " ".join(str(error).split())[:300]
    if isinstance(error, TextError):  # the position counts within a window; the reader of the message sees the line
        message = message.removeprefix(f"item {error.position}: ")
    beginning = " ".join(text.split())[:20]
    is_quoted = beginning and (beginning in message or ascii(beginning)[1:-1] in message)
    return name if is_quoted or not message else f"{name}: {message}"
