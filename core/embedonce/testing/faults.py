"""Fault injection: wrappers that make a backend or a provider fail in the ways in which real services fail.

A :class:`Fault` defines which calls fail and how. All other calls reach the wrapped object unchanged::

    backend = FaultyBackend(DictBackend(), [Fault("refuse", on="get", calls=[1, 2])])
    backend = FaultyBackend(DictBackend(), [Fault("corrupt", probability=0.1)], seed=7)

This module requires only numpy.
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

from embedonce.contracts import AnyProvider, Backend, Capabilities, Embedded, Limits, Task, time_left
from embedonce.errors import TextRefused
from embedonce.keys import VectorSpace
from embedonce.vectors import Entry, Matrix

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

RECENT_VALUES = 16
"""Number of recent values that a faulty backend keeps, to return them under other keys."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One way in which calls of a backend fail.

    =================  ==============================================================================
    ``raise``          raises ``error``
    ``refuse``         raises :class:`ConnectionRefusedError`, like a server that is down
    ``hang``           waits for :meth:`FaultyBackend.release`, then makes the call. The call ignores its
                       deadline; with ``obey``, it raises at the deadline
    ``slow``           makes the call after ``seconds``
    ``corrupt``        reads: one bit of each frame is flipped, or one value of each entry's vector is NaN
    ``truncate``       reads: half of each frame is missing, or each entry's vector is one value short
    ``partial``        reads leave out some keys; writes, deletions and scans handle only some keys,
                       and then raise ``error``
    ``wrong_reply``    reads: each value is returned under the next key, like replies in the wrong order
    ``unasked``        reads: a key that was not requested is also returned
    ``none_for_miss``  reads: a missing key is returned as None instead of being absent
    =================  ==============================================================================

    A fault applies to calls of the operation ``on``. These calls are numbered from 1. If ``calls`` is given, the
    fault applies only to the calls with these numbers. ``probability`` is the chance that the fault applies to
    such a call. If several faults apply to a call, only the first fault happens. A kind marked *reads* affects
    only reads.
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
    """One way in which calls of a provider fail.

    =============  ==================================================================================
    ``raise``      raises ``error`` instead of embedding
    ``hang``       waits for :meth:`FaultyProvider.release`, then embeds
    ``slow``       embeds after ``seconds``
    ``short``      the result has one vector too few
    ``long``       the result has one vector too many
    ``nan``        one value of one vector is NaN
    ``infinity``   one value of one vector is infinite
    ``zeros``      one vector has only zeros
    ``dimension``  every vector is one value short
    ``empty``      every vector has no values
    ``refuse``     raises :class:`~embedonce.errors.TextRefused` if ``refused`` returns True for a text of
                   the call; the error has the positions of all such texts, unless ``positions`` is False
    =============  ==================================================================================

    ``calls`` and ``probability`` work as in :class:`Fault`.
    """

    kind: ProviderKind
    calls: Container[int] | None = field(default=None, kw_only=True)
    probability: float = field(default=1.0, kw_only=True)
    error: Failure = field(default=RuntimeError, kw_only=True)
    seconds: float = field(default=0.0, kw_only=True)
    refused: Callable[[str], bool] = field(default=lambda text: True, kw_only=True)
    positions: bool = field(default=True, kw_only=True)


