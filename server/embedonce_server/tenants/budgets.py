"""Tokens per day of each tenant: what a tenant's misses may cost on one UTC day, over all workers of a host.

Hits cost nothing, so they are answered even if the budget is used up, or if the file of the budgets cannot be used.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from embedonce import Cache, Fetched
from embedonce.config import Tenant
from embedonce.contracts import Task
from embedonce.errors import DriftError
from embedonce.provider_errors import read_status
from embedonce_server.api.api_errors import ApiError

from .budget_file import DAY_SECONDS, BudgetFile, Load, Outcome, Reservation, Settlement, Usage
from .fetched_parts import Part, combine, fail_rest
from .text_loads import add_loads, count_texts_of_call, measure_texts

T = TypeVar("T")

log = logging.getLogger("embedonce.serve")

MAX_WAIT = 30.0
"""Maximum number of seconds that a request waits for calls under way that may use up the budget."""
FIRST_PAUSE, MAX_PAUSE = 0.01, 0.2
"""Seconds between two looks at the file while a request waits."""
RETRY_SOON = 5.0
"""Seconds after which a refused request is to be repeated, if only calls under way hold the rest of the budget."""
_STATUSES_OF_TEXTS = frozenset({400, 413, 422, 500})
"""Statuses that one of the texts may have caused."""
LOG_SECONDS = 60.0
"""Minimum number of seconds between two log lines about a file that cannot be used."""


class BudgetExceeded(ApiError):
    """The tenant's tokens of this day are used up, or are held for calls under way."""

    def __init__(self, tenant: str, retry_after: float, *, is_final: bool, limit: int, left: int = 0) -> None:
        hint = "cached texts are still answered"
        if not limit:
            what, hint = f"tenant {tenant!r} may use only cached texts (tokens_per_day = 0)", "ask for such texts"
        elif is_final:
            what = f"tenant {tenant!r} has {left:,} tokens left today (UTC), fewer than this request needs"
        else:
            what = f"current requests may need the tokens that tenant {tenant!r} has left today (UTC)"
        # OpenAI's clients repeat a request with status 429, unless this header says that it is of no use.
        headers = {"x-should-retry": "false"} if is_final else None
        super().__init__(
            429,
            f"{what}; {hint}",
            kind="rate_limit_error",
            code="tokens_per_day_exceeded",
            retry_after=retry_after,
            headers=headers,
        )
        self.tenant = tenant
        self.retry_after = retry_after


class BudgetsUnavailable(ApiError):
    """The file of the budgets cannot be used, so no misses of tenants with a budget are computed."""

    def __init__(self) -> None:
        message = (
            "the file with the budgets of the tenants cannot be used, so nothing is computed for this tenant; "
            "texts that are in the cache are still answered"
        )
        super().__init__(503, message, kind="server_error", code="budgets_unavailable", retry_after=RETRY_SOON)


