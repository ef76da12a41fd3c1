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
from functools import partial
from pathlib import Path
from typing import TypeVar

from embedonce import Cache, Fetched
from embedonce.admission import Settle
from embedonce.config import Tenant
from embedonce.contracts import AnyProvider, Task
from embedonce.keys import VectorSpace
from embedonce.vectors import Work
from embedonce_server.api.api_errors import ApiError

from .budget_file import BudgetFile, Load, Outcome, Refusal, Reservation, Settlement, Usage
from .text_loads import measure_texts

T = TypeVar("T")

log = logging.getLogger("embedonce.serve")

MAX_WAIT = 30.0
"""Maximum number of seconds that a request waits for calls under way that may use up the budget."""
FIRST_PAUSE, MAX_PAUSE = 0.01, 0.2
"""Seconds between two looks at the file while a request waits."""
RETRY_SOON = 5.0
"""Seconds after which a refused request is to be repeated, if only calls under way hold the rest of the budget."""
LOG_SECONDS = 60.0
"""Minimum number of seconds between two log lines about a file that cannot be used."""


class BudgetExceeded(ApiError):
    """The tenant's tokens of this day are used up, or are held for calls under way."""

    def __init__(self, tenant: str, retry_after: float, *, is_final: bool, limit: int, left: int = 0) -> None:
        hint = "; cached texts are still answered"
        if not limit:
            what = (
                f'tenant "{tenant}" gets only cached texts (tokens_per_day = 0), and at least one input is not cached'
            )
            hint = ""
        elif is_final:
            tokens = "1 token" if left == 1 else f"{left:,} tokens"
            what = f'tenant "{tenant}" has {tokens} left today (UTC), fewer than this request needs'
        else:
            what = f'current requests may need the tokens that tenant "{tenant}" has left today (UTC)'
            hint = f"; try again in {math.ceil(retry_after)} s{hint}"
        # OpenAI's clients repeat a request with status 429, unless this header says that it is of no use.
        headers = {"x-should-retry": "false"} if is_final else None
        super().__init__(
            429,
            f"{what}{hint}",
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
        self._file = BudgetFile(path, worker, clock)
        # One thread, because SQLite may wait for other processes, and because a connection is used by one thread.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embedonce-budgets")
        self._turns: dict[str, _Turn] = {}
        self._buying = 0
        """Number of times that tokens are being reserved, or are reserved and not settled."""
        self._is_idle = asyncio.Event()
        self._is_idle.set()
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
        """Wait until all reservations are settled, including those of requests whose clients have gone."""
        while self._buying:
            await self._is_idle.wait()

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

    def begin(self) -> None:
        """Note that tokens are about to be reserved. Call :meth:`end` when this is settled, or has failed."""
        self._buying += 1
        self._is_idle.clear()

    def end(self) -> None:
        self._buying -= 1
        if not self._buying:
            self._is_idle.set()

    def find_day(self) -> int:
        """Return the number of the current day in UTC."""
        return self._file.find_day()

    async def reserve(self, tenant: Tenant, model: str, load: Load, *, has_turn: bool) -> Outcome:
        """Reserve tokens for texts that are about to be sent.

        Raises:
            BudgetsUnavailable: the file cannot be used.
        """
        limit = tenant.tokens_per_day or 0
        return await self._call(lambda: self._file.reserve(tenant.name, limit, model, load, has_turn=has_turn))

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
        return f"<Budgets {self._buying} reservations>"


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

    The other missing texts fail with :class:`BudgetExceeded`, or with :class:`BudgetsUnavailable` if the file of the
    budgets cannot be used. If the budget is used up in the middle of a long request, the texts that are computed until
    then are stored, so that the next request does not pay for them again.
    """
    buyer = _Buyer(budgets, tenant, cache, task)
    try:
        return await cache.afetch(texts, task, store=store, fresh=fresh, admit=buyer.admit)
    except asyncio.CancelledError:
        buyer.leave()
        raise


class _ClientGone(Exception):
    """The client of a request has gone, so no more texts are computed for it. Nobody sees this exception."""


class _Buyer:
    """Reserves tokens for the missing texts of one request, for one call of the model after the other.

    If the client goes, the calls for which tokens are reserved go on and are settled, and no more calls begin.
    """

    def __init__(self, budgets: Budgets, tenant: Tenant, cache: Cache, task: Task) -> None:
        self._budgets = budgets
        self._tenant = tenant
        self._cache = cache
        self._task = task
        self._turn = budgets.get_turn(tenant.name)
        self._line = asyncio.Lock()
        """Chunks of one request wait here for each other, without a limit. One of them at a time waits for the turn."""
        self._has_left = False
        self._limit: asyncio.Timeout | None = None
        """The time limit of the wait for the turn, during this wait."""

    def leave(self) -> None:
        """Note that the client has gone."""
        self._has_left = True
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(0)

    async def admit(self, texts: Sequence[str], space: VectorSpace) -> Settle:
        """Reserve tokens for texts that are about to be sent. Return the function that settles the reservation.

        If the event loop ends before that, the reservation stays. The next start of this worker counts it as used.

        Raises:
            BudgetExceeded: the texts do not fit into the rest of the budget.
            BudgetsUnavailable: the file of the budgets cannot be used.
        """
        self._budgets.begin()
        try:
            model = _name_model(space)
            load = await measure_texts(self._find_provider(model), texts, self._task)
            reservation = None if self._turn.is_waiting else await self._reserve(model, load, has_turn=False)
            if reservation is None:
                reservation = await self._reserve_in_turn(model, load)
        except BaseException:
            self._budgets.end()
            raise
        return partial(self._settle, reservation)

    async def _settle(self, reservation: Reservation, computed: Work, wasted: Work) -> None:
        try:
            await self._budgets.settle(_make_settlement(reservation, computed, wasted))
        finally:
            if not reservation.is_free:
                self._turn.lock.release()
                self._line.release()
            self._budgets.end()

    def _find_provider(self, model: str) -> AnyProvider:
        """Return the provider of a model: that of the cache, or its fallback."""
        first, second = self._cache.provider, self._cache.fallback
        return first if second is None or _name_model(first.space(self._task)) == model else second

    async def _reserve_in_turn(self, model: str, load: Load) -> Reservation:
        """Wait for the turn of this request, and reserve tokens. It keeps its turn unless the reservation is free.

        Raises:
            BudgetExceeded: the tokens do not fit, or other requests take too long.
        """
        is_free = True
        await self._line.acquire()
        try:
            deadline = asyncio.get_running_loop().time() + MAX_WAIT
            await self._take_turn(deadline)
            try:
                reservation = await self._wait_for_tokens(model, load, deadline)
                is_free = reservation.is_free
            finally:
                if is_free:
                    self._turn.lock.release()
        finally:
            if is_free:
                self._line.release()
        return reservation

    async def _take_turn(self, deadline: float) -> None:
        self._raise_if_gone()
        try:
            async with asyncio.timeout_at(deadline) as self._limit:
                await self._turn.lock.acquire()
        except TimeoutError:
            self._raise_if_gone()
            raise self._refuse_for_now() from None
        finally:
            self._limit = None

    async def _wait_for_tokens(self, model: str, load: Load, deadline: float) -> Reservation:
        """Reserve tokens in turn. If calls under way may need them, wait until these calls have been settled.

        Raises:
            BudgetExceeded: the tokens do not fit, or the calls under way take too long.
        """
        pause = FIRST_PAUSE
        try:
            while (reservation := await self._reserve(model, load, has_turn=True)) is None:
                if asyncio.get_running_loop().time() >= deadline:
                    raise self._refuse_for_now()
                self._turn.is_waiting = True
                # Other workers may have to end their calls first, and they send no message.
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE)
        finally:
            self._turn.is_waiting = False
        return reservation

    async def _reserve(self, model: str, load: Load, *, has_turn: bool) -> Reservation | None:
        """Reserve tokens. Return None if calls under way must end first.

        Raises:
            BudgetExceeded: the tokens do not fit today.
            BudgetsUnavailable: the file cannot be used.
        """
        while True:
            self._raise_if_gone()
            outcome = await self._budgets.reserve(self._tenant, model, load, has_turn=has_turn)
            if not isinstance(outcome, Refusal):
                break
            if outcome.day == self._budgets.find_day():  # else the day has ended meanwhile
                raise self._refuse_for_today(outcome)
        if outcome == "wait":
            return None
        if self._has_left:
            await self._budgets.settle(Settlement(outcome, 0))
        self._raise_if_gone()
        return outcome

    def _raise_if_gone(self) -> None:
        if self._has_left:
            raise _ClientGone

    def _refuse_for_today(self, refusal: Refusal) -> BudgetExceeded:
        """Return the error for a request that does not fit into the rest of this day's tokens."""
        limit = self._tenant.tokens_per_day or 0
        return BudgetExceeded(self._tenant.name, refusal.seconds, is_final=True, limit=limit, left=refusal.left)

    def _refuse_for_now(self) -> BudgetExceeded:
        """Return the error for a request that current requests leave no tokens for."""
        return BudgetExceeded(self._tenant.name, RETRY_SOON, is_final=False, limit=self._tenant.tokens_per_day or 0)


def _name_model(space: VectorSpace) -> str:
    return " ".join(filter(None, (space.provider, space.model, space.endpoint)))


def _make_settlement(reservation: Reservation, computed: Work, wasted: Work) -> Settlement:
    """Return what texts were charged, as far as the provider has reported it; for other texts, what was estimated.

    A text counts each time that it was sent and may have been charged.
    """
    work, texts = computed + wasted, reservation.load.texts
    tokens = work.tokens + math.ceil(reservation.estimate * work.unknown_tokens / texts)
    is_measured = not work.unknown_tokens and work.texts >= texts
    return Settlement(
        reservation,
        tokens,
        measured=work.texts / texts if is_measured else 0.0,
        is_unreported=bool(computed.texts) and work.unknown_tokens == work.texts,
    )
