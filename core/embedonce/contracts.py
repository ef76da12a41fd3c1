"""What a backend and a provider must be: read this file to write a plugin.

A backend holds bytes (frames) or entries under keys. A provider makes vectors. Neither sees
retries, breakers, metrics or flights; a backend never sees a text. Both raise when something goes
wrong, and the engine decides what that means.
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
    """What a backend declares of itself; checked when a chain is composed.

    Declare only what is there: the conformance kit fails a capability that is declared and absent.
    """

    holds: Literal["frames", "entries", "either"] = "frames"
    """``"frames"``: bytes, a :class:`FrameBackend`. ``"entries"``: an :class:`EntryBackend`. ``"either"``: an
    entry backend that also takes frames, which an encrypted tier gives it, and returns each value as it was given."""
    scope: Literal["process", "host", "network"] = "host"
    """Who shares what it holds. It decides the tier's default timeout and write mode."""
    blocking: bool = True
    """False: a call is a matter of microseconds and runs on the event loop itself."""
    deadline: bool = False
    """True: every call raises by :func:`time_left`. Otherwise the engine runs the backend's calls in a
    thread of its own, so that a hanging one can be left behind."""
    fork: bool = True
    """False: its client library cannot go on in a forked child. There, a call raises at once and says what to do."""
    ttl: bool = False
    """True: the backend frees an entry's space after its ttl. (The engine never serves an expired entry.)"""
    max_batch: int | None = None
    """Most keys of one call; the engine splits larger ones."""
    max_value_bytes: int | None = None
    """Largest value; the engine keeps larger ones away and counts them."""
    get: bool = False
    """Has ``get(key) -> value or None``: one key, for the single-text path of an in-process tier."""
    delete: bool = False
    """Has ``delete_many(keys)``; needed by ``forget`` and ``purge``."""
    scan: bool = False
    """Has ``scan(prefix)``; needed by ``purge`` and ``stats``."""
    count: bool = False
    """Has ``count(prefix)``; otherwise the engine counts what ``scan`` gives."""
    add: bool = False
    """Has ``add_many(items, ttl)``: set if absent, for leases."""
    twin: bool = False
    """Has ``twin()``: a native async client of the same store."""
    bounded: bool | None = None
    """Whether it keeps to a size of its own by dropping entries; None where it cannot say. A chain with two tiers
    that grow without end gets a warning."""
    text_preview: bool = False
    """Keeps the text's beginning beside the vector, because somebody asked for it: entries come with it as the
    metadata ``text_preview``. Refused together with encryption or a secret."""


EXTRAS: Mapping[str, str] = {
    "get": "get",
    "delete": "delete_many",
    "scan": "scan",
    "count": "count",
    "add": "add_many",
    "twin": "twin",
}
"""The method that each of these capabilities declares."""


class FrameBackend(Protocol):
    """Holds frames (bytes) under keys. Called from several threads at once.

    Keys are ASCII, under 120 characters, from ``a-z 0-9 .``: nothing needs escaping. Every method
    may raise anything; an exception is counted as the tier's error and never reaches the caller.

    A store of several nodes of which some fail raises :class:`~embedonce.errors.PartialAnswer`, with what the others
    said: that is used, and only the keys that failed are errors. Never leave such a key out of an answer instead:
    it would count as a miss.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, bytes]:
        """Return what is there. A key that is not there is absent, never None."""
        ...

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item, replacing what is there.

        ``ttl`` is in seconds, None for ever: the space may be freed afterwards.
        """
        ...

    def close(self) -> None:
        """Let go of files and connections. Calling it twice does nothing."""
        ...


