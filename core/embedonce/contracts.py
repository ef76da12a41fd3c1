"""The interfaces of backends and providers: read this file to write a plugin.

A backend stores bytes (frames) or entries under keys. A provider computes vectors. Neither deals with
retries, breakers, metrics or flights, and a backend never sees a text. Both raise an exception when something
fails, and the engine decides how to handle it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._reprs import number_of
from .errors import TierTimeout
from .keys import VectorSpace
from .vectors import Entry

API = 1
"""The version of the plugin contract in this file."""

Task: TypeAlias = Literal["document", "query"] | str
Vectors: TypeAlias = NDArray[np.floating[Any]] | Sequence[Sequence[float]] | Sequence[NDArray[np.floating[Any]]]


# --- backends ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """The properties that a backend declares. They are checked when a chain is composed.

    Declare only capabilities that the backend has: the conformance kit fails if a declared one is missing.
    """

    holds: Literal["frames", "entries", "either"] = "frames"
    """``"frames"``: bytes, a :class:`FrameBackend`. ``"entries"``: an :class:`EntryBackend`. ``"either"``: an
    entry backend that also stores frames, for an encrypted tier, and returns each value in the form it was given."""
    scope: Literal["process", "host", "network"] = "host"
    """Who shares its entries: one process, one host, or all hosts. The tier's default timeout and write mode follow."""
    blocking: bool = True
    """False: a call takes microseconds and runs on the event loop itself."""
    deadline: bool = False
    """True: every call ends within :func:`time_left` seconds. Otherwise the engine runs the backend's calls in
    a thread, so that it can stop waiting for a hanging call."""
    fork: bool = True
    """False: its client library does not work in a forked child. A call there raises at once and says what to do."""
    ttl: bool = False
    """True: the backend frees an entry's space after its ttl. (The engine never serves an expired entry.)"""
    max_batch: int | None = None
    """Maximum number of keys per call; the engine splits larger calls. None means no limit."""
    max_value_bytes: int | None = None
    """Maximum size of a value; the engine drops larger values and counts them. None means no limit."""
    get: bool = False
    """Has ``get(key) -> value or None``: reads one key, for the single-text path of an in-process tier."""
    delete: bool = False
    """Has ``delete_many(keys)``; needed by ``forget`` and ``purge``."""
    scan: bool = False
    """Has ``scan(prefix)``; needed by ``purge`` and ``stats``."""
    count: bool = False
    """Has ``count(prefix)``; otherwise the engine counts the keys that ``scan`` yields."""
    add: bool = False
    """Has ``add_many(items, ttl)``: sets absent keys, for leases."""
    twin: bool = False
    """Has ``twin()``: a native async client of the same store."""
    bounded: bool | None = None
    """Whether it limits its size by evicting entries; None if it cannot tell. A chain with two tiers that grow
    without limit gets a warning."""
    text_preview: bool = False
    """Stores the beginning of the text beside the vector, because its option says so. Entries then carry it as the
    metadata ``text_preview``. An error together with encryption or a secret."""


EXTRAS: Mapping[str, str] = {
    "get": "get",
    "delete": "delete_many",
    "scan": "scan",
    "count": "count",
    "add": "add_many",
    "twin": "twin",
}
"""The name of the method behind each of these capabilities."""


class FrameBackend(Protocol):
    """Stores frames (bytes) under keys. It is called from several threads at once.

    Keys are ASCII, under 120 characters, from ``a-z 0-9 .``, so they need no escaping. A method may raise any
    exception; it is counted as an error of the tier and, by default, does not reach the caller.

    If some nodes of a store fail, raise :class:`~embedonce.errors.PartialAnswer` with the answers of the others:
    those are used, and only the failed keys count as errors. Do not leave failed keys out of an answer instead:
    they would count as misses.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, bytes]:
        """Return the values of the keys that are stored. Leave missing keys out; never return None for them."""
        ...

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item and replace existing values.

        ``ttl`` is in seconds; the space may be freed after it. None means for ever.
        """
        ...

    def close(self) -> None:
        """Close files and connections. A second call does nothing."""
        ...


