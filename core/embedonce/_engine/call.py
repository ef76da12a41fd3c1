"""One call in flight: its port, its ticket, and the answer that it has collected so far."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from embedonce._messages import format_count
from embedonce.admission import Admit
from embedonce.answers import Fetched
from embedonce.errors import TextRefused, TierError
from embedonce.vectors import (
    NO_WORK,
    Columns,
    CostColumns,
    Entries,
    Entry,
    Matrix,
    Metadata,
    Work,
    plain_metadata,
    sum_costs,
)

from .ahead import Gathered
from .flights import Ticket
from .ports import Port
from .reading import ReadResult
from .routes import Route

PROVIDER = "provider"

PREVIEW = 200
"""Maximum number of characters of a text that a tier with ``text_preview`` stores."""


@dataclass(slots=True)
class Answer:
    """The results of a call so far, by key."""

    route: Route
    keys: list[str]
    texts: Sequence[str]
    store: bool
    """Whether to write computed entries and to promote entries that were found."""
    is_joinable: bool = field(default=True, kw_only=True)
    """Whether the provider may get the texts together with texts of other calls."""
    metadata: Mapping[str, Metadata] = field(default_factory=dict)
    invalid: Mapping[str, Exception] = field(default_factory=dict)
    """Errors of texts that have no key, by the placeholder that stands for the key."""
    first: int = 0
    """The position of the first text in the caller's stream of texts."""
    entries: Entries = field(default_factory=Entries)
    admit: Admit | None = None
    """The function that must accept texts before they are computed; None accepts all texts."""
    refusal: Exception | None = None
    """The error with which ``admit`` has refused texts. Then no further texts of the call are computed."""
    settle_error: Exception | None = None
    """An error of the function that takes what admitted texts have cost. The call raises it in the end."""
    is_fresh: bool = False
    """Whether the vectors are computed even if a tier has them."""
    shared: set[str] = field(default_factory=set)
    """Keys of entries that other calls have computed at the same time."""
    changed: set[str] = field(default_factory=set)
    """Keys whose stored vector is not the vector that this call has computed."""
    found: list[tuple[str, Collection[str]]] = field(default_factory=list)
    """One item per read of a tier: the tier's name, and the keys of the entries that the tier returned."""
    imported: list[tuple[str, Collection[str]]] = field(default_factory=list)
    """Names of importers, and the keys of the entries that came from them."""
    read_at: float = 0.0
    """Monotonic time at which the call began to read the tiers."""
    waited: float = 0.0
    """Seconds for which the call has waited for flights of other calls in its current try."""
    hits: int = 0
    """Number of texts that the tiers had."""
    failed: dict[str, Exception] = field(default_factory=dict)
    """Errors of texts, by key."""
    failed_alone: set[str] = field(default_factory=set)
    """Keys of texts that the provider did not embed although it was asked for each of them alone, and of invalid rows.
    """
    has_made_entries: bool = False
    """Whether the provider has embedded any text of this call."""
    waste: list[tuple[str, Work]] = field(default_factory=list)
    """The provider's work that gave no vectors, as in :attr:`Fetched.wasted`, with the key of the text; an empty key
    stands for several texts. It is a list, because threads that compute chunks of one call at the same time can add to
    a list without a lock, but not to a number."""
    spent: list[tuple[str, float]] = field(default_factory=list)
    """The seconds that each call took, with the name of the tier or ``"provider"``."""
    errors: dict[str, str] = field(default_factory=dict)
    """Causes of failed reads, by tier."""
    failed_tiers: set[str] = field(default_factory=set)
    """Names of tiers that failed or were skipped in this call. The call writes nothing to them."""
    failed_keys: dict[str, set[str]] = field(default_factory=dict)
    """Keys whose node or shard failed in this call, by tier. The call does not write these keys to that tier."""
    unstored: set[str] = field(default_factory=set)
    """Keys of computed entries that the tier with leases did not store."""
    gathered: Gathered | None = None
    """In a long run: the computed entries that are to be stored together with the next ones."""
    store_error: TierError | None = None
    """An error of a tier with ``on_error = "raise"``. The call raises this error after writing to the other tiers."""
    _texts_by_key: dict[str, str] | None = None

    def __post_init__(self) -> None:
        self.failed.update(self.invalid)

    @property
    def dimensions(self) -> int | None:
        if self.route.dimensions is None and self.entries:
            return next(iter(self.entries.sizes()))
        return self.route.dimensions

    def preview(self, key: str) -> str:
        """Return the beginning of the text of a key. This text is not normalized."""
        return self.texts_by_key()[key][:PREVIEW]

    def texts_by_key(self) -> dict[str, str]:
        """Return the text of each key. If several texts have the same key, return the first of them."""
        if self._texts_by_key is None:
            self._texts_by_key = dict(zip(reversed(self.keys), reversed(self.texts), strict=True))
        return self._texts_by_key

    def normalize_texts(self, keys: Iterable[str]) -> Mapping[str, str]:
        """Return the texts that are embedded in place of the texts of some keys, perhaps with those of other keys."""
        keyer = self.route.keyer
        texts = self.texts_by_key()
        return {key: keyer.normalize(texts[key]) for key in keys} if keyer.changes_texts else texts

    def find_missing(self) -> list[str]:
        """Return the keys that have neither an entry nor an error yet, without duplicates."""
        failed = self.failed
        missing = self.entries.lacking(dict.fromkeys(self.keys))
        return [key for key in missing if key not in failed] if failed else missing

    def rows(self) -> list[Any]:
        """Return every row in order.

        Raises:
            Exception: the error of the first text that failed.
        """
        self._raise_first_error()
        entries = self.entries.as_dict()
        return [entries[key].vector for key in self.keys]

    def matrix(self) -> Matrix:
        """Return every row in order, as a matrix (n, d). The errors are those of :meth:`rows`."""
        self._raise_first_error()
        return self.entries.matrix(self.keys, self.route.dimensions)

    def _raise_first_error(self) -> None:
        if self.failed:
            for key in self.entries.lacking(self.keys):
                error = self.failed[key]
                if isinstance(error, TextRefused):
                    refused = [i for i, other in self._list_failed() if isinstance(other, TextRefused)]
                    error = _set_positions(error, [self.first + i for i in refused])
                raise error

    def _list_failed(self) -> list[tuple[int, Exception]]:
        return [(i, self.failed[key]) for i, key in enumerate(self.keys) if key in self.failed]

    def has_failed_provider(self) -> bool:
        """Return whether a text failed for another reason than the text itself, so that a fallback may help.

        If the provider embeds other texts of the call, a text that fails alone is the reason itself.
        """
        texts_alone = {*self.invalid, *(self.failed_alone if self.has_made_entries else ())}
        return any(not isinstance(error, TextRefused) and key not in texts_alone for key, error in self.failed.items())

    def take_waste(self, other: Answer) -> None:
        """Count all work of another answer to the same texts, which is not used."""
        self.waste += [*other.waste, ("", other._sum_computed(other._find_sources()))]

    def sum_waste(self) -> Work:
        return sum((work for _, work in self.waste), NO_WORK)

    def sum_seconds(self) -> dict[str, float]:
        """Return the seconds spent in calls, by the name of the tier or ``"provider"``."""
        seconds: dict[str, float] = {}
        for name, spent in list(self.spent):
            seconds[name] = seconds.get(name, 0.0) + spent
        return seconds

    def _find_sources(self) -> dict[str, str]:
        """Return the name of the tier or the importer that had each entry, or ``"provider"``, by key."""
        sources = dict.fromkeys(self.entries, PROVIDER)
        for name, keys in (*self.imported, *self.found):
            sources.update(dict.fromkeys(keys, name))
        return sources

    def _sum_computed(self, sources: Mapping[str, str]) -> Work:
        held = self.entries.as_dict()
        return sum_work([held[key] for key, name in sources.items() if name is PROVIDER and key not in self.shared])

    def to_fetched(self) -> Fetched:
        sources = self._find_sources()
        held = self.entries.as_dict()
        entries = [held.get(key) for key in self.keys]
        imported = {key for _, keys in self.imported for key in keys}
        saved = [held[key] for key, name in sources.items() if name is not PROVIDER and key not in imported]
        return Fetched(
            rows=[None if entry is None else entry.vector for entry in entries],
            sources=[sources.get(key) for key in self.keys],
            failed={
                i: _set_positions(error, [i]) if isinstance(error, TextRefused) else error
                for i, error in self._list_failed()
            },
            metadata=copy_metadata([None if entry is None else entry.metadata for entry in entries]),
            space=self.route.space,
            seconds=self.sum_seconds(),
            errors=self.errors,
            dimensions=self.dimensions,
            computed=self._sum_computed(sources),
            saved=sum_work(saved),
            wasted=self.sum_waste(),
            imported=frozenset(i for i, key in enumerate(self.keys) if key in imported) if imported else frozenset(),
            changed=frozenset(i for i, key in enumerate(self.keys) if key in self.changed),
        )


