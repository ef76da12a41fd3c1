"""Deadlines of coroutines while other tasks block the event loop. The loop has a clock that the tests move."""

from __future__ import annotations

import asyncio
import itertools
import selectors
import threading
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedonce import Cache, Tier, event_loops
from embedonce._engine import breaker
from embedonce.contracts import Embedded, Limits, VectorSpace, deadline, time_left
from embedonce.errors import LoopBusy, ProviderTimeout, TierTimeout
from embedonce.event_loops import async_deadline
from embedonce.testing import CountingProvider, DictBackend


class _JumpingSelector(selectors.SelectSelector):
    """Moves the loop's clock forward instead of waiting."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout is None:
            return super().select(None)  # another thread wakes the loop
        if not ready:
            self._clock.now += timeout or 0.0
        return ready


class Clock:
    """A clock that stands still unless the loop waits or a task blocks the loop."""

    def __init__(self) -> None:
        self.now = 1000.0

    def block(self, seconds: float) -> None:
        self.now += seconds

    def run(self, main: Awaitable[Any]) -> Any:
        loop = asyncio.SelectorEventLoop(_JumpingSelector(self))
        loop.time = lambda: self.now  # type: ignore[method-assign]
        try:
            return loop.run_until_complete(main)
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(event_loops, "monotonic", lambda: made.now)
    monkeypatch.setattr(breaker, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


async def block_repeatedly(clock: Clock, seconds: float, times: int | None = None) -> None:
    for _ in itertools.repeat(None) if times is None else range(times):
        clock.block(seconds)
        await asyncio.sleep(0)


async def wait_steps(steps: int) -> str:
    """Return after ``steps`` turns of the loop, as a reply that is read in several steps."""
    for _ in range(steps):
        await asyncio.sleep(0)
    return "reply"


async def hang(seconds: float, *, blocked: float = 0.0, clock: Clock | None = None) -> None:
    """Block the loop for ``blocked`` seconds in a call that never ends and has a deadline of ``seconds``."""
    async with async_deadline(seconds):
        if clock is not None:
            clock.block(blocked)
        await asyncio.Event().wait()


async def run_beside(busy: Awaitable[None], call: Awaitable[Any]) -> Any:
    task = asyncio.ensure_future(busy)
    try:
        return await call
    finally:
        task.cancel()


def test_a_reply_that_waited_for_the_loop_is_read(clock: Clock) -> None:
    async def call() -> str:
        async with async_deadline(0.25):
            return await wait_steps(6)

    assert clock.run(run_beside(block_repeatedly(clock, 0.3, times=1), call())) == "reply"


def test_a_call_that_hangs_while_the_loop_runs_ends_at_its_deadline(clock: Clock) -> None:
    async def call() -> float:
        start = clock.now
        with pytest.raises(TimeoutError) as caught:
            await hang(0.25)
        assert not isinstance(caught.value, LoopBusy)
        return clock.now - start

    assert clock.run(call()) == pytest.approx(0.25, abs=0.001)


def test_a_call_that_hangs_after_the_loop_was_blocked_is_a_timeout_after_one_more_period(clock: Clock) -> None:
    async def call() -> float:
        clock_start = clock.now
        with pytest.raises(TimeoutError) as caught:
            await hang(0.25, blocked=0.4, clock=clock)
        assert not isinstance(caught.value, LoopBusy)
        return clock.now - clock_start

    assert clock.run(call()) == pytest.approx(0.65, abs=0.001)


@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.3, 2.0])
def test_a_loop_that_is_always_blocked_is_named(clock: Clock, seconds: float) -> None:
    async def call() -> float:
        start = clock.now
        with pytest.raises(LoopBusy) as caught:
            await hang(0.25)
        assert caught.value.started == start
        return clock.now - start

    took = clock.run(run_beside(block_repeatedly(clock, seconds), call()))
    assert took <= 2 * max(0.25, seconds) + 4 * seconds + 0.01


def test_a_short_block_excuses_nothing(clock: Clock) -> None:
    async def call() -> None:
        with pytest.raises(TimeoutError) as caught:
            await hang(1.0, blocked=0.1, clock=clock)
        assert not isinstance(caught.value, LoopBusy)

    clock.run(call())


@pytest.mark.parametrize("blocked", [0.11, 0.19])
@pytest.mark.parametrize("steps", [1, 6])
def test_a_reply_that_arrived_before_a_short_block_at_the_end_is_read(clock: Clock, blocked: float, steps: int) -> None:
    async def call() -> str:
        async with async_deadline(1.0):
            await asyncio.sleep(0.9)
            clock.block(blocked)
            return await wait_steps(steps)

    assert clock.run(call()) == "reply"


def test_a_step_after_a_short_block_at_the_end_has_time_left(clock: Clock) -> None:
    async def call() -> None:
        async with async_deadline(1.0):
            await asyncio.sleep(0.9)
            clock.block(0.15)
            assert time_left() == pytest.approx(0.05)

    clock.run(call())


def test_a_short_block_at_the_end_is_given_back_once(clock: Clock) -> None:
    async def hang_beside_short_blocks() -> None:
        async with async_deadline(1.0):
            await asyncio.sleep(0.95)
            clock.block(0.09)
            await asyncio.sleep(0.03)
            clock.block(0.05)
            await asyncio.Event().wait()

    async def call() -> float:
        start = clock.now
        with pytest.raises(TimeoutError) as caught:
            await hang_beside_short_blocks()
        assert not isinstance(caught.value, LoopBusy)
        return clock.now - start

    assert clock.run(call()) == pytest.approx(1.12, abs=0.001)


def test_more_graces_wait_through_more_blocks(clock: Clock) -> None:
    async def call(graces: int, blocks: int) -> bool:
        answered = asyncio.Event()

        async def block() -> None:
            await block_repeatedly(clock, 1.5, times=blocks)
            answered.set()

        try:
            async with async_deadline(1.0, graces=graces):
                await run_beside(block(), answered.wait())
        except LoopBusy:
            return False
        return True

    assert [clock.run(call(2, blocks)) for blocks in (1, 2, 3)] == [True, True, True]
    assert not clock.run(call(2, 9))


def test_time_left_follows_the_period(clock: Clock) -> None:
    async def call() -> None:
        async with async_deadline(0.25):
            assert time_left() == pytest.approx(0.25)
            clock.block(0.2)
            assert time_left() == pytest.approx(0.05)
            clock.block(0.2)  # the deadline has passed, but the timer could not say so
            assert time_left() == pytest.approx(0.25)
            await asyncio.sleep(0.2)
            assert time_left() == pytest.approx(0.05)
        assert time_left() is None

    clock.run(call())


def test_a_deadline_that_a_task_notices_itself_cancels_nothing_later(clock: Clock) -> None:
    async def notice() -> None:
        async with async_deadline(0.25, graces=0):
            for _ in range(2):
                clock.block(0.3)
                time_left()

    async def call() -> str:
        with pytest.raises(TimeoutError):
            await notice()
        return await wait_steps(3)

    assert clock.run(call()) == "reply"


def test_time_left_in_another_thread_does_not_touch_the_loop(clock: Clock) -> None:
    def read_in_thread() -> float | None:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(copy_context().run, time_left).result()

    async def call() -> None:
        async with async_deadline(0.25):
            assert read_in_thread() == pytest.approx(0.25)
            clock.block(0.3)
            with pytest.raises(TierTimeout):
                read_in_thread()
            assert time_left() == pytest.approx(0.25)

    clock.run(call())


def test_a_task_that_outlives_the_block_moves_no_timer(clock: Clock) -> None:
    async def late() -> None:
        await asyncio.sleep(1.0)
        with pytest.raises(TierTimeout):
            time_left()

    async def call() -> None:
        async with async_deadline(0.25):
            task = asyncio.create_task(late())
        await task

    clock.run(call())


def test_no_limit(clock: Clock) -> None:
    async def call() -> str:
        with deadline(0.1):
            async with async_deadline(None):
                assert time_left() is None
                await asyncio.sleep(100)
                return await wait_steps(2)

    assert clock.run(call()) == "reply"


@pytest.mark.parametrize("blocked", [0.8, 1.2])  # only the client's timer is due, or both are
def test_a_timeout_of_the_client_under_a_blocked_loop_is_a_busy_loop(clock: Clock, blocked: float) -> None:
    async def call() -> None:
        async with async_deadline(1.0):
            async with asyncio.timeout(0.5):
                clock.block(blocked)
                await asyncio.sleep(0)
                await asyncio.Event().wait()

    with pytest.raises(LoopBusy) as caught:
        clock.run(call())
    assert isinstance(caught.value.__cause__, TimeoutError)


def test_cancellation_and_other_errors_pass_through(clock: Clock) -> None:
    async def fail() -> None:
        async with async_deadline(0.25):
            clock.block(0.6)
            raise ConnectionError("gone")

    async def be_cancelled() -> None:
        async with async_deadline(0.25):
            clock.block(0.6)
            await asyncio.Event().wait()

    async def cancel() -> None:
        task = asyncio.create_task(be_cancelled())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with pytest.raises(ConnectionError):
        clock.run(fail())
    clock.run(cancel())


@settings(max_examples=100, deadline=None)
@given(
    blocks=st.lists(st.floats(0.0, 2.0), max_size=12),
    timeout=st.floats(0.05, 1.0),
    hangs=st.booleans(),
    steps=st.integers(1, 3),
)
def test_a_call_ends_once_and_a_hang_always_ends(blocks: list[float], timeout: float, hangs: bool, steps: int) -> None:
    clock = Clock()

    async def block() -> None:
        for seconds in blocks:
            clock.block(seconds)
            await asyncio.sleep(0)

    async def call() -> str:
        async with async_deadline(timeout):
            reply = await wait_steps(steps)
            if hangs:
                await asyncio.Event().wait()
            return reply

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_loops, "monotonic", lambda: clock.now)
        start = clock.now
        try:
            assert clock.run(run_beside(block(), call())) == "reply"
            assert not hangs
        except TimeoutError:
            assert hangs or any(seconds > 0.0 for seconds in blocks)
        assert clock.now - start <= 2 * timeout + sum(blocks) + 0.1


# --- tiers and providers ----------------------------------------------------------------------


class TurnsBackend(DictBackend):
    """A backend whose async twin needs some turns of the event loop for a reply, or never replies."""

    def __init__(self, turns: int | None = 3) -> None:
        super().__init__(scope="network", twin=True)
        self.turns = turns
        self.closed_twins = 0

    def get_many(self, keys: Sequence[str], /) -> dict[str, Any]:
        if self.turns is None:
            raise TimeoutError
        return super().get_many(keys)

    def twin(self) -> Twin:
        return Twin(self)


class Twin:
    def __init__(self, backend: TurnsBackend) -> None:
        self._backend = backend

    async def get_many(self, keys: Sequence[str], /) -> Mapping[str, Any]:
        if self._backend.turns is None:
            await asyncio.Event().wait()
        await wait_steps(self._backend.turns or 0)
        return self._backend.get_many(keys)

    async def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None:
        self._backend.set_many(items, ttl)

    async def close(self) -> None:
        await wait_steps(3)
        self._backend.closed_twins += 1


def make_cache(
    backend: TurnsBackend, provider: Any = None, *, listeners: Sequence[Any] = (), on_error: Any = "skip"
) -> Cache:
    tier = Tier(backend, name="far", timeout=0.25, write="inline", lease="off", on_error=on_error)
    return Cache(provider or CountingProvider(), [tier], listeners=listeners)


def store(backend: TurnsBackend, texts: Sequence[str]) -> None:
    stored = DictBackend(store=backend)
    with Cache(CountingProvider(), [Tier(stored)]) as cache:
        cache.embed_batch(texts)


TEXTS = [f"text {number}" for number in range(40)]


@pytest.mark.parametrize("seconds", [0.05, 0.3, 2.0])
def test_a_healthy_tier_answers_beside_tasks_that_block_the_loop(clock: Clock, seconds: float) -> None:
    backend = TurnsBackend()
    store(backend, TEXTS)
    provider = CountingProvider()

    async def serve() -> None:
        cache = make_cache(backend, provider)
        for text in TEXTS:
            await asyncio.gather(cache.aembed(text), block_repeatedly(clock, seconds, times=1))
        tier = cache.stats().tiers["far"]
        assert (tier.hits, tier.errors, tier.skipped) == (len(TEXTS), 0, 0)
        await cache.aclose()

    clock.run(serve())
    assert provider.texts == 0


def test_a_hanging_tier_is_left_out_although_the_loop_is_always_blocked(clock: Clock) -> None:
    backend = TurnsBackend(turns=None)
    events: list[Any] = []

    async def serve() -> None:
        cache = make_cache(backend, listeners=[events.append])
        await run_beside(block_repeatedly(clock, 0.3), ask(cache))
        tier = cache.stats().tiers["far"]
        assert tier.causes == {"busy_loop": 2, "timeout": 1}
        assert tier.skipped == len(TEXTS) - 3
        await cache.aclose()

    async def ask(cache: Cache) -> None:
        for text in TEXTS:
            await cache.aembed(text)

    clock.run(serve())
    assert [event.cause for event in events if getattr(event, "state", None) == "open"] == ["timeout"]


def test_calls_that_hang_together_count_as_one_busy_loop(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    backend = TurnsBackend(turns=None)

    async def serve() -> None:
        cache = make_cache(backend)
        await run_beside(block_repeatedly(clock, 0.3), asyncio.gather(*map(cache.aembed, TEXTS)))
        tier = cache.stats().tiers["far"]
        assert (tier.causes, tier.skipped) == ({"busy_loop": len(TEXTS)}, 0)
        await cache.aclose()

    clock.run(serve())
    (message,) = caplog.messages
    assert message.startswith("tier 'far': other tasks blocked the event loop")


def test_an_answer_resets_the_count_of_busy_loops() -> None:
    opened: list[Any] = []
    one = breaker.Breaker(lambda *change: opened.append(change))
    for _ in range(5):
        assert not one.record_busy_loop(float("inf"))
        assert not one.record_busy_loop(float("inf"))
        one.record_success()
    assert opened == []


def test_a_strict_tier_says_that_the_loop_was_blocked(clock: Clock) -> None:
    backend = TurnsBackend(turns=None)

    async def serve() -> None:
        cache = make_cache(backend, on_error="raise")
        with pytest.raises(LoopBusy, match=r"tier 'far': .*event loop") as caught:
            await run_beside(block_repeatedly(clock, 0.3), cache.aembed("text"))
        assert caught.value.tier == "far"
        await cache.aclose()

    clock.run(serve())


def test_closing_beside_a_task_that_blocks_the_loop_warns_about_nothing(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    backend = TurnsBackend()

    async def serve() -> None:
        cache = make_cache(backend)
        await cache.aembed("text")
        await run_beside(block_repeatedly(clock, 0.3, times=2), cache.aclose())

    clock.run(serve())
    assert backend.closed_twins == 1
    assert caplog.messages == []


class TurnsProvider:
    """An async provider that needs some turns of the event loop, or never answers."""

    limits = Limits(timeout=1.0)

    def __init__(self, turns: int | None) -> None:
        self.turns = turns

    def space(self, task: str) -> VectorSpace:
        return VectorSpace(provider="turns", model="turns", dimensions=2)

    async def aembed(self, texts: list[str], task: str) -> Embedded:
        if self.turns is None:
            await asyncio.Event().wait()
        await wait_steps(self.turns or 0)
        return Embedded([[1.0, 2.0]] * len(texts))


def test_a_paid_answer_is_read_beside_tasks_that_block_the_loop(clock: Clock) -> None:
    async def serve() -> None:
        cache = Cache(TurnsProvider(4), [])
        assert (await run_beside(block_repeatedly(clock, 0.7), cache.aembed("text"))).tolist() == [1.0, 2.0]
        await cache.aclose()

    clock.run(serve())


def test_a_provider_that_hangs_beside_tasks_that_block_the_loop_times_out(clock: Clock) -> None:
    async def serve() -> None:
        cache = Cache(TurnsProvider(None), [])
        with pytest.raises(ProviderTimeout, match=r"within 1\.0 s, because other tasks blocked the event loop"):
            await run_beside(block_repeatedly(clock, 0.7), cache.aembed("text"))
        await cache.aclose()

    clock.run(serve())


def test_a_call_in_a_thread_that_could_not_run_gets_one_more_period() -> None:
    """A task that blocks the loop may hold Python's lock, so that the thread of a call cannot run either."""
    may_answer = threading.Event()

    class SlowBackend(DictBackend):
        def get_many(self, keys: Sequence[str], /) -> dict[str, Any]:
            assert may_answer.wait(60)
            return super().get_many(keys)

    backend = SlowBackend(scope="network", deadline=False)
    with Cache(CountingProvider(), [Tier(DictBackend(store=backend))]) as cache:
        cache.embed("text")

    async def block() -> None:
        await asyncio.sleep(0.1)
        started = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < started + 3.5:
            pass
        may_answer.set()

    async def serve() -> None:
        async with Cache(CountingProvider(), [Tier(backend, name="far", timeout=3.0, lease="off")]) as cache:
            await asyncio.gather(cache.aembed("text"), block())
            assert cache.stats().tiers["far"].hits == 1

    asyncio.run(serve())
