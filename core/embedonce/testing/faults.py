"""Faults on purpose: wrap a real backend or provider, and let its calls fail as stores and services do.

A :class:`Fault` says what happens and when; the wrapped thing stays what it is for every other call::

    backend = FaultyBackend(DictBackend(), [Fault("refuse", on="get", calls=[1, 2])])
    backend = FaultyBackend(DictBackend(), [Fault("corrupt", probability=0.1)], seed=7)

Needs numpy and nothing else.
"""

from __future__ import annotations

import asyncio
import copy
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embedonce.contracts import AnyProvider, Backend, Capabilities, Embedded, Limits, Task, time_left
from embedonce.errors import TextRefused
from embedonce.keys import VectorSpace
from embedonce.vectors import Entry

Operation: TypeAlias = Literal["get", "set", "delete", "scan", "count", "add", "any"]
Kind: TypeAlias = Literal[
    "raise",
    "refuse",
    "hang",
    "slow",
    "corrupt",
    "truncate",
    "partial",
    "wrong_reply",
    "unasked",
    "none_for_miss",
]
ProviderKind: TypeAlias = Literal[
    "raise",
    "hang",
    "slow",
    "short",
    "long",
    "nan",
    "infinity",
    "zeros",
    "dimension",
    "empty",
    "refuse",
]
Failure: TypeAlias = BaseException | type[BaseException]

