"""The interfaces of backends, providers and importers: read this file to write a plugin.

A backend stores bytes (frames) or entries under keys. A provider computes vectors. An importer finds vectors in the
store of another program. None of them deals with retries, breakers, metrics or flights, and a backend never sees a
text. All raise an exception when something fails, and the engine decides how to handle it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._messages import format_count
from .errors import TierTimeout
from .keys import VectorSpace
from .store_writers import StoreWriter
from .vectors import Entry

API = 1
"""The version of the plugin contract in this file."""

Task: TypeAlias = Literal["document", "query"] | str
Vectors: TypeAlias = NDArray[np.floating[Any]] | Sequence[Sequence[float]] | Sequence[NDArray[np.floating[Any]]]


# --- backends ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """The properties that a backend declares. They are checked when a chain is composed.

    Declare only what the backend can do, because the conformance kit fails if the backend lacks a declared capability.
    """

    holds: Literal["frames", "entries", "either"] = "frames"
    """The values that the backend stores.

    ``"frames"``: bytes, in a :class:`FrameBackend`. ``"entries"``: entries, in an :class:`EntryBackend`. ``"either"``:
    frames if the tier is encrypted, otherwise entries. Such a backend is an :class:`EntryBackend`, and returns each
    value in the form in which the value was stored.
    """
    scope: Literal["process", "single", "host", "network"] = "host"
    """Who shares the entries. The scope determines the default timeout and write mode.

    ``"process"``: this process alone; the entries end with it. ``"single"``: one process at a time; the entries last,
    but while one process has the store open, no other process can open it (DuckDB, for example). ``"host"``: all
    processes of one host. ``"network"``: all hosts.

    A store of the scope ``"single"`` has no leases, even if it has ``add_many``. A forked child must not use the store
    of its parent, so declare ``fork=False``, and raise an error in the child.
    """
    blocking: bool = True
    """Whether calls may block. If False, the engine calls the backend on the event loop. Such a call must end
    within microseconds."""
    deadline: bool = False
    """Whether every call ends within :func:`time_left` seconds. If False, the engine runs the backend's calls in a
    thread, so that it can stop waiting for a hanging call."""
    fork: bool = True
    """Whether the client library works in a forked child. If False, a call in the child raises immediately, and the
    message of the error says what to do."""
    ttl: bool = False
    """Whether the backend deletes expired entries. (Even if it does not, the engine never returns an expired entry.)"""
    max_batch: int | None = None
    """Maximum number of keys per call; the engine splits larger calls. None means no limit."""
    max_value_bytes: int | None = None
    """Maximum size of a value; the engine drops larger values and counts them. None means no limit."""
    get: bool = False
    """Whether the backend has ``get(key)``, which returns the value of one key or None. The engine uses ``get`` to read
    the vector of a single text from an in-process tier."""
    delete: bool = False
    """Whether the backend has ``delete_many(keys)``, which ``forget`` and ``purge`` need."""
    scan: bool = False
    """Whether the backend has ``scan(prefix)``, which ``purge`` and ``embedonce stats`` need."""
    count: bool = False
    """Whether the backend has ``count(prefix)``, which counts keys without listing them."""
    add: bool = False
    """Whether the backend has ``add_many(items, ttl)``, which leases need. ``add_many`` stores only items whose key is
    absent."""
    twin: bool = False
    """Whether the backend has ``twin()``, which returns a native async client of the same store."""
    bounded: bool | None = None
    """Whether the backend limits its size by evicting entries; None if the backend cannot tell. A chain with two
    tiers that grow without limit gets a warning."""
    text_preview: bool = False
    """Whether the backend's options say that the beginning of each text is stored beside its vector. The metadata of an
    entry then has the field ``text_preview``. Such a backend cannot be used with encryption or with a secret."""
    read_only: bool = False
    """Whether the chain only reads the store: an immutable file, for example. The chain stores nothing in such a tier,
    not even leases. The backend needs no ``set_many``, and declares neither ``delete`` nor ``add``."""


EXTRAS: Mapping[str, str] = {
    "get": "get",
    "delete": "delete_many",
    "scan": "scan",
    "count": "count",
    "add": "add_many",
    "twin": "twin",
}
"""For each of these capabilities, the name of the method that the backend must have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSize:
    """How much some entries take in a store, and when they were stored. A field is None if the store cannot tell."""

    bytes: int | None = None
    """Size of all values, in bytes."""
    oldest: float | None = None
    """Unix time at which the oldest entry was stored."""
    newest: float | None = None
    """Unix time at which the newest entry was stored."""
    dimensions: int | None = None
    """Number of dimensions of the vectors."""


