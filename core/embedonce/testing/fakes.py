"""Two fakes for tests of code that calls plugins: a backend that uses a dict, and a provider that counts its calls.

Both fakes raise if a call breaks the rules for plugins: if the batch is larger than ``max_batch``, if the list of texts
is empty, or if the backend does not declare the method. A test therefore fails if the code under test makes such a
call.
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

from embedonce.contracts import Capabilities, Embedded, Limits, Task, time_left
from embedonce.keys import LEASE_PREFIX, VectorSpace
from embedonce.vectors import Entry, Vector

Store = dict[str, tuple[Any, float | None]]
"""Value and Unix time of expiry, by key."""

_KINDS: dict[str, tuple[type, ...]] = {"frames": (bytes,), "entries": (Entry,), "either": (bytes, Entry)}


class DictBackend:
    """Holds frames or entries in a dict of this process. By default, it declares every optional method except ``twin``.

    ``capabilities`` override these declarations, as in ``DictBackend(delete=False, max_batch=100)``. A method that
    is not declared raises. With ``store``, the backend shares the dict of another backend, like a second client of the
    same store.
    """

    def __init__(
        self,
        *,
        holds: Literal["frames", "entries", "either"] = "frames",
        scope: Literal["process", "single", "host", "network"] = "process",
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
        self._check_call("get")
        with self._lock:
            return self._read(key)

    def get_many(self, keys: Sequence[str], /) -> dict[str, Any]:
        """Return the values of the keys that are stored and have not expired."""
        self._check_call(count=len(keys))
        with self._lock:
            return {key: value for key in keys if (value := self._read(key)) is not None}

    def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None:
        """Store the items; if one of them is refused, store none."""
        self._check_call(count=len(items))
        self._check_values(items)
        expires = self._compute_expiry(ttl)
        with self._lock:
            for key, value in items.items():
                self._store[key] = (value, expires)

    def add_many(self, items: Mapping[str, Any], ttl: float | None, /) -> set[str]:
        """Store the items whose keys are absent, and return those keys."""
        self._check_call("add", count=len(items))
        self._check_values(items)
        expires = self._compute_expiry(ttl)
        with self._lock:
            added = {key for key in items if self._read(key) is None}
            for key in added:
                self._store[key] = (items[key], expires)
        return added

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys."""
        self._check_call("delete", count=len(keys))
        with self._lock:
            for key in keys:
                self._store.pop(key, None)

    def scan(self, prefix: str, /) -> Iterable[str]:
        """Return the keys that start with ``prefix``."""
        self._check_call("scan")
        with self._lock:
            return [key for key in list(self._store) if key.startswith(prefix) and self._read(key) is not None]

    def count(self, prefix: str, /) -> int:
        """Return how many keys start with ``prefix``."""
        self._check_call("count")
        with self._lock:
            return sum(key.startswith(prefix) and self._read(key) is not None for key in list(self._store))

    def twin(self) -> DictTwin:
        """Return an async client of the same dict for the running loop."""
        self._check_call("twin")
        return DictTwin(self)

    def close(self) -> None:
        """Refuse every later call. The entries stay, for other backends that share the dict."""
        self._closed = True

    def __len__(self) -> int:
        """Return the number of entries, including expired entries that no call has removed yet."""
        return len(self._store)

    def _check_call(self, extra: str | None = None, count: int = 0) -> None:
        if self._closed:
            raise RuntimeError("this backend is closed")
        if extra is not None and not getattr(self.capabilities, extra):
            raise NotImplementedError(f'this backend does not declare the capability "{extra}"')
        max_batch = self.capabilities.max_batch
        if max_batch is not None and count > max_batch:
            raise ValueError(f"expected at most {max_batch} keys per call (max_batch), got {count}")
        if self.capabilities.deadline:
            time_left()

    def _check_values(self, items: Mapping[str, Any]) -> None:
        kinds = _KINDS[self.capabilities.holds]
        max_bytes = self.capabilities.max_value_bytes
        for key, value in items.items():
            # A lease is a few bytes. Every backend with add_many must accept leases, even a backend of entries.
            if not isinstance(value, kinds) and not (isinstance(value, bytes) and key.startswith(LEASE_PREFIX)):
                raise TypeError(f"this backend holds {self.capabilities.holds}, got a value of {type(value).__name__}")
            if isinstance(value, bytes) and max_bytes is not None and len(value) > max_bytes:
                raise ValueError(f"a value must have at most {max_bytes} bytes (max_value_bytes), got {len(value)}")

    def _compute_expiry(self, ttl: float | None) -> float | None:
        return None if ttl is None or not self.capabilities.ttl else self.clock() + ttl

    def _read(self, key: str) -> Any:
        """Return the value, or None. Remove a value that has expired."""
        value, expires = self._store.get(key, (None, None))
        if expires is not None and expires <= self.clock():
            del self._store[key]
            return None
        return value