RECENT = 16
"""How many values a faulty backend remembers, to answer with another key's."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong in a backend's calls.

    =================  ==============================================================================
    ``raise``          raises ``error``
    ``refuse``         raises :class:`ConnectionRefusedError`, as a server that is down
    ``hang``           waits for :meth:`FaultyBackend.release`, then does what was asked. Ignores the
                       deadline; with ``obey`` it raises when :func:`~embedonce.contracts.time_left` does
    ``slow``           does what was asked after ``seconds``
    ``corrupt``        reads: one bit of each frame is flipped; one value of each entry's vector is NaN
    ``truncate``       reads: half of each frame is missing; each entry's vector is one value short
    ``partial``        reads leave out some keys; writes store (or delete) some, then raise ``error``
    ``wrong_reply``    reads: each value comes under the next key, as when replies have shifted
    ``unasked``        reads: a key that nobody asked for comes too
    ``none_for_miss``  reads: what is not there is None instead of absent
    =================  ==============================================================================

    It strikes calls of ``on`` whose number (from 1, counted for this fault alone) is in ``calls``
    (default: every call), and of these each with ``probability``. The first fault that strikes is the
    one that happens. A kind that says *reads* lets other calls through.
    """

    kind: Kind
    on: Operation = field(default="any", kw_only=True)
    calls: Container[int] | None = field(default=None, kw_only=True)
    probability: float = field(default=1.0, kw_only=True)
    error: Failure = field(default=OSError, kw_only=True)
    seconds: float = field(default=0.0, kw_only=True)
    obey: bool = field(default=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class ProviderFault:
    """One thing that goes wrong in a provider's calls.

    =============  ==================================================================================
    ``raise``      raises ``error`` instead of embedding
    ``hang``       waits for :meth:`FaultyProvider.release`, then embeds
    ``slow``       embeds after ``seconds``
    ``short``      one vector too few
    ``long``       one vector too many
    ``nan``        one value of one vector is NaN
    ``infinity``   one value of one vector is infinite
    ``zeros``      one vector is all zero
    ``dimension``  every vector is one value short
    ``empty``      every vector has no values
    ``refuse``     raises :class:`~embedonce.errors.TextRefused` where ``refused`` is true of a text, with
                   the positions, or without them unless ``positions``
    =============  ==================================================================================

    When it strikes is said as for :class:`Fault`.
    """

    kind: ProviderKind
    calls: Container[int] | None = field(default=None, kw_only=True)
    probability: float = field(default=1.0, kw_only=True)
    error: Failure = field(default=RuntimeError, kw_only=True)
    seconds: float = field(default=0.0, kw_only=True)
    refused: Callable[[str], bool] = field(default=lambda text: True, kw_only=True)
    positions: bool = field(default=True, kw_only=True)


class Gate:
    """Where calls that hang wait; each waits for itself, so that one which is given up holds up no other."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._waiting: set[Future[None]] = set()

    def _after_fork(self) -> None:
        """Forget in a forked child the calls that hang in its parent: their threads, and locks they hold, are there."""
        if self._process != os.getpid():
            self._reset()

    @property
    def waiting(self) -> int:
        """How many calls hang now."""
        self._after_fork()
        return len(self._waiting)

    def wait(self, *, obey: bool = False) -> None:
        """Block until :meth:`release`.

        Raises:
            TierTimeout: ``obey``, and the deadline of the call has passed.
        """
        with self._ticket() as ticket:
            while True:
                left = time_left() if obey else None
                try:
                    return ticket.result(timeout=left)
                except TimeoutError:
                    continue

    async def await_(self) -> None:
        """Wait until :meth:`release`, cancellable."""
        with self._ticket() as ticket:
            await asyncio.wrap_future(ticket)

    def release(self) -> None:
        """Let everything go on that hangs now; what comes later hangs again."""
        self._after_fork()
        with self._changed:
            released, self._waiting = self._waiting, set()
            self._changed.notify_all()
        for ticket in released:
            if ticket.set_running_or_notify_cancel():
                ticket.set_result(None)

    def until(self, waiting: int = 1, timeout: float = 60.0) -> None:
        """Block until so many calls hang at once.

        Raises:
            TimeoutError: they do not within ``timeout`` seconds.
        """
        self._after_fork()
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._waiting) >= waiting, timeout):
                raise TimeoutError(f"{len(self._waiting)} calls hang after {timeout:g} s, {waiting} were waited for")

    @contextmanager
    def _ticket(self) -> Iterator[Future[None]]:
        self._after_fork()
        ticket: Future[None] = Future()
        with self._changed:
            self._waiting.add(ticket)
            self._changed.notify_all()
        try:
            yield ticket
        finally:
            with self._changed:
                self._waiting.discard(ticket)


class _Chooser:
    """Finds the fault that strikes a call. One lock: numbers and chances are the same in every run."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self._seen: dict[int, tuple[Fault | ProviderFault, int]] = {}

    def strikes(self, fault: Fault | ProviderFault) -> bool:
        """Count a call that ``fault`` is for, and say whether it strikes. Call with the lock held."""
        # By identity, since two equal faults each have a count; the fault is held so that no other gets its identity.
        number = self._seen.get(id(fault), (fault, 0))[1] + 1
        self._seen[id(fault)] = (fault, number)
        if fault.calls is not None and number not in fault.calls:
            return False
        return fault.probability >= 1.0 or self.random.random() < fault.probability


class FaultyBackend:
    """A backend whose calls go wrong as ``faults`` say, in order; every call is counted.

    ``capabilities`` override what the inner backend declares (``deadline=True`` for a hang that
    obeys). Wrap an in-process backend with ``blocking=True`` before letting it hang or be slow under
    the async face: what is not blocking runs on the event loop itself.

    ``faults`` is a list that a test may change while it runs; :meth:`heal` empties it.
    """

    def __init__(self, inner: Backend, faults: Iterable[Fault] = (), *, seed: int = 0, **capabilities: Any) -> None:
        self.inner: Any = inner
        self.faults = list(faults)
        self.calls: list[tuple[str, int]] = []
        """Operation and number of keys of each call, in the order in which they began."""
        self.gate = Gate()
        self._changes = capabilities
        self._chooser = _Chooser(seed)
        self._recent: deque[tuple[str, Any]] = deque(maxlen=RECENT)

    @property
    def capabilities(self) -> Capabilities:
        """The inner backend's, with what was overridden."""
        declared: Capabilities = self.inner.capabilities
        return replace(declared, **self._changes)

    def called(self, operation: Operation = "any") -> int:
        """Return how many calls of an operation began."""
        return sum(operation in ("any", name) for name, _ in self.calls)

    def release(self) -> None:
        """Let the calls go on that hang now."""
        self.gate.release()

    def heal(self) -> None:
        """Remove the faults, and let the calls go on that hang now."""
        self.faults.clear()
        self.gate.release()

    def get(self, key: str, /) -> Any:
        """Return one value, or None."""
        fault = self._before("get", 1)
        if fault is None:
            return self._saw({key: self.inner.get(key)})[key]
        return self._after_read(fault, [key], self._found([key])).get(key)

    def get_many(self, keys: Sequence[str], /) -> dict[str, Any]:
        """Return what the inner backend holds, damaged where a fault says so."""
        fault = self._before("get", len(keys))
        return self._after_read(fault, keys, self._found(keys))

    def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None:
        """Store the items, or some of them."""
        fault = self._before("set", len(items))
        kept, error = self._part(fault, items)
        self._saw(kept)
        self.inner.set_many(kept, ttl)
        if error is not None:
            raise error

    def add_many(self, items: Mapping[str, Any], ttl: float | None, /) -> set[str]:
        """Store the items whose key is absent, or some of them."""
        fault = self._before("add", len(items))
        kept, error = self._part(fault, items)
        added: set[str] = self.inner.add_many(kept, ttl)
        if error is not None:
            raise error
        return added

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys, or some of them."""
        fault = self._before("delete", len(keys))
        kept, error = self._part(fault, dict.fromkeys(keys))
        self.inner.delete_many(list(kept))
        if error is not None:
            raise error

    def scan(self, prefix: str, /) -> Iterator[str]:
        """Yield the keys that start with ``prefix``, or some of them."""
        fault = self._before("scan", 0)
        if fault is None or fault.kind != "partial":
            yield from self.inner.scan(prefix)
            return
        keys = list(self.inner.scan(prefix))
        yield from keys[: len(keys) // 2]
        raise _failure(fault.error)

    def count(self, prefix: str, /) -> int:
        """Return how many keys start with ``prefix``."""
        self._before("count", 0)
        number: int = self.inner.count(prefix)
        return number

    def twin(self) -> FaultyTwin:
        """Return an async client with the same faults."""
        return FaultyTwin(self, self.inner.twin())

    def close(self) -> None:
        """Close the inner backend, and let the calls go on that hang now."""
        self.gate.release()
        self.inner.close()

    def _before(self, operation: Operation, keys: int) -> Fault | None:
        """Count the call, do what a fault does before anything is asked, and return the fault."""
        fault = self._strike(operation, keys)
        if self.capabilities.deadline:
            time_left()
        if fault is not None:
            if fault.kind == "hang":
                self.gate.wait(obey=fault.obey)
            elif fault.kind == "slow":
                time.sleep(fault.seconds)
        return fault

    def _strike(self, operation: Operation, keys: int) -> Fault | None:
        with self._chooser.lock:
            self.calls.append((operation, keys))
            fault = next((f for f in self.faults if f.on in ("any", operation) and self._chooser.strikes(f)), None)
        if fault is not None and fault.kind in ("raise", "refuse"):
            raise _failure(ConnectionRefusedError if fault.kind == "refuse" else fault.error)
        return fault

    def _found(self, keys: Sequence[str]) -> dict[str, Any]:
        return self._saw(dict(self.inner.get_many(keys)))

    def _saw(self, items: Mapping[str, Any]) -> dict[str, Any]:
        """Remember some values, for answers with another key's."""
        last = [(key, value) for key, value in items.items() if value is not None][-RECENT:]
        with self._chooser.lock:
            self._recent.extend(last)
        return dict(items)

    def _after_read(self, fault: Fault | None, keys: Sequence[str], found: dict[str, Any]) -> dict[str, Any]:
        if fault is None:
            return found
        with self._chooser.lock:
            return self._damaged(fault, keys, found)

    def _damaged(self, fault: Fault, keys: Sequence[str], found: dict[str, Any]) -> dict[str, Any]:
        chance = self._chooser.random
        if fault.kind == "corrupt":
            return {key: _flipped(value, chance) for key, value in found.items()}
        if fault.kind == "truncate":
            return {key: _shortened(value) for key, value in found.items()}
        if fault.kind == "partial":
            left_out = set(chance.sample(list(found), (len(found) + 1) // 2))
            return {key: value for key, value in found.items() if key not in left_out}
        if fault.kind == "wrong_reply":
            return self._shifted(keys, found)
        if fault.kind == "unasked":
            return found | {key: value for key, value in self._others(keys)[:1]}
        if fault.kind == "none_for_miss":
            return {key: found.get(key) for key in keys}
        return found

    def _shifted(self, keys: Sequence[str], found: dict[str, Any]) -> dict[str, Any]:
        """Return the values one key further; where there is one value alone, one that another key had."""
        if len(found) > 1:
            values = list(found.values())
            return dict(zip(found, [values[-1], *values[:-1]], strict=True))
        others = self._others(keys)
        return dict.fromkeys(dict.fromkeys(keys), others[0][1]) if others else found

    def _others(self, keys: Sequence[str]) -> list[tuple[str, Any]]:
        asked = set(keys)
        return [(key, value) for key, value in reversed(self._recent) if key not in asked]

    def _part(self, fault: Fault | None, items: Mapping[str, Any]) -> tuple[Mapping[str, Any], BaseException | None]:
        """Return what of a write reaches the inner backend, and what is raised afterwards."""
        if fault is None or fault.kind != "partial":
            return items, None
        with self._chooser.lock:
            kept = self._chooser.random.sample(list(items), len(items) // 2)
        return {key: items[key] for key in kept}, _failure(fault.error)


class FaultyTwin:
    """The async client of a :class:`FaultyBackend`, with its faults and its counts.

    A read that is cancelled while it hangs leaves its reply in the connection: the next read is
    answered with it, by position, and every later one with the reply before, until the twin is closed.
    That is what a client does whose user forgot to drop the connection.
    """

    def __init__(self, backend: FaultyBackend, inner: Any) -> None:
        self.inner = inner
        self._backend = backend
        self._unread: list[Any] | None = None

    async def get_many(self, keys: Sequence[str], /) -> dict[str, Any]:
        """Return what the inner twin holds, damaged where a fault says so."""
        try:
            fault = await self._before("get", len(keys))
        except asyncio.CancelledError:
            self._unread = await self._reply(keys)
            raise
        if self._unread is not None:
            stale, self._unread = self._unread, await self._reply(keys)
            return {key: value for key, value in zip(keys, stale, strict=False) if value is not None}
        found = self._backend._saw(await self.inner.get_many(keys))
        return self._backend._after_read(fault, keys, found)

    async def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None:
        """Store the items, or some of them."""
        fault = await self._before("set", len(items))
        kept, error = self._backend._part(fault, items)
        self._backend._saw(kept)
        await self.inner.set_many(kept, ttl)
        if error is not None:
            raise error

    async def close(self) -> None:
        """Close the inner twin."""
        self._unread = None
        await self.inner.close()

    async def _before(self, operation: Operation, keys: int) -> Fault | None:
        fault = self._backend._strike(operation, keys)
        if fault is not None:
            if fault.kind == "hang":
                await self._backend.gate.await_()
            elif fault.kind == "slow":
                await asyncio.sleep(fault.seconds)
        return fault

    async def _reply(self, keys: Sequence[str]) -> list[Any]:
        found = await self.inner.get_many(keys)
        return [found.get(key) for key in keys]


class FaultyProvider:
    """A provider whose calls go wrong as ``faults`` say, in order; texts and calls are counted.

    It has ``embed``, ``aembed`` or both, as the inner provider has.
    """

    def __init__(self, inner: AnyProvider, faults: Iterable[ProviderFault] = (), *, seed: int = 0) -> None:
        self.inner: Any = inner
        self.faults = list(faults)
        self.count: Counter[str] = Counter()
        """How often each text was asked for, failed calls included."""
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        """Task and texts of each call, in the order in which they began."""
        self.most_at_once = 0
        """Most calls that were under way at one time."""
        self.gate = Gate()
        self._at_once = 0
        self._chooser = _Chooser(seed)
        if hasattr(inner, "embed"):
            self.embed = self._embed
        if hasattr(inner, "aembed"):
            self.aembed = self._aembed

    @property
    def limits(self) -> Limits:
        """The inner provider's."""
        limits: Limits = self.inner.limits
        return limits

    def space(self, task: Task, /) -> VectorSpace:
        """Describe the inner provider's space."""
        space: VectorSpace = self.inner.space(task)
        return space

    def release(self) -> None:
        """Let the calls go on that hang now."""
        self.gate.release()

    def heal(self) -> None:
        """Remove the faults, and let the calls go on that hang now."""
        self.faults.clear()
        self.gate.release()

    def close(self) -> None:
        """Close the inner provider, and let the calls go on that hang now."""
        self.gate.release()
        self.inner.close()

    def _embed(self, texts: Sequence[str], task: Task, /) -> Any:
        """Return the inner provider's vectors, damaged where a fault says so."""
        with self._under_way(texts, task):
            fault = self._strike(texts)
            if fault is not None and fault.kind == "hang":
                self.gate.wait()
            elif fault is not None and fault.kind == "slow":
                time.sleep(fault.seconds)
            return self._after(fault, self.inner.embed(texts, task))

    async def _aembed(self, texts: Sequence[str], task: Task, /) -> Any:
        """Return the inner provider's vectors, damaged where a fault says so."""
        with self._under_way(texts, task):
            fault = self._strike(texts)
            if fault is not None and fault.kind == "hang":
                await self.gate.await_()
            elif fault is not None and fault.kind == "slow":
                await asyncio.sleep(fault.seconds)
            return self._after(fault, await self.inner.aembed(texts, task))

    @contextmanager
    def _under_way(self, texts: Sequence[str], task: Task) -> Iterator[None]:
        with self._chooser.lock:
            self.count.update(texts)
            self.calls.append((task, tuple(texts)))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._chooser.lock:
                self._at_once -= 1

    def _strike(self, texts: Sequence[str]) -> ProviderFault | None:
        with self._chooser.lock:
            fault = next((f for f in self.faults if self._chooser.strikes(f)), None)
        if fault is None:
            return None
        if fault.kind == "raise":
            raise _failure(fault.error)
        if fault.kind == "refuse":
            positions = [position for position, text in enumerate(texts) if fault.refused(text)]
            if positions:
                raise TextRefused(f"{len(positions)} texts are refused", positions if fault.positions else ())
        return fault

    def _after(self, fault: ProviderFault | None, answer: Any) -> Any:
        if fault is None or fault.kind in ("hang", "slow", "refuse"):
            return answer
        tokens = answer.tokens if isinstance(answer, Embedded) else None
        vectors = np.array(answer.vectors if isinstance(answer, Embedded) else answer, dtype=np.float32)
        with self._chooser.lock:
            row = self._chooser.random.randrange(len(vectors))
        return Embedded(_damaged_rows(fault.kind, vectors, row), tokens)


def _failure(error: Failure) -> BaseException:
    """Return an exception of its own for one call: one that several threads raise gathers all their tracebacks."""
    return error("a fault on purpose") if isinstance(error, type) else copy.copy(error)


def _flipped(value: Any, chance: random.Random) -> Any:
    if isinstance(value, Entry):
        damaged = np.array(value.vector)
        if damaged.size:
            damaged[chance.randrange(damaged.size)] = np.nan
        return value._replace(vector=damaged)
    if not value:
        return value
    damaged_bytes = bytearray(value)
    damaged_bytes[chance.randrange(len(value))] ^= 1 << chance.randrange(8)
    return bytes(damaged_bytes)


def _shortened(value: Any) -> Any:
    if isinstance(value, Entry):
        return value._replace(vector=np.array(value.vector[:-1]))
    return value[: len(value) // 2]


def _damaged_rows(kind: ProviderKind, vectors: NDArray[np.float32], row: int) -> NDArray[np.float32]:
    if kind == "short":
        return vectors[:-1]
    if kind == "long":
        return np.concatenate([vectors, vectors[:1]])
    if kind == "dimension":
        return vectors[:, :-1]
    if kind == "empty":
        return vectors[:, :0]
    if kind == "zeros":
        vectors[row] = 0.0
    elif kind == "nan":
        vectors[row, 0] = np.nan
    elif kind == "infinity":
        vectors[row, 0] = np.inf
    return vectors