class FrameBackend(Protocol):
    """Stores frames (bytes) under keys. Several threads may call it at the same time.

    A key has fewer than 120 characters, all from ``a-z 0-9 .``, so it needs no escaping. A method may raise any
    exception. The engine counts the exception as an error of the tier, and by default does not raise it to the caller.

    If some nodes of a store fail, raise :class:`~embedonce.errors.PartialAnswer` with the values that the other nodes
    returned. The engine uses these values, and only the failed keys count as errors. Do not just leave the failed keys
    out of the returned mapping, because missing keys count as misses.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, bytes]:
        """Return the values of the keys that are stored. Leave missing keys out; never return None for them."""
        ...

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item and replace existing values.

        After ``ttl`` seconds, the backend may remove the items. If ``ttl`` is None, the items do not expire.

        A backend that declares ``read_only`` does not need this method.
        """
        ...

    def close(self) -> None:
        """Close files and connections. A second call does nothing."""
        ...


class EntryBackend(Protocol):
    """Stores entries under keys, for a store of arrays or columns. Everything else is as in :class:`FrameBackend`.

    A backend that reads many vectors as one matrix may return ``Entries(blocks=[Block(keys, matrix, …)])`` of
    :mod:`embedonce.vectors`. ``embed_batch``, which returns a matrix, then creates no Python object per text.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, Entry]: ...

    def set_many(self, items: Mapping[str, Entry], ttl: float | None, /) -> None: ...

    def close(self) -> None: ...


class Extras(Protocol):
    """The optional methods. The backend declares each one with a capability (see :data:`EXTRAS`)."""

    def get(self, key: str, /) -> Any: ...

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys. A missing key is not an error."""
        ...

    def scan(self, prefix: str, /) -> Iterable[str]:
        """Yield every key that starts with ``prefix``, without blocking other calls to the store."""
        ...

    def count(self, prefix: str, /) -> int:
        """Return how many keys start with ``prefix``."""
        ...

    def add_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> set[str]:
        """Store the items whose key is absent, and return those keys.

        If several callers add the same key, only one of their calls returns the key.

        Every value is a lease. A lease is a few bytes, even if the backend otherwise stores entries. ``set_many`` also
        gets leases, to renew them, and ``delete_many`` removes them.
        """
        ...

    def twin(self) -> AsyncBackend:
        """Return a native async client for the running event loop. The engine calls this method once per event loop."""
        ...

    def measure(self, prefix: str, /) -> StoredSize:
        """Return how much the keys that start with ``prefix`` take, and their dates, for ``embedonce stats``.

        The backend declares no capability for this method. It has the method only if this is much faster than reading
        all values. Without it, the engine reads the values of small scopes.
        """
        ...

    def describe(self) -> str:
        """Describe in a few words how the backend stores vectors, for ``embedonce check``.

        The backend declares no capability for this method.
        """
        ...

    def migrate(self) -> str:
        """Update the store's layout and return what was done, for ``embedonce migrate``.

        The backend declares no capability for this method.
        """
        ...

    def compact(self) -> str:
        """Give unused space of the store back to the system, for ``embedonce compact``.

        Return one sentence that says how large the store is and was, such as ``"4.2 GiB, was 6.0 GiB"``. The call has
        no deadline and may take minutes. Other threads and processes may use the store meanwhile, and no entry is lost
        if the call is interrupted.

        The backend declares no capability for this method.
        """
        ...

    def verify(self) -> str:
        """Read the whole store, check everything, and return in a few words what is intact, for ``embedonce check``.

        The call has no deadline and may take minutes. It changes nothing. The backend declares no capability for this
        method.

        Raises:
            TierError: something is damaged. The message says what, and what to do.
        """
        ...

    def create_writer(self, path: Path, /, *, replace: bool) -> StoreWriter:
        """Return a writer that makes a new store at ``path``, for ``embedonce export``. This is a static method.

        Only a read-only backend has this method, and declares no capability for it. With ``replace``, the new store
        takes the place of a store of the same kind at ``path``.

        Raises:
            StoreExists: there is a store at ``path`` already, and ``replace`` is False; or there is something else.
        """
        ...

    def list_grants(self) -> Sequence[str]:
        """Return the statements that let another role use the store; ``embedonce migrate`` shows them.

        The backend declares no capability for this method. It is called after :meth:`migrate`.
        """
        ...


