"""The fast path of hits in the first tier, if this tier is in this process. It needs no coroutine and no ticket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from embedonce.answers import Fetched
from embedonce.contracts import Task
from embedonce.vectors import Columns, CostColumns, Dtype, Entry, Matrix, Work, matrix, sum_costs

from .call import copy_metadata
from .checks import are_as_stored
from .ledger import HotHits
from .routes import LiveProvider, Route
from .running import RunningChain
from .single_reads import can_read_singly

SOME_HITS, EVERY_HIT = 0xFF, 0
"""After each 256 hits of single texts, or after each one, the watchers of the counters are called. One of them records
savings if they are due, because a process with nothing but such hits must record its savings too. A mask is faster than
a remainder."""


class HotBatch(NamedTuple):
    """The entries of a batch that the first tier had as a whole."""

    route: Route
    rows: Columns
    """The fields of the texts' entries, one item per text."""
    costs: Sequence[CostColumns]
    """What it took to compute the entries. Equal texts count once."""
    seconds: float
    """Seconds spent in the tier."""


class HotPath:
    """Reads hits from the first tier. A call that is not a plain hit returns None, and takes the slow path.

    The cache inherits from this class, so that a hit needs fewer attribute lookups than with a separate object.
    """

    _chain: RunningChain
    _source: LiveProvider
    _dtype: Dtype
    _clock: Callable[[], float]
    _longest_life: float
    _routes: dict[tuple[LiveProvider, str], Route]
    _lock: threading.RLock
    _closed: bool
    _report_mask = SOME_HITS

    def find_in_memory(self, text: str, task: Task = "document") -> Entry | None:
        """Return the entry of a text if the first tier is in this process and has the text, else None.

        This is the fastest way to a hit, and it never waits, so an async program can call it before it awaits
        ``afetch``. A hit counts as in ``fetch``. None counts nothing, and says nothing about the other tiers. With
        listeners, the result is always None, because this method emits no events. The same holds while a session of
        tests records vectors.

        Raises:
            TextError: the text has a lone surrogate.
        """
        entry = self._read_hot_entry(text, task)
        if entry is None or entry.metadata is None:
            return entry
        return entry._replace(metadata=copy_metadata([entry.metadata])[0])

    def _read_hot_entry(self, text: str, task: Task) -> Entry | None:
        """Return the text's entry if the first tier is in this process and has a valid entry, else None.

        A hit must take less than a microsecond, so this method runs no coroutine, takes no lock and emits no event.
        """
        get, routes = self._hot
        if type(text) is not str or type(task) is not str or task not in routes:
            return None
        route, hits = routes[task]
        key = route.recent_keys.get(text)
        if key is None:
            key = route.key(text)
        try:
            entry = get(key)
            if entry is None:
                return None
            vector, _, expires, _, dtype, tokens, seconds = entry
            if dtype != self._dtype or vector.size != route.dimensions:
                return None
            if expires is not None and not 0 < expires - self._clock() <= self._longest_life:
                return None
        except Exception:  # noqa: BLE001  (the slow path counts the error, or raises CacheClosed)
            return None
        hits.texts += 1
        if tokens is None:
            hits.unknown_tokens += 1
        else:
            hits.tokens += tokens
        if seconds is None:
            hits.unknown_seconds += 1
        else:
            hits.seconds += seconds
        if not hits.texts & self._report_mask:
            self._chain.engine.requests.call_watchers()
        return entry

    def _read_hot_matrix(self, texts: Any, task: Task) -> Matrix | None:
        """Return the texts' vectors as a new matrix if the first tier has all of them, else None."""
        if type(texts) is list and len(texts) == 1:
            entry = self._read_hot_entry(texts[0], task)
            return None if entry is None else entry.vector.reshape(1, -1).copy()
        batch = self._read_hot_batch(texts, task)
        return None if batch is None else matrix(batch.rows.vectors)

    def _read_hot_fetched(self, texts: Any, task: Task) -> Fetched | None:
        """Return the result of a fetch if the first tier has all texts, else None."""
        if type(texts) is list and len(texts) == 1:
            return self._read_hot_fetched_text(texts[0], task)
        batch = self._read_hot_batch(texts, task)
        if batch is None:
            return None
        route, rows, costs, seconds = batch
        tier = self._chain.tiers[0].name
        return Fetched(
            rows=list(rows.vectors),
            sources=[tier] * len(rows.vectors),
            failed={},
            metadata=copy_metadata(rows.metadata),
            space=route.space,
            seconds={tier: seconds},
            errors={},
            dimensions=route.dimensions,
            saved=sum_costs(costs),
        )

    def _read_hot_fetched_text(self, text: Any, task: Task) -> Fetched | None:
        """Return the result of a fetch of one text if the first tier has it, else None."""
        routes = self._hot[1]
        if type(text) is not str or type(task) is not str or task not in routes:
            return None
        route = routes[task][0]
        if text not in route.recent_keys:  # it may be invalid
            return None
        start = time.perf_counter()
        entry = self._read_hot_entry(text, task)
        if entry is None:
            return None
        tier, tokens, seconds = self._chain.tiers[0].name, entry.tokens, entry.seconds
        return Fetched(
            rows=[entry.vector],
            sources=[tier],
            failed={},
            metadata=copy_metadata([entry.metadata]),
            space=route.space,
            seconds={tier: time.perf_counter() - start},
            errors={},
            dimensions=entry.vector.size,
            saved=Work(1, tokens or 0, seconds or 0.0, int(tokens is None), int(seconds is None)),
        )

    def _read_hot_batch(self, texts: Any, task: Task) -> HotBatch | None:
        """Return the entries of the texts if the first tier has all of them, else None.

        The tier is asked for the first text alone, so that a batch of new texts costs little here.
        """
        get, routes = self._hot
        if type(texts) not in (list, tuple) or not texts or type(task) is not str or task not in routes:
            return None
        texts = list(texts)  # the caller may change the list during the call
        if set(map(type, texts)) != {str}:
            return None
        route = routes[task][0]
        keys: list[Any] = list(map(route.recent_keys.get, texts))
        if not all(keys):
            return None
        start = time.perf_counter()
        try:
            if get(keys[0]) is None:
                return None
            distinct = list(dict.fromkeys(keys))
            found: Mapping[str, Entry] = self._chain.tiers[0].backend.get_many(distinct)
            if type(found) is not dict or list(found) != distinct or set(map(type, found.values())) != {Entry}:
                return None
            columns = Columns.of(found.values())
            if not are_as_stored(columns, self._clock(), self._dtype, route.dimensions, self._longest_life):
                return None
        except Exception:  # noqa: BLE001  (the slow path counts the error, or raises CacheClosed)
            return None
        seconds = time.perf_counter() - start
        costs = [CostColumns(len(distinct), columns.tokens, columns.seconds)]
        self._count_hot_batch(route, costs, seconds)
        rows = columns if len(distinct) == len(keys) else Columns.of(list(map(found.__getitem__, keys)))
        return HotBatch(route, rows, costs, seconds)

    def _count_hot_batch(self, route: Route, costs: Sequence[CostColumns], seconds: float) -> None:
        """Count the hits of a batch, as the slow path does. Equal texts count once."""
        chain, count = self._chain, costs[0].texts
        tier = chain.tiers[0]
        tier.counters.count_read(0, seconds)
        chain.ledger.count_saved(route.keyer.scope, route.source.price, tier.name, costs)
        chain.engine.requests.count(count, count)

    def _find_hot_tier(self) -> tuple[Callable[[str], Entry | None], dict[str, tuple[Route, HotHits]]]:
        """Return, for the fast path, the ``get`` of the first tier, and the route and the hit counts of each task.

        If the first tier is not in this process, return no routes. Every call then takes the slow path. If there are
        listeners, or if a governor records the answers, do the same, because the fast path tells them nothing.
        """
        chain = self._chain
        if chain.tiers and not (chain.listeners or chain.is_recorded or self._closed):
            first = chain.tiers[0]
            caps = first.capabilities
            is_ours = caps.scope == "process" and not caps.read_only  # so its entries need no check
            if is_ours and caps.holds == "entries" and caps.get and not caps.blocking:
                with self._lock:
                    routes = {task: route for (source, task), route in self._routes.items() if source is self._source}
                hits = {
                    task: chain.ledger.get_hot_hits(route.keyer.scope, route.source.price)
                    for task, route in routes.items()
                }
                return first.backend.get, {task: (route, hits[task]) for task, route in routes.items()}
        return (lambda key: None), {}

    def _refresh_hot_path(self) -> None:
        self._report_mask = EVERY_HIT if self._chain.write_listeners else SOME_HITS
        self._hot = self._find_hot_tier()
        is_plain = not (self._chain.listeners or self._chain.is_recorded or self._closed)
        self._reads_singly = is_plain and can_read_singly(self._chain.engine)
