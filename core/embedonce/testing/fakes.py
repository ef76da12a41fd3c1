"""A backend on a dict and a provider that counts: real ones, small and strict, for tests of what uses them.

Both refuse what the contract says they are never asked (a batch above ``max_batch``, an empty list of
texts, a method that is not declared), so that a caller which does so is found out.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from embedonce.contracts import Capabilities, Embedded, Limits, Task, time_left
from embedonce.keys import LEASE_PREFIX, VectorSpace
from embedonce.vectors import Entry

Store = dict[str, tuple[Any, float | None]]
"""Value and when it expires, by key."""

_KINDS: dict[str, tuple[type, ...]] = {"frames": (bytes,), "entries": (Entry,), "either": (bytes, Entry)}


class DictBackend:
    """Holds frames or entries in a dict of this process; every extra is there unless it is switched off.

    ``capabilities`` override what it declares: ``DictBackend(delete=False, max_batch=100)``. A method
    that is then not declared raises. ``store`` shares another one's dict: a second client of one store.
    """

    def __init__(
        self,
        *,
        holds: Literal["frames", "entries", "either"] = "frames",
        scope: Literal["process", "host", "network"] = "process",
        clock: Callable[[], float] = time.time,
        store: DictBackend | None = None,
        **capabilities: Any,
    ) -> None:
        extras = {name: True for name in ("ttl", "get", "delete", "scan", "count", "add")}
        declared = {"blocking": scope != "process", **extras, **capabilities}
        self.capabilities = Capabilities(holds=holds, scope=scope, **declared)
        self.clock = clock
        self._store: Store = {} if store is None else store._store
        self._lock: threading.RLock = threading.RLock() if store is None else store._lock
        self._closed = False

    def get(self, key: str, /) -> Any:
        """Return one value, or None."""
        self._enter("get")
        with self._lock:
            return self._read(key)

    def get_many(self, keys: Sequence[str], /) -> dict[str, Any]:
        """Return what is there and has not expired."""
        self._enter(count=len(keys))
        with self._lock:
            return {key: value for key in keys if (value := self._read(key)) is not None}

    def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None:
        """Store the items, all or, where one is refused, none."""
        self._enter(count=len(items))
        self._check(items)
        expires = self._expires(ttl)
        with self._lock:
            for key, value in items.items():
                self._store[key] = (value, expires)

    def add_many(self, items: Mapping[str, Any], ttl: float | None, /) -> set[str]:
        """Store the items whose key is absent, and return those keys."""
        self._enter("add", count=len(items))
        self._check(items)
        expires = self._expires(ttl)
        with self._lock:
            added = {key for key in items if self._read(key) is None}
            for key in added:
                self._store[key] = (items[key], expires)
        return added

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys."""
        self._enter("delete", count=len(keys))
        with self._lock:
            for key in keys:
                self._store.pop(key, None)

    def scan(self, prefix: str, /) -> Iterable[str]:
        """Return the keys that start with ``prefix``."""
        self._enter("scan")
        with self._lock:
            return [key for key in list(self._store) if key.startswith(prefix) and self._read(key) is not None]

    def count(self, prefix: str, /) -> int:
        """Return how many keys start with ``prefix``."""
        self._enter("count")
        with self._lock:
            return sum(key.startswith(prefix) and self._read(key) is not None for key in list(self._store))

    def twin(self) -> DictTwin:
        """Return an async client of the same dict for the running loop."""
        self._enter("twin")
        return DictTwin(self)

    def close(self) -> None:
        """Refuse every later call. What is stored stays, for others that share it."""
        self._closed = True

    def __len__(self) -> int:
        """Return how many entries are held, expired ones that nobody has asked for included."""
        return len(self._store)

    def _enter(self, extra: str | None = None, count: int = 0) -> None:
        if self._closed:
            raise RuntimeError("this backend is closed")
        if extra is not None and not getattr(self.capabilities, extra):
            raise NotImplementedError(f"{extra} is not declared in this backend's capabilities")
        most = self.capabilities.max_batch
        if most is not None and count > most:
            raise ValueError(f"{count} keys in one call, and max_batch is {most}")
        if self.capabilities.deadline:
            time_left()

    def _check(self, items: Mapping[str, Any]) -> None:
        kinds = _KINDS[self.capabilities.holds]
        most = self.capabilities.max_value_bytes
        for key, value in items.items():
            # A lease is no entry: its few bytes may go to every backend that has add_many.
            if not isinstance(value, kinds) and not (isinstance(value, bytes) and key.startswith(LEASE_PREFIX)):
                raise TypeError(f"this backend holds {self.capabilities.holds}, not {type(value).__name__}")
            if isinstance(value, bytes) and most is not None and len(value) > most:
                raise ValueError(f"a value of {len(value)} bytes, and max_value_bytes is {most}")

    def _expires(self, ttl: float | None) -> float | None:
        return None if ttl is None or not self.capabilities.ttl else self.clock() + ttl

    def _read(self, key: str) -> Any:
        """Return the value, or None; drop it when its time is over."""
        value, expires = self._store.get(key, (None, None))
        if expires is not None and expires <= self.clock():
            del self._store[key]
            return None
        return value