class Call(NamedTuple):
    """The arguments that every step of :meth:`Engine.fetch` needs."""

    port: Port
    ticket: Ticket
    answer: Answer


def sum_work(entries: Collection[Entry]) -> Work:
    """Return the work that it took to compute the vectors of some entries."""
    columns = Columns.of(entries)
    return sum_costs([CostColumns(len(entries), columns.tokens, columns.seconds)]) if entries else NO_WORK


def copy_metadata(metadata: Sequence[Metadata | None]) -> list[Metadata | None]:
    """Return copies, so that a caller who changes the result does not change the cached entries."""
    return [None if item is None else deepcopy(item) for item in metadata]


def map_metadata(keys: Sequence[str], metadata: Sequence[Metadata | None] | None) -> dict[str, Metadata]:
    """Return the metadata of each key that has some. Of several texts with the same key, the first one counts.

    Raises:
        ValueError: the number of items is not that of the keys.
    """
    if metadata is None:
        return {}
    if len(metadata) != len(keys):
        raise ValueError(
            f"metadata must have one item per text: got {len(metadata)} for {format_count(len(keys), 'text')}"
        )
    by_key: dict[str, Metadata] = {}
    for key, item in zip(keys, metadata, strict=True):
        if item is not None and key not in by_key:
            by_key[key] = plain_metadata(item)
    return by_key


class BegunCall(NamedTuple):
    """A call for one text that has read some tiers already. The plan goes on with the next tier."""

    ticket: Ticket
    read_at: float
    """Monotonic time at which the call began to read the tiers."""
    reads: Sequence[ReadResult]
    """The results of the first tiers."""


def _set_positions(error: TextRefused, positions: Sequence[int]) -> Exception:
    """Return a copy of an error with the positions of its texts in the caller's batch.

    The provider's positions count within one chunk, which the caller does not know.
    """
    own = copy_error(error)
    if own is not error and isinstance(own, TextRefused):
        own.positions = tuple(positions)
        own.__cause__ = error.__cause__
        own.__traceback__ = error.__traceback__
    return own


def copy_error(error: Exception) -> Exception:
    """Return a copy of an error for one caller.

    Each caller needs its own copy. One exception object would collect the tracebacks of all callers that raise it.
    """
    try:
        own = copy(error)
    except Exception:  # noqa: BLE001  (an exception class may not support copying)
        return error
    return own if type(own) is type(error) else error