class Gate:
    """Blocks the calls that hang. Each call waits separately, so that an abandoned call does not block other calls."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._waiting: set[Future[None]] = set()

    def _clear_after_fork(self) -> None:
        """In a forked child, forget the parent's hanging calls, because the child does not have their threads."""
        if self._process != os.getpid():
            self._clear()

    @property
    def waiting(self) -> int:
        """Number of calls that hang now."""
        self._clear_after_fork()
        return len(self._waiting)

    def wait(self, *, obey: bool = False) -> None:
        """Block until :meth:`release`.

        Raises:
            TierTimeout: ``obey`` is True, and the deadline of the call has passed.
        """
        with self._join_waiting() as ticket:
            while True:
                left = time_left() if obey else None
                try:
                    return ticket.result(timeout=left)
                except TimeoutError:
                    continue

    async def wait_async(self) -> None:
        """Wait until :meth:`release`; the wait can be cancelled."""
        with self._join_waiting() as ticket:
            await asyncio.wrap_future(ticket)

    def release(self) -> None:
        """Let every hanging call continue; later calls hang again."""
        self._clear_after_fork()
        with self._changed:
            released, self._waiting = self._waiting, set()
            self._changed.notify_all()
        for ticket in released:
            if ticket.set_running_or_notify_cancel():
                ticket.set_result(None)

    def until(self, waiting: int = 1, timeout: float = 60.0) -> None:
        """Block until ``waiting`` calls hang at the same time.

        Raises:
            TimeoutError: fewer calls hang after ``timeout`` seconds.
        """
        self._clear_after_fork()
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._waiting) >= waiting, timeout):
                raise TimeoutError(f"expected {waiting} hanging calls within {timeout:g} s, got {len(self._waiting)}")

    @contextmanager
    def _join_waiting(self) -> Iterator[Future[None]]:
        self._clear_after_fork()
        ticket: Future[None] = Future()
        with self._changed:
            self._waiting.add(ticket)
            self._changed.notify_all()
        try:
            yield ticket
        finally:
            with self._changed:
                self._waiting.discard(ticket)


class _FaultChooser:
    """Chooses the fault of each call. One lock protects both the call numbers and the random generator."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self._seen: dict[int, tuple[Fault | ProviderFault, int]] = {}

    def applies(self, fault: Fault | ProviderFault) -> bool:
        """Count a call of the fault's operation, and return whether the fault applies. The caller holds the lock."""
        # The key is id(fault), because equal faults are counted separately. While the dict holds the fault, no other
        # object can get the same id().
        number = self._seen.get(id(fault), (fault, 0))[1] + 1
        self._seen[id(fault)] = (fault, number)
        if fault.calls is not None and number not in fault.calls:
            return False
        return fault.probability >= 1.0 or self.random.random() < fault.probability