class DictTwin:
    """The async client of a :class:`DictBackend`, for the one loop that it was made in."""

    def __init__(self, backend: DictBackend) -> None:
        self._backend = backend
        self._loop = asyncio.get_running_loop()
        self._closed = False

    async def get_many(self, keys: Sequence[str], /) -> dict[str, Any]:
        """As the backend's."""
        self._check()
        return self._backend.get_many(keys)

    async def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None:
        """As the backend's."""
        self._check()
        self._backend.set_many(items, ttl)

    async def close(self) -> None:
        """Refuse every later call; the backend stays open."""
        self._closed = True

    def _check(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("this twin belongs to another event loop; ask the backend for one in this loop")
        if self._closed:
            raise RuntimeError("this twin is closed")


class CountingProvider:
    """Makes a vector from a hash of the text, and counts what it is asked.

    Different texts (and, unless ``symmetric``, the same text for another task, and the same text under
    another ``model``) get different vectors, whose values are float32 exactly. It has ``embed``, or
    with ``asynchronous`` only ``aembed``.
    """

    def __init__(
        self,
        *,
        dimensions: int = 8,
        model: str = "counting",
        concurrency: int = 1,
        max_batch: int = 256,
        timeout: float | None = None,
        delay: float | None = None,
        asynchronous: bool = False,
        symmetric: bool = True,
        tells_dimensions: bool = True,
    ) -> None:
        self.limits = Limits(max_batch=max_batch, concurrency=concurrency, timeout=timeout)
        self.dimensions = dimensions
        self.model = model
        self.symmetric = symmetric
        self.delay = delay
        self.tells_dimensions = tells_dimensions
        self.count: Counter[str] = Counter()
        """How often each text was embedded."""
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        """Task and texts of each call, in the order in which they began."""
        self.most_at_once = 0
        """Most calls that were under way at one time."""
        self.closed = 0
        """How often it was closed."""
        self._at_once = 0
        self._lock = threading.Lock()
        if asynchronous:
            self.aembed = self._aembed
        else:
            self.embed = self._embed

    def space(self, task: Task, /) -> VectorSpace:
        """Describe the space: of the model, and of the task unless symmetric."""
        return VectorSpace(
            provider="counting",
            model=self.model,
            task=None if self.symmetric else task,
            dimensions=self.dimensions if self.tells_dimensions else None,
        )

    def vector_of(self, text: str, task: Task = "document") -> NDArray[np.float32]:
        """Return the vector that ``text`` gets, shape (dimensions,), without counting it."""
        about = "" if self.symmetric else task
        seed = f"{len(self.model)}:{self.model}{len(about)}:{about}".encode() + text.encode()
        # 24 bits with their sign are float32 exactly, and the set bit keeps every value from being zero.
        integers = np.frombuffer(hashlib.shake_256(seed).digest(4 * self.dimensions), "<i4") >> 8
        return ((integers | 1) / 2**23).astype(np.float32)

    def close(self) -> None:
        """Count that it was closed."""
        self.closed += 1

    @property
    def texts(self) -> int:
        """How many texts were embedded, repeated ones included."""
        return self.count.total()

    def _embed(self, texts: Sequence[str], task: Task, /) -> Embedded:
        """Return one vector per text; the tokens charged for are the characters."""
        with _Under(self, texts, task):
            if self.delay is not None:
                time.sleep(self.delay)
            return self._answer(texts, task)

    async def _aembed(self, texts: Sequence[str], task: Task, /) -> Embedded:
        """Return one vector per text; the tokens charged for are the characters."""
        with _Under(self, texts, task):
            if self.delay is not None:
                await asyncio.sleep(self.delay)
            return self._answer(texts, task)

    def _answer(self, texts: Sequence[str], task: Task) -> Embedded:
        vectors = np.stack([self.vector_of(text, task) for text in texts])
        return Embedded(vectors, tokens=sum(map(len, texts)))


class _Under:
    """Counts a provider's call while it is under way, and what it is asked."""

    def __init__(self, provider: CountingProvider, texts: Sequence[str], task: Task) -> None:
        if isinstance(texts, str) or not texts:
            raise ValueError("a provider is asked for a list of at least one text")
        if len(texts) > provider.limits.max_batch:
            raise ValueError(f"{len(texts)} texts in one call, and max_batch is {provider.limits.max_batch}")
        self._provider = provider
        self._texts = tuple(texts)
        self._task = task

    def __enter__(self) -> None:
        provider = self._provider
        with provider._lock:
            provider.count.update(self._texts)
            provider.calls.append((self._task, self._texts))
            provider._at_once += 1
            provider.most_at_once = max(provider.most_at_once, provider._at_once)

    def __exit__(self, *_: object) -> None:
        with self._provider._lock:
            self._provider._at_once -= 1