class AsyncBackend(Protocol):
    """The native async client of a backend: the same calls as coroutines, for one event loop.

    A call is cancelled when its timeout has passed. The client must then drop the connection, so that the next call
    does not read the reply to the cancelled call. The engine would notice a frame that belongs to a different key,
    because a frame contains a hash of its key. The engine would not notice an entry that belongs to a different key.
    """

    async def get_many(self, keys: Sequence[str], /) -> Mapping[str, Any]: ...

    async def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None: ...

    async def close(self) -> None: ...


Backend: TypeAlias = FrameBackend | EntryBackend


# --- deadline of the current call -------------------------------------------------------------


class Deadline(Protocol):
    """The end of a call. :mod:`embedonce.event_loops` has the deadline of a coroutine."""

    def compute_seconds_left(self) -> float: ...


current_deadline: ContextVar[Deadline | None] = ContextVar("embedonce_deadline", default=None)


def time_left() -> float | None:
    """Return the seconds that the current backend call has left, or None if it has no limit.

    A backend that declares ``deadline`` passes the result to its client as a timeout, and calls this function again for
    each chunk.

    Raises:
        TierTimeout: the deadline has passed.
    """
    current = current_deadline.get()
    return None if current is None else current.compute_seconds_left()


class deadline:
    """A context manager that limits the backend calls inside its block to ``seconds``. See :func:`time_left`.

    ``deadline`` is a class and not a generator. Ctrl-C could leave a generator unfinished. The garbage collector would
    then finish the generator later, and so reset the deadline in an unrelated context.
    """

    __slots__ = ("_end", "_seconds", "_tokens")

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._end = 0.0
        self._tokens: list[Token[Deadline | None]] = []

    def __enter__(self) -> None:
        if self._seconds is not None:
            self._end = time.monotonic() + self._seconds
        self._tokens.append(current_deadline.set(None if self._seconds is None else self))

    def __exit__(self, *_: object) -> None:
        current_deadline.reset(self._tokens.pop())

    def compute_seconds_left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TierTimeout("the tier's timeout has passed")
        return left


