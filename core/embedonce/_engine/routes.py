"""A route is one provider and one task, with their vector space. A route turns texts into keys."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from embedonce.contracts import AnyProvider, Limits
from embedonce.errors import ConfigError, ReplayMiss, SpaceError, TextError, TextRefused
from embedonce.events import ProviderStats
from embedonce.keys import Keyer, KeyPolicy, VectorSpace
from embedonce.prices import Price

from .batch_sizes import BatchSizes
from .rate import CallRate
from .repeated_warnings import RepeatedWarnings
from .workers import Workers

MAX_CALLS = 32
"""Maximum number of calls to one blocking provider that run in threads at the same time."""

MEMO_TEXTS = 4096
MEMO_CHARACTERS = 10_000_000
"""Maximum total number of characters in each of the memo's two generations.

The memo maps recent texts to their keys. A generation contains at most ``MEMO_TEXTS`` texts.
"""

NO_KEY = "none."
"""First characters of the placeholder that stands for the key of a text without a key. No tier sees a placeholder."""

KEYS_AT_ONCE = 256
"""Maximum number of texts that are hashed, and added to the memo, in one step."""

MEMO_MAX_TEXT = 16_000
"""Maximum number of characters of a text in the memo. A longer text is hashed again in each call."""


class LiveProvider:
    """A provider of a running cache, with its name, its threads, its counters, and the rate and size of its calls."""

    def __init__(
        self, provider: AnyProvider, *, fallback: bool, price: Price | None = None, coalesce: float | None = None
    ) -> None:
        self.provider = provider
        self.fallback = fallback
        self.price = price
        self.coalesce = coalesce
        """Seconds for which a chunk of misses waits for chunks of other calls; None if it does not wait."""
        space = describe_space(provider, "document")
        self.name = f"fallback:{space.provider}" if fallback else space.provider
        _check_limits(provider.limits, self.name)
        self.warnings = RepeatedWarnings()
        self.reset()
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0
        self._last_error: str | None = None

    def reset(self) -> None:
        """Create the locks and the threads. A forked child calls this too.

        The locks are re-entrant, because a signal handler may use the cache.
        """
        self.lock = threading.RLock()
        self.warnings.renew_lock()
        self.workers = Workers(MAX_CALLS)
        self.rate = CallRate(self.provider.limits)
        self.batches = BatchSizes()

    def count(self, *, texts: int, failed: int, tokens: int, seconds: float) -> None:
        with self.lock:
            self._counts.update(texts=texts, failed=failed, tokens=tokens)
            self._seconds += seconds
            if texts:
                self._last_error = None

    def count_failed(self, texts: int, error: Exception) -> None:
        """Count texts that failed in the end, all with the same error."""
        with self.lock:
            self._counts["failed"] += texts
            if not isinstance(error, TextRefused | ReplayMiss):  # these errors do not show that the provider fails
                self._last_error = type(error).__name__

    def stats(self) -> ProviderStats:
        with self.lock:
            counts = self._counts
            return ProviderStats(
                texts=counts["texts"],
                failed=counts["failed"],
                tokens=counts["tokens"],
                seconds=self._seconds,
                last_error=self._last_error,
            )


def _check_limits(limits: Limits, name: str) -> None:
    for what, number in (("max_batch", limits.max_batch), ("concurrency", limits.concurrency)):
        if not isinstance(number, int) or number < 1:
            raise ConfigError(f"provider {name!r}: limits.{what} must be an int of at least 1, got {number!r}")
    if limits.timeout is not None and not 0 < limits.timeout < float("inf"):
        raise ConfigError(
            f"provider {name!r}: limits.timeout must be None or a number of seconds above 0, got {limits.timeout!r}"
        )
    for what in ("requests_per_minute", "tokens_per_minute"):
        number = getattr(limits, what)
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if number is not None and not (is_number and 0 < number < float("inf")):
            raise ConfigError(f"provider {name!r}: limits.{what} must be None or a number above 0, got {number!r}")
    retries = limits.max_retries
    if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
        raise ConfigError(f"provider {name!r}: limits.max_retries must be an int of at least 0, got {retries!r}")
    if not isinstance(limits.lease, bool):
        raise ConfigError(f"provider {name!r}: limits.lease must be True or False, got {limits.lease!r}")


def describe_space(provider: AnyProvider, task: str) -> VectorSpace:
    """Return the provider's vector space for a task.

    Raises:
        SpaceError: the provider does not return a ``VectorSpace``.
    """
    space = provider.space(task)
    if not isinstance(space, VectorSpace):
        raise SpaceError(
            f"{type(provider).__name__}.space({task!r}) must return a VectorSpace, got {type(space).__name__}"
        )
    return space


class Route:
    """One provider and one task, with their vector space and the keys of recent texts."""

    def __init__(
        self,
        source: LiveProvider,
        task: str,
        policy: KeyPolicy,
        steps: Sequence[Callable[[str], str]],
        *,
        generation: int = 0,
    ) -> None:
        self.source = source
        self.task = task
        described = describe_space(source.provider, task)
        self.origin = described.fingerprint()
        """The fingerprint of the space as the provider describes it."""
        self.generation = generation
        """How many times a new space was opened because the provider had drifted."""
        if generation:
            described = replace(described, extra={**(described.extra or {}), "drift": generation})
        self.space = described
        self.keyer = Keyer(policy, self.space, steps)
        self.policy = policy
        self._steps = steps
        self.dimensions = self.space.dimensions
        """Number of dimensions. None until the first vector arrives, if the provider does not state the number."""
        self.recent_keys: dict[str, str] = {}
        """Keys by text: the newer generation of the memo. A text in the memo is not hashed again."""
        self._older_keys: dict[str, str] = {}
        self._characters = 0

    def with_generation(self, generation: int) -> Route:
        """Return a route for the same provider and task, after the provider has drifted ``generation`` times."""
        return Route(self.source, self.task, self.policy, self._steps, generation=generation)

    def settle_dimensions(self, dimensions: int) -> int:
        """Set the dimensions of this space if they are not known yet, and return the space's dimensions."""
        with self.source.lock:
            if self.dimensions is None:
                self.dimensions = dimensions
            return self.dimensions

    def keys(self, texts: Sequence[str]) -> list[str]:
        """Return the key of each text. The texts must be plain ``str``.

        Raises:
            TextError: a text has a lone surrogate; the message names the text's position.
            Exception: a normalisation step failed for a text.
        """
        keys, errors = self.find_keys(texts)
        for error in errors.values():
            raise error
        return keys

    def find_keys(self, texts: Sequence[str], first: int = 0) -> tuple[list[str], dict[str, Exception]]:
        """Return the key of each text, and the errors of the texts that have none. ``first`` is the first position.

        A text without a key gets a placeholder, which no other text has. The errors are those of :meth:`keys`, by
        placeholder.
        """
        keys = list(map(self.recent_keys.get, texts))
        errors: dict[str, Exception] = {}
        if not all(keys):  # faster than `None in keys`, which compares each key with None
            places = [i for i, key in enumerate(keys) if key is None] if any(keys) else range(len(keys))
            for start in range(0, len(places), KEYS_AT_ONCE):
                some = places[start : start + KEYS_AT_ONCE]
                for i, key in zip(
                    some, self._make_missing_keys([texts[i] for i in some], some, first, errors), strict=True
                ):
                    keys[i] = key
        return keys, errors  # type: ignore[return-value]

    def _make_missing_keys(
        self, texts: Sequence[str], places: Sequence[int], first: int, errors: dict[str, Exception]
    ) -> list[str]:
        """Return the keys of texts that are not in ``recent_keys``. The other arguments are as in :meth:`find_keys`."""
        is_plain = not self.keyer.changes_texts and max(map(len, texts)) <= MEMO_MAX_TEXT
        if is_plain and self._older_keys.keys().isdisjoint(texts):
            with suppress(UnicodeEncodeError):
                keys = self.keyer.keys(texts)
                self._remember(texts, keys)
                return keys
        keys = []
        for i, text in zip(places, texts, strict=True):
            try:
                keys.append(self.key(text, first + i))
            except Exception as error:  # noqa: BLE001  (a plugin's normalisation step may raise anything)
                keys.append(f"{NO_KEY}{i}")
                errors[keys[-1]] = error
        return keys

    def _remember(self, texts: Sequence[str], keys: Sequence[str]) -> None:
        """Add at most :data:`KEYS_AT_ONCE` texts to the memo."""
        size = sum(map(len, texts))
        if len(self.recent_keys) + len(texts) > MEMO_TEXTS or self._characters + size > MEMO_CHARACTERS:
            self._begin_generation()
        self.recent_keys.update(zip(texts, keys, strict=True))
        self._characters += size
        if len(self.recent_keys) >= MEMO_TEXTS or self._characters >= MEMO_CHARACTERS:
            self._begin_generation()

    def _begin_generation(self) -> None:
        self._older_keys, self.recent_keys, self._characters = self.recent_keys, {}, 0

    def make_keys(self, texts: Sequence[str]) -> list[str]:
        """Return the key of each text without the memo. The errors are those of :meth:`keys`.

        For very many texts, each of them once, this takes less time, and leaves the memo to the texts in use.
        """
        keyer = self.keyer
        try:
            return keyer.keys(map(keyer.normalize, texts) if keyer.changes_texts else texts)
        except UnicodeEncodeError:  # it has no position
            return [self._make_key(text, position) for position, text in enumerate(texts)]

    def _make_key(self, text: str, position: int) -> str:
        try:
            return self.keyer.key(self.keyer.normalize(text))
        except TextError as error:
            raise TextError(f"item {position}: {error}", position) from None

    def key(self, text: str, position: int = 0) -> str:
        """Return the key of one text that is not in ``recent_keys``. The errors are those of :meth:`keys`."""
        key = self._older_keys.get(text)
        if key is None:
            key = self._make_key(text, position)
        size = len(text)
        if size <= MEMO_MAX_TEXT:
            self.recent_keys[text] = key
            self._characters += size
            if len(self.recent_keys) >= MEMO_TEXTS or self._characters >= MEMO_CHARACTERS:
                self._begin_generation()
        return key

    def discard_texts(self, keys: Collection[str]) -> None:
        """Remove from the memo every text that has one of the keys."""
        for memo in (self.recent_keys, self._older_keys):
            # Other threads add texts meanwhile. Making a list of a dict's keys is one step for them. A list of its
            # items is not, because Python 3.11 may collect garbage, and so change threads, at each new tuple.
            for text in list(memo):
                if memo.get(text) in keys:
                    memo.pop(text, None)


def copy_texts(texts: Iterable[Any], first: int = 0) -> list[str]:
    """Return the texts as a new list of plain ``str``.

    The list is copied, because the caller may change it during the call. Instances of subclasses of ``str`` are
    converted, because they may compare equal to different texts, or look different when a provider formats them.
    ``first`` is the position of the first item.

    Raises:
        TypeError: an item is not a str; the message names the item's position.
    """
    plain = list(texts)
    if set(map(type, plain)) <= {str}:
        return plain
    for i, text in enumerate(plain):
        if not isinstance(text, str):
            raise TypeError(f"item {first + i} must be a str, got {type(text).__name__}")
        plain[i] = str.__str__(text)
    return plain


def require_texts(texts: object, for_one: str = "use embed() for one text") -> None:
    """Raise TypeError unless ``texts`` is a collection of texts. A single str is refused, although it is iterable.

    ``for_one`` says in the message what to do with a single text.
    """
    if not hasattr(texts, "__iter__") and not hasattr(texts, "__aiter__"):
        raise TypeError(f"expected a list of texts, got {type(texts).__name__}")
    if isinstance(texts, str | bytes):
        raise TypeError(f"expected a list of texts, got one {type(texts).__name__}; {for_one}")