class EntryBackend(Protocol):
    """Holds entries under keys: for a store that keeps arrays or columns. Otherwise as :class:`FrameBackend`.

    A store whose answer is one matrix may return it as such, ``Entries(blocks=[Block(keys, matrix, …)])`` of
    :mod:`embedonce.vectors`: a batch that only becomes a matrix again then costs no object per text.
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
        """Remove the keys; one that is not there is no error."""
        ...

    def scan(self, prefix: str, /) -> Iterable[str]:
        """Yield every key that starts with ``prefix``, without holding the store up."""
        ...

    def count(self, prefix: str, /) -> int:
        """Return how many keys start with ``prefix``."""
        ...

    def add_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> set[str]:
        """Store the items whose key is absent, and return those keys; for each key one caller only.

        The values are the few bytes of a lease, also where the backend holds entries.
        """
        ...

    def twin(self) -> AsyncBackend:
        """Return a native async client; called inside the event loop that will use it, once per loop."""
        ...

    def describe(self) -> str:
        """Return in a few words how it stores vectors, for ``embedonce check``. Needs no capability."""
        ...

    def migrate(self) -> str:
        """Bring the store's layout up to date and say what was done, for ``embedonce migrate``. Needs no capability."""
        ...


class AsyncBackend(Protocol):
    """The native async twin of a backend: the same calls as coroutines, for one event loop.

    A call that is cancelled (a timeout cancels it) must not leave its reply for the next call: drop
    the connection that it had. A frame would show the mistake, an entry cannot.
    """

    async def get_many(self, keys: Sequence[str], /) -> Mapping[str, Any]: ...

    async def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None: ...

    async def close(self) -> None: ...


Backend: TypeAlias = FrameBackend | EntryBackend


# --- deadline of the call under way -----------------------------------------------------------

_deadline: ContextVar[float | None] = ContextVar("embedonce_deadline", default=None)


def time_left() -> float | None:
    """Return the seconds left to the backend call under way, or None where there is no limit.

    A backend that declares ``deadline`` passes it to its client and asks again between chunks.

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
    """Give the calls inside the block ``seconds``; what :func:`time_left` counts down.

    A class, because a generator that Ctrl-C leaves unfinished would reset the variable in whichever context the
    garbage collector happens to run.
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
    """How a provider wants to be called. Not part of the vector space."""

    max_batch: int = 256
    """Most texts of one call."""
    max_tokens: int | None = None
    """Most tokens of one call, by the provider's ``count_tokens``; None where it does not matter."""
    concurrency: int = 1
    """How many calls may be under way at once for one batch."""
    timeout: float | None = None
    """Seconds that one call may take; None where the provider's own client decides."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """A provider's answer where it has more to say than the vectors."""

    vectors: Vectors
    """Shape (n, d), row i for text i."""
    tokens: int | None = None
    """Tokens that the call was charged for."""

    def __repr__(self) -> str:
        tokens = "" if self.tokens is None else f", {number_of(self.tokens, 'token')}"
        return f"<Embedded {number_of(len(self.vectors), 'vector')}{tokens}>"


class Provider(Protocol):
    """Makes vectors, blocking. Called from several threads at once.

    It may also have ``aembed``, the same as a coroutine; the async face then prefers it.
    """

    @property
    def limits(self) -> Limits: ...

    def space(self, task: Task, /) -> VectorSpace:
        """Describe everything that decides which vector a text gets for this task.

        Called before any text is looked up: it loads no model and uses no network where it can be
        helped. A symmetric provider returns the same space for every task.
        """
        ...

    def embed(self, texts: Sequence[str], task: Task, /) -> Vectors | Embedded:
        """Return one vector per text, in order. Never called with an empty list.

        Raises:
            TextRefused: some texts cannot be embedded; the others are asked for again.
        """
        ...

    def close(self) -> None: ...


class AsyncProvider(Protocol):
    """Makes vectors on an event loop. The sync face drives it on one background loop of its own."""

    @property
    def limits(self) -> Limits: ...

    def space(self, task: Task, /) -> VectorSpace: ...

    async def aembed(self, texts: Sequence[str], task: Task, /) -> Vectors | Embedded: ...

    def close(self) -> None: ...


AnyProvider: TypeAlias = Provider | AsyncProvider
Normalizer: TypeAlias = Callable[[str], str]