# --- providers --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of calls to a provider. They are not part of the vector space."""

    max_batch: int = 256
    """Maximum number of texts per call."""
    max_tokens: int | None = None
    """Maximum number of tokens per call, as counted by the provider's ``count_tokens``. None means no limit."""
    concurrency: int = 1
    """Maximum number of simultaneous calls for one batch."""
    timeout: float | None = None
    """Maximum duration of one call, in seconds. With None, only the provider's own client limits the duration."""
    requests_per_minute: float | None = None
    """Maximum number of calls that begin within a minute. None means no limit."""
    tokens_per_minute: float | None = None
    """Maximum number of tokens sent within a minute, as counted by the provider's ``count_tokens``; None means no
    limit. A provider without ``count_tokens`` is charged a token for each byte of UTF-8."""
    max_retries: int = 0
    """How many times a call is repeated after an error with the status 429 (too many requests), or, for a single text,
    with a status that says that the server failed, such as 503.

    After a 429, all calls of the provider pause, for as long as the error asks. Keep 0 if the provider's own client
    repeats such calls."""
    lease: bool = True
    """Whether the chain takes its default lease for this provider's texts. Set this to False if computing a vector
    costs less than a round trip to a shared tier."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """A provider's answer: the vectors, the number of tokens charged for them, and the model that made them."""

    vectors: Vectors | Sequence[Sequence[float] | NDArray[np.floating[Any]] | None]
    """Shape (n, d), row i for text i. A row that is None has no vector: its text fails, and the others are stored."""
    tokens: int | Sequence[int | None] | None = None
    """Tokens charged: one number for the whole call, or one number per text. None: the provider does not report them.

    A number for the whole call is apportioned among the texts by their length."""
    model: str | None = None
    """The name of the model according to the answer; None if the answer does not name it.

    The first name is kept in the space card. If a later answer names another model, its vectors are not stored, unless
    the provider's ``answers_as`` or the drift guard says otherwise.
    """

    def __repr__(self) -> str:
        tokens = f", tokens={self.tokens}" if isinstance(self.tokens, int) else ""
        # An invalid answer must be printable too, because the developer of a provider prints it to find the error.
        rows: Any = self.vectors
        if not hasattr(rows, "__len__") or (isinstance(rows, np.ndarray) and rows.ndim == 0):
            return f"<Embedded vectors of type {type(rows).__name__}{tokens}>"
        return f"<Embedded {format_count(len(rows), 'vector')}{tokens}>"


class LostRequests:
    """The requests of one call of a provider that were sent and got no answer in time."""

    def __init__(self) -> None:
        self.count = 0


lost_requests: ContextVar[LostRequests | None] = ContextVar("embedonce_lost_requests", default=None)


def note_lost_request() -> None:
    """Count a request of the current call that was sent and got no answer in time. It may be charged all the same.

    A provider whose client repeats such a request calls this function each time, within ``embed`` or ``aembed``. The
    cache counts these requests in ``Fetched.wasted``. Without this function, it knows only of the last one.
    """
    lost = lost_requests.get()
    if lost is not None:
        lost.count += 1


class Provider(Protocol):
    """Computes vectors with blocking calls. Several threads may call it at the same time.

    A provider may also have these attributes:

    - ``aembed``, a coroutine function that does the same as ``embed``. The async methods of a cache then call it.
    - ``count_tokens(text)``, which returns the number of tokens of a text, or an upper bound. ``max_tokens`` and
      ``tokens_per_minute`` of the limits use it before each call, so it must be fast.
    - ``count_exact_tokens(texts, task)``, which returns a list of one int per text: the tokens that ``embed`` would
      report or charge. It returns None in place of the list if it cannot count them in this process.
      ``Cache.estimate`` uses it. It uses no network. It may load a tokenizer, but not the model. Several threads may
      call it at the same time.
    - ``check()``, which raises an error if the provider cannot be called as it is set up, for example because its API
      key is missing. It uses neither the network nor a model. ``embedonce check`` and ``Cache.check_providers`` show
      the message of the error, so it must not contain a secret.
    - ``prepare()``, which does what the first call of ``embed`` or ``aembed`` would do only once, such as importing a
      library or loading a model. It uses no network. ``embedonce serve`` calls it in a thread before a worker answers
      requests, so that no request has to wait for it. Several threads may call it at the same time, also together with
      other methods. A second call does nothing.
    - ``answers_as``, a sequence of names of the model. They count as the same model if an answer names one of them
      (see :attr:`Embedded.model`).
    """

    @property
    def limits(self) -> Limits: ...

    def space(self, task: Task, /) -> VectorSpace:
        """Describe everything that affects which vector a text gets for this task.

        The engine calls this before it looks up any text, so this method should not load a model or use the network.
        A provider that embeds all tasks in the same way returns the same space for each task.
        """
        ...

    def embed(self, texts: Sequence[str], task: Task, /) -> Vectors | Embedded:
        """Return one vector per text, in order. ``texts`` is never empty.

        Raises:
            TextRefused: some texts cannot be embedded. The engine then calls this method again with the other texts.
        """
        ...

    def close(self) -> None: ...