class FaultyBackend:
    """Wraps a backend, records every call, and applies the first of ``faults`` that matches the call.

    ``capabilities`` override what the inner backend declares. Set ``deadline=True`` if hanging calls obey the deadline.
    Set ``blocking=True`` if async code uses an in-process backend with a ``hang`` or ``slow`` fault. Otherwise the
    cache calls the backend directly on the event loop, and a slow call blocks the whole loop.

    A test may change the list ``faults`` at any time; :meth:`heal` empties the list.
    """

    def __init__(self, inner: Backend, faults: Iterable[Fault] = (), *, seed: int = 0, **capabilities: Any) -> None:
        self.inner: Any = inner
        self.faults = list(faults)
        self.calls: list[tuple[str, int]] = []
        """Operation and number of keys of each call, in the order in which the calls started."""
        self.gate = Gate()
        self._changes = capabilities
        self._chooser = _FaultChooser(seed)
        self._recent: deque[tuple[str, Any]] = deque(maxlen=RECENT_VALUES)

    @property
    def capabilities(self) -> Capabilities:
        """Capabilities of the inner backend, with the overrides."""
        declared: Capabilities = self.inner.capabilities
        return replace(declared, **self._changes)

    def called(self, operation: Operation = "any") -> int:
        """Return the number of calls of an operation."""
        return sum(operation in ("any", name) for name, _ in self.calls)

    def release(self) -> None:
        """Let the hanging calls continue."""
        self.gate.release()

    def heal(self) -> None:
        """Remove the faults, and let the hanging calls continue."""
        self.faults.clear()
        self.gate.release()

    def get(self, key: str, /) -> Any:
        """Return one value, or None."""
        fault = self._start_call("get", 1)
        if fault is None:
            return self._remember({key: self.inner.get(key)})[key]
        return self._damage_read(fault, [key], self._read_inner([key])).get(key)

    def get_many(self, keys: Sequence[str], /) -> dict[str, Any]:
        """Return what the inner backend holds, damaged by a fault if one applies."""
        fault = self._start_call("get", len(keys))
        return self._damage_read(fault, keys, self._read_inner(keys))

    def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None:
        """Store the items, or only some of them if a fault applies."""
        fault = self._start_call("set", len(items))
        kept, error = self._split_write(fault, items)
        self._remember(kept)
        self.inner.set_many(kept, ttl)
        if error is not None:
            raise error

    def add_many(self, items: Mapping[str, Any], ttl: float | None, /) -> set[str]:
        """Store the items whose keys are absent, or only some of them if a fault applies."""
        fault = self._start_call("add", len(items))
        kept, error = self._split_write(fault, items)
        added: set[str] = self.inner.add_many(kept, ttl)
        if error is not None:
            raise error
        return added

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys, or only some of them if a fault applies."""
        fault = self._start_call("delete", len(keys))
        kept, error = self._split_write(fault, dict.fromkeys(keys))
        self.inner.delete_many(list(kept))
        if error is not None:
            raise error

    def scan(self, prefix: str, /) -> Iterator[str]:
        """Yield the keys that start with ``prefix``, or only some of them if a fault applies."""
        fault = self._start_call("scan", 0)
        if fault is None or fault.kind != "partial":
            yield from self.inner.scan(prefix)
            return
        keys = list(self.inner.scan(prefix))
        yield from keys[: len(keys) // 2]
        raise _make_error(fault.error)

    def count(self, prefix: str, /) -> int:
        """Return how many keys start with ``prefix``."""
        self._start_call("count", 0)
        number: int = self.inner.count(prefix)
        return number

    def twin(self) -> FaultyTwin:
        """Return an async client with the same faults."""
        return FaultyTwin(self, self.inner.twin())

    def close(self) -> None:
        """Close the inner backend, and let the hanging calls continue."""
        self.gate.release()
        self.inner.close()

    def _start_call(self, operation: Operation, keys: int) -> Fault | None:
        """Record the call and choose its fault. A fault that raises or waits before the inner call does so here."""
        fault = self._choose_fault(operation, keys)
        if self.capabilities.deadline:
            time_left()
        if fault is not None:
            if fault.kind == "hang":
                self.gate.wait(obey=fault.obey)
            elif fault.kind == "slow":
                time.sleep(fault.seconds)
        return fault

    def _choose_fault(self, operation: Operation, keys: int) -> Fault | None:
        with self._chooser.lock:
            self.calls.append((operation, keys))
            fault = next((f for f in self.faults if f.on in ("any", operation) and self._chooser.applies(f)), None)
        if fault is not None and fault.kind in ("raise", "refuse"):
            raise _make_error(ConnectionRefusedError if fault.kind == "refuse" else fault.error)
        return fault

    def _read_inner(self, keys: Sequence[str]) -> dict[str, Any]:
        return self._remember(dict(self.inner.get_many(keys)))

    def _remember(self, items: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the last values of ``items``, to return them under other keys later."""
        last = [(key, value) for key, value in items.items() if value is not None][-RECENT_VALUES:]
        with self._chooser.lock:
            self._recent.extend(last)
        return dict(items)

    def _damage_read(self, fault: Fault | None, keys: Sequence[str], found: dict[str, Any]) -> dict[str, Any]:
        if fault is None:
            return found
        with self._chooser.lock:
            return self._apply_damage(fault, keys, found)

    def _apply_damage(self, fault: Fault, keys: Sequence[str], found: dict[str, Any]) -> dict[str, Any]:
        chance = self._chooser.random
        if fault.kind == "corrupt":
            return {key: _corrupt_value(value, chance) for key, value in found.items()}
        if fault.kind == "truncate":
            return {key: _truncate_value(value) for key, value in found.items()}
        if fault.kind == "partial":
            left_out = set(chance.sample(list(found), (len(found) + 1) // 2))
            return {key: value for key, value in found.items() if key not in left_out}
        if fault.kind == "wrong_reply":
            return self._shift_values(keys, found)
        if fault.kind == "unasked":
            return found | {key: value for key, value in self._get_other_values(keys)[:1]}
        if fault.kind == "none_for_miss":
            return {key: found.get(key) for key in keys}
        return found

    def _shift_values(self, keys: Sequence[str], found: dict[str, Any]) -> dict[str, Any]:
        """Return each value under the next key. If at most one value was found, use a recent value of another key."""
        if len(found) > 1:
            values = list(found.values())
            return dict(zip(found, [values[-1], *values[:-1]], strict=True))
        others = self._get_other_values(keys)
        return dict.fromkeys(dict.fromkeys(keys), others[0][1]) if others else found

    def _get_other_values(self, keys: Sequence[str]) -> list[tuple[str, Any]]:
        asked = set(keys)
        return [(key, value) for key, value in reversed(self._recent) if key not in asked]

    def _split_write(
        self, fault: Fault | None, items: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], BaseException | None]:
        """Return the part of a write that reaches the inner backend, and the error to raise afterwards."""
        if fault is None or fault.kind != "partial":
            return items, None
        with self._chooser.lock:
            kept = self._chooser.random.sample(list(items), len(items) // 2)
        return {key: items[key] for key in kept}, _make_error(fault.error)


class FaultyTwin:
    """The async client of a :class:`FaultyBackend`, with the same faults and counts.

    If a hanging read is cancelled, the reply to this read stays unread. The next read gets that reply instead of its
    own reply, and assigns the values to its keys by position. From then on, every read gets the reply to the previous
    read, until the twin is closed. A real client behaves like this if it reuses the connection of a cancelled call.
    """

    def __init__(self, backend: FaultyBackend, inner: Any) -> None:
        self.inner = inner
        self._backend = backend
        self._unread: list[Any] | None = None

    async def get_many(self, keys: Sequence[str], /) -> dict[str, Any]:
        """Return what the inner twin holds, damaged by a fault if one applies."""
        try:
            fault = await self._start_call("get", len(keys))
        except asyncio.CancelledError:
            self._unread = await self._read_reply(keys)
            raise
        if self._unread is not None:
            stale, self._unread = self._unread, await self._read_reply(keys)
            return {key: value for key, value in zip(keys, stale, strict=False) if value is not None}
        found = self._backend._remember(await self.inner.get_many(keys))
        return self._backend._damage_read(fault, keys, found)

    async def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None:
        """Store the items, or only some of them if a fault applies."""
        fault = await self._start_call("set", len(items))
        kept, error = self._backend._split_write(fault, items)
        self._backend._remember(kept)
        await self.inner.set_many(kept, ttl)
        if error is not None:
            raise error

    async def close(self) -> None:
        """Close the inner twin."""
        self._unread = None
        await self.inner.close()

    async def _start_call(self, operation: Operation, keys: int) -> Fault | None:
        fault = self._backend._choose_fault(operation, keys)
        if fault is not None:
            if fault.kind == "hang":
                await self._backend.gate.wait_async()
            elif fault.kind == "slow":
                await asyncio.sleep(fault.seconds)
        return fault

    async def _read_reply(self, keys: Sequence[str]) -> list[Any]:
        found = await self.inner.get_many(keys)
        return [found.get(key) for key in keys]


class FaultyProvider:
    """Wraps a provider, counts texts and calls, and applies the first of ``faults`` that matches the call.

    This provider has ``embed``, ``aembed`` or both, like the inner provider.
    """

    def __init__(self, inner: AnyProvider, faults: Iterable[ProviderFault] = (), *, seed: int = 0) -> None:
        self.inner: Any = inner
        self.faults = list(faults)
        self.count: Counter[str] = Counter()
        """Number of times that each text was requested, including requests in failed calls."""
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        """Task and texts of each call, in the order in which the calls started."""
        self.most_at_once = 0
        """Maximum number of calls that were in flight at the same time."""
        self.gate = Gate()
        self._at_once = 0
        self._chooser = _FaultChooser(seed)
        if hasattr(inner, "embed"):
            self.embed = self._embed
        if hasattr(inner, "aembed"):
            self.aembed = self._aembed

    @property
    def limits(self) -> Limits:
        """Limits of the inner provider."""
        limits: Limits = self.inner.limits
        return limits

    def space(self, task: Task, /) -> VectorSpace:
        """Return the space of the inner provider."""
        space: VectorSpace = self.inner.space(task)
        return space

    def release(self) -> None:
        """Let the hanging calls continue."""
        self.gate.release()

    def heal(self) -> None:
        """Remove the faults, and let the hanging calls continue."""
        self.faults.clear()
        self.gate.release()

    def close(self) -> None:
        """Close the inner provider, and let the hanging calls continue."""
        self.gate.release()
        self.inner.close()

    def _embed(self, texts: Sequence[str], task: Task, /) -> Any:
        """Return the vectors of the inner provider, damaged by a fault if one applies."""
        with self._count_call(texts, task):
            fault = self._choose_fault(texts)
            if fault is not None and fault.kind == "hang":
                self.gate.wait()
            elif fault is not None and fault.kind == "slow":
                time.sleep(fault.seconds)
            return self._damage_answer(fault, self.inner.embed(texts, task))

    async def _aembed(self, texts: Sequence[str], task: Task, /) -> Any:
        """Return the vectors of the inner provider, damaged by a fault if one applies."""
        with self._count_call(texts, task):
            fault = self._choose_fault(texts)
            if fault is not None and fault.kind == "hang":
                await self.gate.wait_async()
            elif fault is not None and fault.kind == "slow":
                await asyncio.sleep(fault.seconds)
            return self._damage_answer(fault, await self.inner.aembed(texts, task))

    @contextmanager
    def _count_call(self, texts: Sequence[str], task: Task) -> Iterator[None]:
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

    def _choose_fault(self, texts: Sequence[str]) -> ProviderFault | None:
        with self._chooser.lock:
            fault = next((f for f in self.faults if self._chooser.applies(f)), None)
        if fault is None:
            return None
        if fault.kind == "raise":
            raise _make_error(fault.error)
        if fault.kind == "refuse":
            positions = [position for position, text in enumerate(texts) if fault.refused(text)]
            if positions:
                raise TextRefused(f"number of refused texts: {len(positions)}", positions if fault.positions else ())
        return fault

    def _damage_answer(self, fault: ProviderFault | None, answer: Any) -> Any:
        if fault is None or fault.kind in ("hang", "slow", "refuse"):
            return answer
        tokens = answer.tokens if isinstance(answer, Embedded) else None
        vectors = np.array(answer.vectors if isinstance(answer, Embedded) else answer, dtype=np.float32)
        with self._chooser.lock:
            row = self._chooser.random.randrange(len(vectors))
        return Embedded(_damage_vectors(fault.kind, vectors, row), tokens)


def _make_error(error: Failure) -> BaseException:
    """Return a new exception for each call, because a shared exception would mix the tracebacks of several threads."""
    return error("an injected fault") if isinstance(error, type) else copy.copy(error)


def _corrupt_value(value: Any, chance: random.Random) -> Any:
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


def _truncate_value(value: Any) -> Any:
    if isinstance(value, Entry):
        return value._replace(vector=np.array(value.vector[:-1]))
    return value[: len(value) // 2]


def _damage_vectors(kind: ProviderKind, vectors: Matrix, row: int) -> Matrix:
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
