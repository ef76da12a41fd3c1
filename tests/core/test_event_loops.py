"""Deadlines of coroutines while other tasks block the event loop. The loop has a clock that the tests move."""

from __future__ import annotations

import asyncio
import itertools
import selectors
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedonce import Cache, Capabilities, Tier, event_loops
from embedonce._engine.breaker import Breaker
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
            async with async_deadline(0.25):
                await asyncio.Event().wait()
        assert not isinstance(caught.value, LoopBusy)
        return clock.now - start

    assert clock.run(call()) == pytest.approx(0.25, abs=0.001)


def test_a_call_that_hangs_after_the_loop_was_blocked_is_a_timeout_after_one_more_period(clock: Clock) -> None:
    async def call() -> float:
        clock_start = clock.now
        with pytest.raises(TimeoutError) as caught:
            async with async_deadline(0.25):
                clock.block(0.4)
                await asyncio.Event().wait()
        assert not isinstance(caught.value, LoopBusy)
        return clock.now - clock_start

    assert clock.run(call()) == pytest.approx(0.65, abs=0.001)


@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.3, 2.0])
def test_a_loop_that_is_always_blocked_is_named(clock: Clock, seconds: float) -> None:
    async def call() -> float:
        start = clock.now
        with pytest.raises(LoopBusy) as caught:
            async with async_deadline(0.25):
                await asyncio.Event().wait()
        assert caught.value.started == start
        return clock.now - start

    took = clock.run(run_beside(block_repeatedly(clock, seconds), call()))
    assert took <= 2 * max(0.25, seconds) + 4 * seconds + 0.01


def test_a_short_block_excuses_nothing(clock: Clock) -> None:
    async def call() -> None:
        with pytest.raises(TimeoutError) as caught:
            async with async_deadline(1.0):
                clock.block(0.1)
                await asyncio.Event().wait()
        assert not isinstance(caught.value, LoopBusy)

    clock.run(call())


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
            with pytest.raises(TimeoutError):
                await asyncio.sleep(0.2)
                pytest.fail("the block goes on after its deadline")
        assert time_left() is None

    with pytest.raises(TimeoutError):
        clock.run(call())


def test_a_deadline_that_a_task_notices_itself_cancels_nothing_later(clock: Clock) -> None:
    async def call() -> str:
        with pytest.raises(TimeoutError):
            async with async_deadline(0.25, graces=0):
                clock.block(0.3)
                time_left()
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


def test_a_timeout_of_the_client_under_a_blocked_loop_is_a_busy_loop(clock: Clock) -> None:
    async def call() -> None:
        async with async_deadline(1.0):
            async with asyncio.timeout(0.5):
                clock.block(0.8)
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