class DictTwin:
    """The async client of a :class:`DictBackend`, for the event loop in which the client was made."""

    def __init__(self, backend: DictBackend) -> None:
        self._backend = backend
        self._loop = asyncio.get_running_loop()
        self._closed = False

    async def get_many(self, keys: Sequence[str], /) -> dict[str, Any]:
        """Call the backend's ``get_many``."""
        self._check_open()
        return self._backend.get_many(keys)

    async def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None:
        """Call the backend's ``set_many``."""
        self._check_open()
        self._backend.set_many(items, ttl)

    async def close(self) -> None:
        """Refuse every later call of this client; the backend stays open."""
        self._closed = True

    def _check_open(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("this twin belongs to another event loop; call the backend's twin() in this loop")
        if self._closed:
            raise RuntimeError("this twin is closed")


class CountingProvider:
    """Makes each vector from a hash of the text, and counts its calls and texts.

    Different texts get different vectors. The same text gets a different vector for each ``model`` and,
    unless ``symmetric``, for each task. A float32 represents every value exactly. The provider has only
    ``embed``, or only ``aembed`` if ``asynchronous`` is True.
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
        """Number of times that each text was embedded."""
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        """Task and texts of each call, in the order in which the calls started."""
        self.most_at_once = 0
        """Maximum number of calls that were in flight at the same time."""
        self.closed = 0
        """Number of calls of :meth:`close`."""
        self._at_once = 0
        self._lock = threading.Lock()
        if asynchronous:
            self.aembed = self._aembed
        else:
            self.embed = self._embed

    def space(self, task: Task, /) -> VectorSpace:
        """Return the space of the model and, unless ``symmetric``, of the task."""
        return VectorSpace(
            provider="counting",
            model=self.model,
            task=None if self.symmetric else task,
            dimensions=self.dimensions if self.tells_dimensions else None,
        )

    def vector_of(self, text: str, task: Task = "document") -> Vector:
        """Return the vector of ``text``, shape (dimensions,). This does not count as a call."""
        about = "" if self.symmetric else task
        seed = f"{len(self.model)}:{self.model}{len(about)}:{about}".encode() + text.encode()
        # A float32 represents 24 bits and a sign exactly. Setting the lowest bit makes every value nonzero.
        integers = np.frombuffer(hashlib.shake_256(seed).digest(4 * self.dimensions), "<i4") >> 8
        return ((integers | 1) / 2**23).astype(np.float32)

    def close(self) -> None:
        """Count the call."""
        self.closed += 1

    @property
    def texts(self) -> int:
        """Number of texts that were embedded, including repeated texts."""
        return self.count.total()

    def _embed(self, texts: Sequence[str], task: Task, /) -> Embedded:
        """Return one vector per text; each character counts as one token."""
        with _CountedCall(self, texts, task):
            if self.delay is not None:
                time.sleep(self.delay)
            return self._answer(texts, task)

    async def _aembed(self, texts: Sequence[str], task: Task, /) -> Embedded:
        """Return one vector per text; each character counts as one token."""
        with _CountedCall(self, texts, task):
            if self.delay is not None:
                await asyncio.sleep(self.delay)
            return self._answer(texts, task)

    def _answer(self, texts: Sequence[str], task: Task) -> Embedded:
        vectors = np.stack([self.vector_of(text, task) for text in texts])
        return Embedded(vectors, tokens=sum(map(len, texts)))


class _CountedCall:
    """Counts a provider's call, its texts, and the calls in flight."""

    def __init__(self, provider: CountingProvider, texts: Sequence[str], task: Task) -> None:
        if isinstance(texts, str) or not texts:
            raise ValueError("expected a list of at least one text")
        max_batch = provider.limits.max_batch
        if len(texts) > max_batch:
            raise ValueError(f"expected at most {max_batch} texts per call (max_batch), got {len(texts)}")
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