class Budgets:
    """The budgets of all tenants, for one worker. All methods except the constructor belong to one event loop.

    If the file cannot be opened, a log line says so, and the file is tried again with each use.

    Args:
        path: SQLite file that the workers of a host share. It must be on a local file system.
        worker: number of this worker, from 1.
        clock: function that returns Unix time in seconds, for tests.
    """

    def __init__(self, path: Path, worker: int, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._file = BudgetFile(path, worker, clock)
        # One thread, because SQLite may wait for other processes, and because a connection is used by one thread.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embedonce-budgets")
        self._turns: dict[str, _Turn] = {}
        self._running: set[asyncio.Task[Any]] = set()
        self._logged_at = -math.inf
        self._is_closed = False
        try:
            self._thread.submit(self._file.open).result()
        except (sqlite3.Error, OSError) as error:
            self._log_failure(error)

    # --- for the endpoints --------------------------------------------------------------------

    async def recover(self, worker: int) -> None:
        """Count what a dead worker has reserved as used. A worker that starts does this for its own number."""
        await self._call(lambda: self._file.recover(worker))

    async def read_usage(self, tenants: Sequence[Tenant]) -> Mapping[str, Usage]:
        """Return the usage of the current day (UTC), by the names of the tenants that have a budget.

        Raises:
            BudgetsUnavailable: the file cannot be used.
        """
        return await self._call(lambda: self._file.read_usage(tenants))

    async def drain(self) -> None:
        """Wait until no request computes anything, including those whose clients have gone."""
        while self._running:
            await asyncio.wait(self._running)

    def close(self) -> None:
        """Close the file. What is still reserved counts as used after the next start. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._thread.submit(self._file.close).result()
        except (sqlite3.Error, OSError) as error:
            self._log_failure(error)
        self._thread.shutdown()

    # --- for fetch_within_budget --------------------------------------------------------------

    def get_turn(self, tenant: str) -> _Turn:
        """Return the turns of a tenant in this worker."""
        return self._turns.setdefault(tenant, _Turn())

    def start(self, job: _Job) -> asyncio.Task[Fetched]:
        """Start to compute in a task of its own, which goes on if the request is cancelled."""
        task = asyncio.create_task(job.run())
        self._running.add(task)
        task.add_done_callback(self._end)
        return task

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # if the client has gone, nobody else asks for it

    def compute_seconds_left(self) -> float:
        """Return the seconds until the next UTC day begins."""
        return DAY_SECONDS - self._clock() % DAY_SECONDS

    async def reserve(self, tenant: Tenant, model: str, whole: Load, part: Load, *, has_turn: bool) -> Outcome:
        """Reserve tokens for all texts, or for the first part of them.

        Raises:
            BudgetsUnavailable: the file cannot be used.
        """
        limit = tenant.tokens_per_day or 0
        return await self._call(lambda: self._file.reserve(tenant.name, limit, model, whole, part, has_turn=has_turn))

    async def settle(self, settlement: Settlement) -> None:
        """Count what was charged. If the file cannot be used, this is done with its next use."""
        with suppress(BudgetsUnavailable):  # it is logged, and the answer is paid for
            await self._call(lambda: self._file.settle(settlement))

    async def _call(self, call: Callable[[], T]) -> T:
        if self._is_closed:
            raise BudgetsUnavailable
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except (sqlite3.Error, OSError) as error:
            self._log_failure(error)
            raise BudgetsUnavailable from None

    def _log_failure(self, error: Exception) -> None:
        now = time.monotonic()
        if now >= self._logged_at + LOG_SECONDS:
            self._logged_at = now
            log.error(
                "%s: the budgets of the tenants cannot be used (%s: %s); misses of tenants with tokens_per_day are "
                "answered with status 503 until the file can be used again. Check its permissions, the free space of "
                "the disk, and that no other program locks it. If it is damaged, delete it with its -wal and -shm",
                os.fspath(self._path),
                type(error).__name__,
                error,
            )

    def __repr__(self) -> str:
        return f"<Budgets {len(self._running)} requests compute>"


class _Turn:
    """The requests of one tenant in one worker that are near the end of the budget. One of them has its turn."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.is_waiting = False
        """Whether the request that has its turn waits for calls under way. New requests then queue up behind it."""


async def fetch_within_budget(
    budgets: Budgets,
    tenant: Tenant,
    cache: Cache,
    texts: Sequence[str],
    task: Task,
    *,
    store: bool = True,
    fresh: bool = False,
) -> Fetched:
    """Return what ``cache.afetch`` returns. Compute missing texts only within the tenant's tokens of this day.

    If the budget is used up in the middle of a long request, the texts that are computed until then are stored, so that
    the next request does not pay for them again.

    Raises:
        BudgetExceeded: the missing texts do not fit into the rest of the budget.
        BudgetsUnavailable: texts are missing, and the file of the budgets cannot be used.
    """
    found = None if fresh else await cache.alookup(texts, task)
    if found is None:
        missing: Sequence[int] = range(len(texts))
    else:
        missing = [i for i, row in enumerate(found.rows) if row is None and i not in found.failed]
        if not missing:
            return found
    job = _Job(budgets, tenant, cache, texts, task, missing, found, store=store, fresh=fresh)
    running = budgets.start(job)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        job.abandon(running)
        raise


class _Job:
    """Computes the missing texts of one request, in as few parts as the budget allows."""

    def __init__(
        self,
        budgets: Budgets,
        tenant: Tenant,
        cache: Cache,
        texts: Sequence[str],
        task: Task,
        missing: Sequence[int],
        found: Fetched | None,
        *,
        store: bool,
        fresh: bool,
    ) -> None:
        self._budgets = budgets
        self._tenant = tenant
        self._cache = cache
        self._texts = texts
        self._task = task
        self._missing = missing
        self._found = found
        self._store = store
        self._fresh = fresh
        space = cache.provider.space(task)
        self._model = " ".join(filter(None, (space.provider, space.model, space.endpoint)))
        self._turn = budgets.get_turn(tenant.name)
        self._is_abandoned = False
        self._is_reserving = False
        """Whether tokens are reserved, or may be reserved at any moment."""

    def abandon(self, running: asyncio.Task[Fetched]) -> None:
        """End the job, because its client has gone. A call for which tokens are reserved goes on, and is settled."""
        self._is_abandoned = True
        if not self._is_reserving:
            running.cancel()

    async def run(self) -> Fetched:
        """Return the answer to the request.

        Raises:
            BudgetExceeded: the missing texts do not fit into the rest of the budget.
            BudgetsUnavailable: the file of the budgets cannot be used.
        """
        places: dict[str, list[int]] = {}
        for i in self._missing:
            places.setdefault(self._texts[i], []).append(i)
        texts = list(places)
        loads = await measure_texts(self._cache, texts, self._task)
        parts: list[Part] = []
        while texts:
            fetched = await self._fetch_next(texts, loads)
            count = len(fetched.rows)
            parts.append(Part(texts[:count], fetched))
            texts, loads = texts[count:], loads[count:]
            if texts and len(fetched.failed) == count and all(map(_is_about_all_texts, fetched.failed.values())):
                # The other texts are not sent. The cache does the same within one call.
                parts.append(fail_rest(texts, fetched))
                break
        answer = combine(len(self._texts), self._found, parts, places)
        return await self._fetch_in_one_space(parts) if answer is None else answer

    async def _fetch_next(self, texts: Sequence[str], loads: Sequence[Load]) -> Fetched:
        """Fetch all texts if the upper bound of their tokens is known and fits. Else fetch those of the first call."""
        end = count_texts_of_call(self._cache.provider, texts)
        whole, part = add_loads(loads), add_loads(loads[:end])
        if not self._turn.is_waiting:
            reservation = await self._reserve(whole, part, has_turn=False)
            if reservation is not None:
                return await self._compute(reservation, texts if reservation.is_whole else texts[:end])
        deadline = asyncio.get_running_loop().time() + MAX_WAIT
        try:
            async with asyncio.timeout_at(deadline):
                await self._turn.lock.acquire()
        except TimeoutError:
            raise self._refuse_for_now() from None
        try:
            reservation = await self._wait_for_tokens(whole, part, deadline)
            texts = texts if reservation.is_whole else texts[:end]
            if not reservation.is_free:
                return await self._compute(reservation, texts)
        finally:
            self._turn.lock.release()
        return await self._compute(reservation, texts)

    async def _wait_for_tokens(self, whole: Load, part: Load, deadline: float) -> Reservation:
        """Reserve tokens in turn. If calls under way may need them, wait until these calls have been settled.

        Raises:
            BudgetExceeded: the tokens do not fit, or the calls under way take too long.
        """
        pause = FIRST_PAUSE
        try:
            while (reservation := await self._reserve(whole, part, has_turn=True)) is None:
                if asyncio.get_running_loop().time() >= deadline:
                    raise self._refuse_for_now()
                self._turn.is_waiting = True
                # Other workers may have to end their calls first, and they send no message.
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE)
        finally:
            self._turn.is_waiting = False
        return reservation

    async def _reserve(self, whole: Load, part: Load, *, has_turn: bool) -> Reservation | None:
        """Reserve tokens for all texts, or for the first part. Return None if calls under way must end first.

        Raises:
            BudgetExceeded: the tokens of the first part do not fit today.
            BudgetsUnavailable: the file cannot be used.
        """
        self._is_reserving = True
        outcome: Outcome = "wait"
        try:
            outcome = await self._budgets.reserve(self._tenant, self._model, whole, part, has_turn=has_turn)
        finally:
            self._is_reserving = isinstance(outcome, Reservation)
        if self._is_abandoned:
            if isinstance(outcome, Reservation):
                await self._budgets.settle(Settlement(outcome, 0))
            raise asyncio.CancelledError
        if isinstance(outcome, Reservation):
            return outcome
        if outcome == "refused":
            raise await self._refuse_for_today()
        return None

    async def _refuse_for_today(self) -> BudgetExceeded:
        """Return the error for a request that does not fit into the rest of this day's tokens."""
        name, limit = self._tenant.name, self._tenant.tokens_per_day or 0
        left = limit - (await self._budgets.read_usage([self._tenant]))[name].used if limit else 0
        seconds = self._budgets.compute_seconds_left()
        return BudgetExceeded(name, seconds, is_final=True, limit=limit, left=max(left, 0))

    def _refuse_for_now(self) -> BudgetExceeded:
        """Return the error for a request that current requests leave no tokens for."""
        return BudgetExceeded(self._tenant.name, RETRY_SOON, is_final=False, limit=self._tenant.tokens_per_day or 0)

    async def _compute(self, reservation: Reservation, texts: Sequence[str]) -> Fetched:
        """Fetch texts for which tokens are reserved, and settle the reservation.

        If the event loop ends meanwhile, the reservation stays. The next start of this worker counts it as used.
        """
        try:
            fetched = await self._cache.afetch(texts, self._task, store=self._store, fresh=self._fresh)
        except Exception:
            # A tier failed, or the cache was closed. Nobody knows whether the provider was called before.
            await self._settle(Settlement(reservation, reservation.estimate))
            raise
        await self._settle(_make_settlement(reservation, fetched))
        return fetched

    async def _settle(self, settlement: Settlement) -> None:
        await self._budgets.settle(settlement)
        self._is_reserving = False
        if self._is_abandoned:
            raise asyncio.CancelledError

    async def _fetch_in_one_space(self, parts: Sequence[Part]) -> Fetched:
        """Fetch all texts of the request in one call, because the parts belong to different vector spaces.

        That is so if the provider failed in the middle of the request and the cache has a fallback, or if the drift
        guard opened a new vector space.

        Raises:
            BudgetExceeded: the upper bound of all texts does not fit into the rest of the budget.
        """
        whole = add_loads(await measure_texts(self._cache, list(dict.fromkeys(self._texts)), self._task))
        reservation = await self._reserve(whole, whole, has_turn=False)
        if reservation is None:
            raise self._refuse_for_now()
        fetched = await self._compute(reservation, self._texts)
        return replace(
            fetched,
            computed=sum((part.fetched.computed for part in parts), fetched.computed),
            wasted=sum((part.fetched.wasted for part in parts), fetched.wasted),
        )


def _make_settlement(reservation: Reservation, fetched: Fetched) -> Settlement:
    """Return what a call was charged, as far as the provider has reported it; for other texts, what was estimated.

    A text counts each time that it was sent and may have been charged.
    """
    work, texts = fetched.computed + fetched.wasted, reservation.load.texts
    tokens = work.tokens + math.ceil(reservation.estimate * work.unknown_tokens / texts)
    is_measured = not work.unknown_tokens and work.texts >= texts
    return Settlement(
        reservation,
        tokens,
        measured=work.texts / texts if is_measured else 0.0,
        is_unreported=bool(fetched.computed.texts) and work.unknown_tokens == work.texts,
    )


def _is_about_all_texts(error: Exception) -> bool:
    """Return whether any other text would fail too, for example because the provider cannot be reached."""
    status = read_status(error)
    if status is not None:
        return status not in _STATUSES_OF_TEXTS
    return isinstance(error, OSError | DriftError) or _has_name(error, "Timeout") or _has_name(error, "Connect")


def _has_name(error: Exception, part: str) -> bool:
    return any(part in kind.__name__ for kind in type(error).__mro__)
