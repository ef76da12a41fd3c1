"""One run of ``embedonce embed``: window by window from the reader through the cache into the sink."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from embedonce.errors import ReplayMiss, TextError, TextRefused

from .distinct import Distinct
from .passages import Found, Passage, place

if TYPE_CHECKING:
    from embedonce.answers import Fetched
    from embedonce.cache import Cache
    from embedonce.events import Stats, TierStats
    from embedonce.keys import VectorSpace

    from .progress import Bar, NoBar
    from .sinks import Sink
    from .sources import Reader

WINDOW = 2048
"""Most passages that are held, looked up and embedded at once."""
WINDOW_CHARACTERS = 8 * 2**20
"""A window also ends here, so that long passages do not add up."""
FLUSH = 60.0
"""Seconds to wait for the background writes of one window."""
OUTAGE = 2
"""Windows in a row of which the provider could compute nothing; then it is down, and asking it for the rest
of a large corpus would only cost time."""


@dataclass(slots=True)
class Summary:
    """What a run did, counted in passages.

    ``texts`` is ``computed`` + the sum of ``hits`` + ``repeated`` + those that the provider refused.
    """

    texts: int = 0
    """Passages that were read."""
    unique: int = 0
    """Distinct ones among them, as read (before the key policy's normalisation)."""
    computed: int = 0
    """Embedded by the provider."""
    hits: dict[str, int] = field(default_factory=dict)
    """Answered by each tier, by its name."""
    repeated: int = 0
    """Answered by the computation of the same text in the same window."""
    failed: int = 0
    """Broken lines, unreadable files, and passages that the provider refused."""
    rows: int = 0
    """In the output."""
    dimensions: int | None = None
    files: int = 0
    binary: int = 0
    """Binary files that were passed over in folders."""
    trouble: dict[str, dict[str, int]] = field(default_factory=dict)
    """By tier, where there was any: errors, corrupt entries, texts that it was skipped for, dropped writes."""
    causes: dict[str, dict[str, int]] = field(default_factory=dict)
    """By tier, where there was any: errors and dropped writes by what caused them."""
    unstored: list[str] = field(default_factory=list)
    """Tiers that outlive the process and failed to store anything of what was computed."""
    bytes: int = 0
    seconds: float = 0.0
    out: str | None = None
    """None: no output was written, and an earlier one is still there."""
    index: str | None = None
    """Where the source of each row of a .npy output is."""
    stopped: str | None = None
    """Why the run ended early."""


class Stopped(Exception):
    """The run ends before the passages do: ``--strict``, or a provider that is down.

    ``passes``: it may be over by itself, so that the same command succeeds later.
    """

    def __init__(self, message: str, *, passes: bool = False) -> None:
        super().__init__(message)
        self.passes = passes


class Run:
    """Embeds everything that a reader finds. ``summary`` is true at every moment."""

    def __init__(
        self,
        cache: Cache,
        reader: Reader,
        sink: Sink,
        *,
        task: str,
        strict: bool,
        tell: Callable[[str], None],
        lasting: Sequence[str] = (),
    ) -> None:
        self._cache = cache
        self._reader = reader
        self._sink = sink
        self._task = task
        self._strict = strict
        self._tell = tell
        self._lasting = lasting
        self._distinct = Distinct()
        self._computed_before = self._computed()
        self._space = cache.lookup([], task=task).space
        self._refused = self._outage = 0
        self.summary = Summary(hits=dict.fromkeys(cache.tiers, 0))

    def embed(self, bar: Bar | NoBar) -> None:
        """Read, embed and write everything, and give the output its name.

        Raises:
            Stopped: nothing was written; everything that was computed is stored.
        """
        started = time.monotonic()
        try:
            for window in windows(self._named(self._reader)):
                bar.window(len(window), self._reader.bytes_read)
                self._window(window)
                bar.done(sum(self.summary.hits.values()))
            if self.summary.failed and not self.summary.rows:
                raise Stopped("nothing could be embedded", passes=self._outage > 0)
            self._finish()
        finally:
            self._close(time.monotonic() - started)

    def _window(self, window: Sequence[Passage]) -> None:
        texts = [passage.text for passage in window]
        self._distinct.add(texts)
        self.summary.texts += len(texts)
        fetched = self._cache.fetch(texts, task=self._task)
        self._check_space(fetched.space)
        # Nothing queued is dropped, and a run that is killed loses this window at most. Each write has its
        # tier's timeout, so that the end of the wait is only reached where a store accepts very slowly.
        self._cache.flush(timeout=FLUSH)
        good = [position for position, row in enumerate(fetched.rows) if row is not None]
        self._count(fetched, good)
        if len(good) < len(window):
            self._failures(window, fetched)
        if good:
            rows: list[Any] = [fetched.rows[position] for position in good]
            self._sink.write([window[position] for position in good], np.stack(rows))
            self.summary.rows += len(good)
            self.summary.dimensions = len(rows[0])

    def _check_space(self, space: VectorSpace) -> None:
        if space != self._space:
            raise Stopped(
                f"the provider fails, and the fallback ({space.provider} {space.model}) answers in its own vector "
                "space; one output never mixes two",
                passes=True,
            )

    # --- counting -----------------------------------------------------------------------------

    def _computed(self) -> int:
        return sum(provider.texts for provider in self._cache.stats().providers.values())

    def _count(self, fetched: Fetched, good: Sequence[int]) -> None:
        hits = self.summary.hits
        for position in good:
            source = fetched.sources[position]
            if source is not None and source != "provider":
                hits[source] += 1
        self._outage = self._outage + 1 if _is_outage(fetched) else 0

    def _close(self, seconds: float) -> None:
        summary, reader = self.summary, self._reader
        summary.files, summary.binary, summary.bytes = reader.files, reader.binary, reader.bytes_read
        summary.computed = self._computed() - self._computed_before
        answered = summary.rows - sum(summary.hits.values())
        summary.repeated = max(answered - summary.computed, 0)
        summary.unique = self._distinct.count()
        stats = self._cache.stats()
        summary.trouble = trouble(stats)
        summary.causes = causes(stats)
        if summary.computed:
            summary.unstored = [name for name in self._lasting if _stored_nothing(stats.tiers[name])]
        summary.seconds = round(seconds, 3)
        self._distinct.close()

    def _finish(self) -> None:
        if self.summary.dimensions is None:
            self.summary.dimensions = int(self._cache.embed_batch([], task=self._task).shape[1])
        self._sink.finish(self.summary.dimensions)

    # --- what failed --------------------------------------------------------------------------

    def _named(self, found: Iterable[Found]) -> Iterator[Passage]:
        """Yield the passages; name and count what is broken."""
        for one in found:
            if isinstance(one, Passage):
                yield one
                continue
            self._tell(str(one))
            self.summary.failed += 1
            if self._strict:
                raise Stopped("--strict, and something is broken")

    def _failures(self, window: Sequence[Passage], fetched: Fetched) -> None:
        failed = sorted(position for position, row in enumerate(fetched.rows) if row is None)
        self.summary.failed += len(failed)
        for message in failures([(window[position], fetched.failed.get(position)) for position in failed]):
            self._tell(message)
        if self._strict:
            raise Stopped("--strict, and a passage failed")
        if self._outage >= OUTAGE:
            raise Stopped("the provider fails for everything that it is asked", passes=True)


def trouble(stats: Stats) -> dict[str, dict[str, int]]:
    """Return what went wrong in the tiers, by tier; one without trouble is left out."""
    kinds = ("errors", "corrupt", "skipped", "dropped")
    by_tier = {name: {kind: getattr(tier, kind) for kind in kinds} for name, tier in stats.tiers.items()}
    found = {name: {kind: number for kind, number in counted.items() if number} for name, counted in by_tier.items()}
    return {name: counted for name, counted in found.items() if counted}


def causes(stats: Stats) -> dict[str, dict[str, int]]:
    """Return what caused errors and dropped writes, by tier; one without any is left out."""
    found = {name: {**tier.causes, **tier.drops} for name, tier in stats.tiers.items()}
    return {name: by_cause for name, by_cause in found.items() if by_cause}


def _stored_nothing(tier: TierStats) -> bool:
    return not tier.stored and bool(tier.errors or tier.dropped)


def windows(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    """Yield the passages in lists that are bounded in number and in characters."""
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


OWN_FAULT = (TextRefused, TextError, ReplayMiss)
"""Failures of one text. Every other failure is the provider's, and takes a whole chunk of texts with it."""


def _is_outage(fetched: Fetched) -> bool:
    """Say whether the provider was asked and gave nothing at all."""
    others = any(isinstance(error, OWN_FAULT) for error in fetched.failed.values())
    return bool(fetched.failed) and not others and "provider" not in fetched.sources


def failures(failed: Sequence[tuple[Passage, Exception | None]]) -> Iterator[str]:
    """Yield a message per failure; neighbours that failed as one chunk of the provider share one."""
    start = 0
    while start < len(failed):
        passage, error = failed[start]
        why = reason(error, passage.text)
        end = start + 1
        if not isinstance(error, OWN_FAULT):
            while end < len(failed) and _alike(failed[end][1], error):
                end += 1
        span = f" (and {end - start - 1:,} more, to {_place(failed[end - 1][0])})" if end - start > 1 else ""
        yield f"{_place(passage)}{span}: {why}"
        start = end


def _place(passage: Passage) -> str:
    return place(passage.source, passage.line)


def _alike(one: Exception | None, other: Exception | None) -> bool:
    return type(one) is type(other) and str(one) == str(other)


def reason(error: Exception | None, text: str) -> str:
    """Return an error in one line, without the text.

    A vendor may quote what it was sent: a message with the beginning of the text in it is left out.
    """
    if error is None:
        return "no vector came back"
    name, message = type(error).__name__, " ".join(str(error).split())[:300]
    beginning = " ".join(text.split())[:20]
    quoted = beginning and (beginning in message or ascii(beginning)[1:-1] in message)
    return name if quoted or not message else f"{name}: {message}"