class EntryBackend(Protocol):
    """Stores entries under keys, for a store of arrays or columns. Everything else is as in :class:`FrameBackend`.

    A store that reads one matrix may return it as ``Entries(blocks=[Block(keys, matrix, …)])`` of
    :mod:`embedonce.vectors`. A batch that is returned as a matrix then needs no object per text.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, Entry]: ...

    def set_many(self, items: Mapping[str, Entry], ttl: float | None, /) -> None: ...

    def close(self) -> None: ...


class Extras(Protocol):
    """The optional methods, each behind the capability of its name (``delete`` -> ``delete_many``)."""

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
        """Store the items whose key is absent, and return those keys. Of several callers, one gets each key.

        The values are the few bytes of a lease, even if the backend stores entries.
        """
        ...

    def twin(self) -> AsyncBackend:
        """Return a native async client. Called once per event loop, inside the loop that will use the client."""
        ...

    def describe(self) -> str:
        """Describe in a few words how it stores vectors, for ``embedonce check``. Needs no capability."""
        ...

    def migrate(self) -> str:
        """Update the store's layout and return what was done, for ``embedonce migrate``. Needs no capability."""
        ...


class AsyncBackend(Protocol):
    """The native async client of a backend: the same calls as coroutines, for one event loop.

    A cancelled call (a timeout cancels it) must not leave its reply for the next call to read: drop its
    connection. With frames the engine would notice the wrong reply; with entries it cannot.
    """

    async def get_many(self, keys: Sequence[str], /) -> Mapping[str, Any]: ...

    async def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None: ...

    async def close(self) -> None: ...


Backend: TypeAlias = FrameBackend | EntryBackend


# --- deadline of the current call -------------------------------------------------------------

_deadline: ContextVar[float | None] = ContextVar("embedonce_deadline", default=None)


def time_left() -> float | None:
    """Return the seconds that the current backend call has left, or None if it has no limit.

    A backend that declares ``deadline`` passes this to its client as a timeout, and calls it again for each chunk.

    Raises:
        TierTimeout: the deadline has passed.
    """
    at = _deadline.get()
    if at is None:
        return None
    left = at - time.monotonic()
    if left <= 0:
        raise TierTimeout("the tier's timeout has passed")
    return left


class deadline:
    """Limit the calls inside the block to ``seconds``, which :func:`time_left` counts down.

    This is a class, because a generator that Ctrl-C leaves unfinished would reset the variable when it is garbage
    collected, in whichever context that happens.
    """

    __slots__ = ("_seconds", "_token")

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        at = None if self._seconds is None else time.monotonic() + self._seconds
        self._token = _deadline.set(at)

    def __exit__(self, *_: object) -> None:
        _deadline.reset(self._token)


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
    """Seconds that one call may take. None leaves it to the provider's own client."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """A provider's answer with the vectors and the tokens that they cost."""

    vectors: Vectors
    """Shape (n, d), row i for text i."""
    tokens: int | None = None
    """Tokens charged for the call; None if the provider does not report them."""

    def __repr__(self) -> str:
        tokens = "" if self.tokens is None else f", {number_of(self.tokens, 'token')}"
        return f"<Embedded {number_of(len(self.vectors), 'vector')}{tokens}>"


class Provider(Protocol):
    """Computes vectors with blocking calls. It is called from several threads at once.

    It may also have ``aembed``, the same method as a coroutine, which the async face then prefers.
    """

    @property
    def limits(self) -> Limits: ...

    def space(self, task: Task, /) -> VectorSpace:
        """Describe everything that affects which vector a text gets for this task.

        Called before any text is looked up, so it should not load a model or use the network if it can avoid it.
        A provider that embeds all tasks alike returns the same space for each of them.
        """
        ...

    def embed(self, texts: Sequence[str], task: Task, /) -> Vectors | Embedded:
        """Return one vector per text, in order. Never called with an empty list.

        Raises:
            TextRefused: some texts cannot be embedded; the engine calls again with the others.
        """
        ...

    def close(self) -> None: ...


class AsyncProvider(Protocol):
    """Computes vectors on an event loop. The blocking face runs it on a background event loop."""

    @property
    def limits(self) -> Limits: ...

    def space(self, task: Task, /) -> VectorSpace: ...

    async def aembed(self, texts: Sequence[str], task: Task, /) -> Vectors | Embedded: ...

    def close(self) -> None: ...


AnyProvider: TypeAlias = Provider | AsyncProvider
Normalizer: TypeAlias = Callable[[str], str]