class AsyncProvider(Protocol):
    """Computes vectors on an event loop. The blocking methods of a cache run ``aembed`` on a background loop."""

    @property
    def limits(self) -> Limits: ...

    def space(self, task: Task, /) -> VectorSpace: ...

    async def aembed(self, texts: Sequence[str], task: Task, /) -> Vectors | Embedded: ...

    def close(self) -> None: ...


AnyProvider: TypeAlias = Provider | AsyncProvider
Normalizer: TypeAlias = Callable[[str], str]


# --- importers --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """What an importer reads: the store of another program."""

    name: str
    """Names the store and every option that determines which vector a text gets, for messages. It contains no secret
    and no text. The result of a verification is kept under a hash of this name."""
    task: Task | None = field(default=None, kw_only=True)
    """The task of all vectors, such as ``"document"``; None if the store does not say it."""
    mixing: str = field(default="", kw_only=True)
    """Why vectors of several tasks may be stored under the same key, as a sentence without a full stop. It also says
    what to do if there is anything to do. Empty if this cannot happen.

    With a provider that embeds queries and documents differently, embedonce does not import from such a store."""


@dataclass(frozen=True, slots=True)
class FoundVectors:
    """Texts and their vectors in a store."""

    texts: Sequence[str]
    vectors: Vectors | Sequence[Sequence[float] | NDArray[np.floating[Any]] | None]
    """Row i is the vector of text i: a matrix of shape (n, d), or n rows. embedonce checks each row, and does not use
    a row that is None or invalid."""
    unreadable: Mapping[str, int] = field(default_factory=dict)
    """The number of values that could not be read, by reason. A reason contains no text."""

    def __repr__(self) -> str:
        unreadable = sum(self.unreadable.values())
        return (
            f"<FoundVectors {format_count(len(self.texts), 'text')}{f', {unreadable:,} unreadable' * bool(unreadable)}>"
        )


class Importer(Protocol):
    """Finds vectors that another program has stored. It only reads.

    An importer has ``lookup`` (:class:`LookupImporter`), ``scan`` (:class:`ScanImporter`), or both. Its options are the
    keyword-only parameters of its class, as for a backend. The constructor opens nothing, so that a missing file or an
    unreachable server is an error of the first call and not of the configuration.

    If the store cannot be read, a method raises :class:`~embedonce.errors.SourceError`, or the error of its client. A
    single value that cannot be read is no error: count it in ``unreadable``.
    """

    @property
    def source(self) -> Source: ...

    def check(self) -> None:
        """Open the store and read a little of it.

        Raises:
            SourceError: the store is missing, is of another kind, or cannot be read. The message says what to do.
        """
        ...

    def close(self) -> None:
        """Close files and connections. A second call does nothing."""
        ...


class LookupImporter(Importer, Protocol):
    """An importer that finds vectors by their texts, because the keys of the store can be made from the texts.

    Several threads may call ``lookup`` at the same time.
    """

    def lookup(self, texts: Sequence[str], /) -> FoundVectors:
        """Return the texts that the store has, in any order, with their vectors.

        ``texts`` has at least one and at most :data:`LOOKUP_BATCH` texts, each of them once. They are normalised, as
        the provider would get them. Return them unchanged.

        A call should end within :func:`time_left` seconds. embedonce does not wait longer for it.
        """
        ...


class ScanImporter(Importer, Protocol):
    """An importer that reads all texts and vectors of a store that keeps both."""

    def scan(self) -> Iterable[FoundVectors]:
        """Yield all texts with their vectors, in parts of at most 5,000, in the same order each time.

        A text may occur several times. Memory must not grow with the size of the store.
        """
        ...

    def count(self) -> int | None:
        """Return about how many texts :meth:`scan` yields, for the progress; None if this is not known quickly."""
        ...


LOOKUP_BATCH = 1024
"""Maximum number of texts in a call of :meth:`LookupImporter.lookup`."""
