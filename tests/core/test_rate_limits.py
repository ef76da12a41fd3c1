"""Calls to a provider keep to its limits per minute, and all of them pause after a status 429.

No test waits: the clock moves only when the engine sleeps.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from email.utils import formatdate
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedonce import Cache, ConfigError, Limits
from embedonce._engine import rate
from embedonce._engine.durations import parse_duration
from embedonce._engine.ports import BlockingPort, LoopPort
from embedonce._engine.rate import CallRate
from embedonce._engine.refusals import read_wait
from embedonce.functions import wrap
from embedonce_backends.memory import MemoryBackend

SPACE = {"provider": "limited", "model": "limited"}
faces = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


class Clock:
    """A clock that moves only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleeps: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    async def sleep_blocking(self: Any, seconds: float) -> None:
        clock.sleep(seconds)

    async def sleep_on_loop(self: Any, seconds: float) -> None:
        end = clock.now + seconds
        clock.sleeps.append(seconds)
        await asyncio.sleep(0)
        # The task that wakes first moves the clock, as if all tasks had slept at the same time.
        while clock.now < end:
            for _ in range(50):
                await asyncio.sleep(0)
            clock.now = max(clock.now, min(end, clock.now + 0.1))

    monkeypatch.setattr(rate, "time", SimpleNamespace(monotonic=clock.monotonic))
    monkeypatch.setattr(BlockingPort, "sleep", sleep_blocking)
    monkeypatch.setattr(LoopPort, "sleep", sleep_on_loop)
    return clock


class RateLimitError(Exception):
    """A vendor's exception with the status 429."""

    def __init__(self, message: str = "slow down", headers: dict[str, str] | None = None, **fields: Any) -> None:
        super().__init__(message)
        self.status_code = 429
        self.response = SimpleNamespace(headers=headers or {}, status_code=429)
        self.__dict__.update(fields)


class LimitedServer:
    """Answers the first ``failures`` requests, or those of ``fails``, with an error, and notes when requests begin."""

    def __init__(
        self,
        clock: Clock,
        make_error: Callable[[], Exception] = RateLimitError,
        *,
        failures: int = 0,
        fails: Callable[[int], bool] | None = None,
    ) -> None:
        self.clock = clock
        self.make_error = make_error
        self.fails = fails or (lambda number: number <= failures)
        self.starts: list[float] = []
        self.sizes: list[int] = []

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        self.starts.append(self.clock.now)
        self.sizes.append(len(texts))
        if self.fails(len(self.starts)):
            raise self.make_error()
        return [[1.0, 2.0]] * len(texts)

    async def aembed(self, texts: Sequence[str]) -> list[list[float]]:
        return self.embed(texts)


def open_cache(server: LimitedServer, asynchronous: bool = False, **limits: Any) -> Cache:
    function: Any = server.aembed if asynchronous else server.embed
    return Cache(wrap(function, SPACE, Limits(**limits)), [MemoryBackend()])


def fetch(cache: Cache, texts: list[str], asynchronous: bool = False) -> Any:
    return asyncio.run(cache.afetch(texts)) if asynchronous else cache.fetch(texts)


# --- reading how long to wait -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("14.9s", 14.9),
        ("1m3.2s", 63.2),
        ("6ms", 0.006),
        ("2h", 7200),
        ("1 minute", 60),
        ("1 minute and 5 seconds", 65),
        ("30 secs", 30),
        ("", None),
        ("soon", None),
        ("12", None),
        ("5 apples", None),
    ],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert parse_duration(text) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (RateLimitError(headers={"Retry-After": "7"}), 7),
        (RateLimitError(headers={"retry-after-ms": "1500", "retry-after": "9"}), 1.5),
        (RateLimitError(headers={"x-ratelimit-reset-requests": "1m3.2s", "x-ratelimit-remaining-requests": "0"}), 63.2),
        (
            RateLimitError(
                headers={
                    "x-ratelimit-reset-requests": "10m",
                    "x-ratelimit-remaining-requests": "7",
                    "x-ratelimit-reset-tokens": "6s",
                    "x-ratelimit-remaining-tokens": "0",
                }
            ),
            6,
        ),
        (RateLimitError("Rate limit reached. Please try again in 14.9s. Visit https://x/9s"), 14.9),
        (RateLimitError("Limit 3 per min. Please try again in 1m3.2s."), 63.2),
        (RateLimitError("Please retry in 1 minute"), 60),
        (RateLimitError("Please retry after 26 seconds."), 26),
        (RateLimitError("quota exceeded, wait 500 ms"), 0.5),
        (RateLimitError("too many requests", body={"error": {"message": "try again in 20s"}}), 20),
        (RateLimitError("", body={"retry_after": 3.5}), 3.5),
        (RateLimitError("", body={"retry_after_ms": 3500}), 3.5),
        (
            RateLimitError(
                "RESOURCE_EXHAUSTED",
                details={"error": {"details": [{"@type": "…/google.rpc.RetryInfo", "retryDelay": "32s"}]}},
            ),
            32,
        ),
        (RateLimitError('{"retryDelay": "8.6s"}'), 8.6),
        (RateLimitError("[retry_delay {\n  seconds: 41\n}\n]"), 41),
        (RateLimitError(headers={"retry-after": "4"}, body="try again in 14.9s"), 4),
        (RateLimitError(headers={"retry-after": "-1"}), None),
        (RateLimitError(headers={"retry-after": "nan"}), None),
        (RateLimitError("limit of 500 requests per minute reached"), None),
        (RateLimitError(), None),
    ],
)
def test_the_time_to_wait_is_read_from_headers_body_or_message(error: Exception, seconds: float | None) -> None:
    assert read_wait(error) == (None if seconds is None else pytest.approx(seconds))


def test_the_time_to_wait_can_be_a_date() -> None:
    seconds = read_wait(RateLimitError(headers={"Retry-After": formatdate(time.time() + 100, usegmt=True)}))
    assert seconds is not None
    assert 50 < seconds <= 101


def test_the_time_to_wait_is_read_from_a_wrapped_exception() -> None:
    wrapper = RuntimeError("the framework failed")
    wrapper.__cause__ = RateLimitError(headers={"retry-after": "7"})
    assert read_wait(wrapper) == 7


# --- pauses -------------------------------------------------------------------------------------


@faces
def test_a_call_is_repeated_after_the_time_that_the_server_names(
    asynchronous: bool, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    server = LimitedServer(clock, lambda: RateLimitError("Please try again in 14.9s. secret"), failures=2)
    with open_cache(server, asynchronous, max_retries=2) as cache, caplog.at_level(logging.WARNING, "embedonce"):
        fetched = fetch(cache, ["a", "b"], asynchronous)
        assert fetched.sources == ["provider"] * 2
        stats = cache.stats().providers["limited"]
        assert (stats.texts, stats.failed) == (2, 0)
        assert fetched.seconds["provider"] < 10
    assert [round(b - a, 1) for a, b in zip(server.starts, server.starts[1:], strict=False)] == [14.9, 14.9]
    assert [record.message for record in caplog.records] == [
        "provider 'limited' is rate-limited; its calls pause for 14.9 s"
    ]


class ServerFailure(Exception):
    """A vendor's exception with a status that says that the server failed."""

    def __init__(self, status: int, headers: dict[str, str] | None = None) -> None:
        super().__init__("busy")
        self.response = SimpleNamespace(headers=headers or {}, status_code=status)


@faces
@pytest.mark.parametrize("status", [408, 409, 500, 502, 503, 504])
def test_a_failure_of_the_server_is_repeated_for_a_single_text(asynchronous: bool, status: int, clock: Clock) -> None:
    server = LimitedServer(clock, lambda: ServerFailure(status), failures=2)
    with open_cache(server, asynchronous, max_retries=2) as cache:
        assert not fetch(cache, ["one"], asynchronous).failed
    first, second = (later - start for start, later in itertools.pairwise(server.starts))
    assert 0.3 < first <= 0.6
    assert 0.7 < second <= 1.1


def test_a_failure_of_the_server_is_repeated_when_the_server_says(clock: Clock) -> None:
    server = LimitedServer(clock, lambda: ServerFailure(503, {"retry-after": "7"}), failures=1)
    with open_cache(server, max_retries=1) as cache:
        assert not cache.fetch(["one"]).failed
    assert clock.sleeps == [7.0]


def test_a_failure_of_the_server_is_repeated_so_often_only(clock: Clock) -> None:
    server = LimitedServer(clock, lambda: ServerFailure(503), failures=10**6)
    with open_cache(server, max_retries=2) as cache, pytest.raises(ServerFailure):
        cache.embed("one")
    assert len(server.starts) == 3


def test_the_parts_of_a_batch_are_sent_with_pauses_when_the_server_is_busy(clock: Clock) -> None:
    server = LimitedServer(clock, lambda: ServerFailure(503), failures=2)
    with open_cache(server, max_retries=4) as cache:
        assert not cache.fetch([f"text {i}" for i in range(8)]).failed
    assert server.sizes[:3] == [8, 4, 2]
    assert [0.3 < clock.sleeps[0] <= 0.5, 0.7 < clock.sleeps[1] <= 1.0, len(clock.sleeps)] == [True, True, 2]


@faces
def test_the_vendors_exception_is_raised_when_repeating_did_not_help(asynchronous: bool, clock: Clock) -> None:
    server = LimitedServer(clock, failures=10**6)
    with open_cache(server, asynchronous, max_retries=3, max_batch=2) as cache:
        fetched = fetch(cache, [str(i) for i in range(40)], asynchronous)
        assert {type(error) for error in fetched.failed.values()} == {RateLimitError}
        assert len(fetched.failed) == 40
    assert len(server.starts) == 4, "the other chunks of the call would fail too"
    gaps = [b - a for a, b in zip(server.starts, server.starts[1:], strict=False)]
    assert all(base <= gap <= 1.26 * base for gap, base in zip(gaps, [1, 2, 4], strict=True))


@pytest.mark.parametrize("code", ["insufficient_quota", "billing_hard_limit_reached", "billing_not_active"])
@pytest.mark.parametrize("place", ["code", "type", "body"])
def test_an_account_without_credit_is_final(code: str, place: str, clock: Clock) -> None:
    fields: dict[str, Any] = {place: {"error": {"code": code}} if place == "body" else code}
    server = LimitedServer(clock, lambda: RateLimitError("try again in 5s", **fields), failures=10)
    with open_cache(server, max_retries=4) as cache, pytest.raises(RateLimitError):
        cache.embed("a")
    assert (len(server.starts), clock.sleeps) == (1, [])


def test_a_pause_beyond_two_minutes_is_not_waited_for(clock: Clock) -> None:
    server = LimitedServer(clock, lambda: RateLimitError(headers={"retry-after": "121"}), failures=1)
    with open_cache(server, max_retries=4) as cache:
        with pytest.raises(RateLimitError):
            cache.embed("a")
        assert cache.embed("a").size == 2
    assert clock.sleeps == []


@pytest.mark.parametrize(("message", "waited"), [("try again in 5s", 5.0), ("slow down", 0.0)])
def test_without_repetitions_the_next_call_waits_only_for_a_named_time(
    message: str, waited: float, clock: Clock
) -> None:
    server = LimitedServer(clock, lambda: RateLimitError(message), failures=1)
    with open_cache(server) as cache:
        with pytest.raises(RateLimitError):
            cache.embed("a")
        assert clock.sleeps == []
        cache.embed("a")
    assert sum(clock.sleeps) == pytest.approx(waited)


def test_calls_that_wait_for_a_pause_keep_their_order_and_do_not_start_together(clock: Clock) -> None:
    order: list[str] = []
    server = LimitedServer(clock, lambda: RateLimitError("try again in 10s"), fails=lambda number: number in (1, 2))

    async def aembed(texts: Sequence[str]) -> Any:
        order.extend(texts)
        return await server.aembed(texts)

    async def main(cache: Cache) -> None:
        first = asyncio.create_task(cache.aembed("0"))
        while not clock.sleeps:
            await asyncio.sleep(0)
        others = [asyncio.create_task(cache.aembed(str(i))) for i in range(1, 6)]
        await asyncio.gather(first, *others)

    with Cache(wrap(aembed, SPACE, Limits(max_retries=5)), [MemoryBackend()]) as cache:
        asyncio.run(main(cache))
    # The first call after the pause finds out that the server is still limited. Then all calls wait again.
    assert [round(start - server.starts[0], 1) >= 20 for start in server.starts] == [False, False] + [True] * 6
    assert order[:2] == ["0", "0"]
    assert sorted(order[2:]) == [str(i) for i in range(6)]
    # Then they begin one after the other, and faster with each one that works. This clock moves in steps of 0.1 s.
    assert len({round(start, 3) for start in server.starts[2:]}) >= 3


def test_the_line_after_a_pause_ends_although_new_calls_join_it_faster_than_it_moves_at_first(clock: Clock) -> None:
    calls = CallRate(Limits())
    calls.pause(5.0)
    waiting = [calls.reserve(0.0) for _ in range(100)]
    begun: list[float] = []
    while waiting:
        for turn in [turn for turn in waiting if calls.time_left(turn) == 0]:
            waiting.remove(turn)
            begun.append(clock.now)
            calls.note_success(calls.pauses)
        clock.now += 0.02
        if clock.now < 1020:
            waiting.append(calls.reserve(0.0))  # 50 calls per second, and the line begins with 10
    assert begun[0] >= 1005
    assert begun[1] >= 1005 + rate.STEP / 2 - 1e-6, "the first call shows whether the server is still limited"
    assert begun[-1] < 1021
    assert calls.is_open()


def test_calls_in_the_line_wait_again_after_another_pause(clock: Clock) -> None:
    calls = CallRate(Limits())
    calls.pause(5.0)
    turns = [calls.reserve(0.0) for _ in range(50)]
    clock.now = 1005.0
    assert calls.time_left(turns[0]) == 0
    for _ in range(20):
        calls.note_success(calls.pauses)
    clock.now += 0.00001
    calls.pause(0.01)
    clock.now += 0.02
    assert calls.time_left(turns[1]) == 0 or calls.time_left(turns[1]) <= rate.STEP
    calls.note_success(0)  # it began before the pause, so it says nothing
    clock.now += 100 * rate.STEP
    assert all(calls.time_left(turn) == 0 for turn in turns[2:40])


def test_blocking_and_async_calls_share_a_pause(clock: Clock) -> None:
    server = LimitedServer(clock, lambda: RateLimitError("try again in 5s"), failures=1)
    with open_cache(server) as cache:
        with pytest.raises(RateLimitError):
            cache.embed("a")
        asyncio.run(cache.aembed("b"))
    assert server.starts[1] - server.starts[0] == pytest.approx(5, abs=0.2)


def test_an_interrupt_ends_a_pause(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupt(self: Any, seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BlockingPort, "sleep", interrupt)
    server = LimitedServer(clock, failures=1)
    with open_cache(server, max_retries=1) as cache, pytest.raises(KeyboardInterrupt):
        cache.embed("a")
    assert len(server.starts) == 1


def test_the_pause_does_not_count_as_the_calls_own_time(clock: Clock) -> None:
    server = LimitedServer(clock, lambda: RateLimitError("try again in 100s"), failures=1)
    with open_cache(server, max_retries=1, timeout=60.0) as cache:
        assert cache.embed("a").size == 2


# --- limits per minute --------------------------------------------------------------------------


@faces
def test_no_minute_has_more_requests_than_the_limit(asynchronous: bool, clock: Clock) -> None:
    server = LimitedServer(clock)
    with open_cache(server, asynchronous, max_batch=1, requests_per_minute=3, concurrency=1) as cache:
        assert not fetch(cache, [str(i) for i in range(10)], asynchronous).failed
    _check_windows([(start, 1) for start in server.starts], 3)
    assert server.starts[-1] - server.starts[0] == pytest.approx(180, abs=1)


@faces
def test_no_minute_has_more_tokens_than_the_limit(asynchronous: bool, clock: Clock) -> None:
    server = LimitedServer(clock)
    with open_cache(server, asynchronous, tokens_per_minute=10) as cache:
        assert not fetch(cache, [f"{i:04}" for i in range(7)], asynchronous).failed
    assert server.sizes == [2, 2, 2, 1], "a chunk never has more tokens than a minute"
    _check_windows([(start, 4 * size) for start, size in zip(server.starts, server.sizes, strict=True)], 10)


def test_a_text_with_more_tokens_than_a_minute_is_sent_alone(clock: Clock) -> None:
    server = LimitedServer(clock)
    with open_cache(server, tokens_per_minute=10) as cache:
        assert not cache.fetch(["1234", "x" * 50, "5678"]).failed
    assert server.sizes == [1, 1, 1]
    assert [start - server.starts[0] for start in server.starts] == pytest.approx([0, 60, 120])


def test_the_limit_holds_for_repeated_and_searched_requests(clock: Clock) -> None:
    server = LimitedServer(clock, lambda: ValueError("a text"), fails=lambda number: number in (1, 2, 3))
    with open_cache(server, requests_per_minute=2) as cache:
        cache.fetch([str(i) for i in range(8)])
    assert len(server.starts) > 3
    _check_windows([(start, 1) for start in server.starts], 2)


def test_a_call_that_is_interrupted_while_it_waits_uses_no_turn(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    server = LimitedServer(clock)
    with open_cache(server, requests_per_minute=1) as cache:
        cache.embed("a")

        async def interrupt(self: Any, seconds: float) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(BlockingPort, "sleep", interrupt)
            for _ in range(3):
                with pytest.raises(KeyboardInterrupt):
                    cache.embed("b")
        cache.embed("b")
    assert server.starts[1] - server.starts[0] == pytest.approx(60)


@given(
    st.lists(st.tuples(st.floats(0, 40), st.integers(0, 12)), max_size=60),
    st.none() | st.floats(0.3, 7),
    st.none() | st.integers(4, 12),
)
def test_turns_keep_to_both_limits(calls: list[tuple[float, int]], requests: float | None, tokens: int | None) -> None:
    clock = Clock()
    turns: list[tuple[float, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate, "time", SimpleNamespace(monotonic=clock.monotonic))
        calls_rate = CallRate(Limits(requests_per_minute=requests, tokens_per_minute=tokens))
        for gap, size in calls:
            clock.now += gap
            turns.append((calls_rate.reserve(size).start, size))
    starts = [start for start, _ in turns]
    assert starts == sorted(starts)
    if requests is not None:
        if requests < 1:
            assert all(b - a >= 60 / requests - 1e-6 for a, b in itertools.pairwise(starts))
        else:
            _check_windows([(start, 1) for start in starts], requests)
    if tokens is not None:
        _check_windows([(start, size) for start, size in turns if size <= tokens], tokens)


def _check_windows(amounts: list[tuple[float, int]], most: float) -> None:
    for first, _ in amounts:
        assert sum(amount for start, amount in amounts if first <= start < first + 60 - 1e-6) <= most


@pytest.mark.parametrize(
    "limits",
    [
        {"requests_per_minute": 0},
        {"requests_per_minute": -1},
        {"requests_per_minute": float("inf")},
        {"requests_per_minute": float("nan")},
        {"requests_per_minute": True},
        {"requests_per_minute": "60"},
        {"tokens_per_minute": 0},
        {"tokens_per_minute": float("nan")},
        {"max_retries": -1},
        {"max_retries": 1.5},
        {"max_retries": True},
        {"lease": 1},
    ],
)
def test_invalid_limits_are_refused(limits: dict[str, Any]) -> None:
    (name,) = limits
    with pytest.raises(ConfigError, match=f"limits.{name} must be"):
        Cache(wrap(lambda texts: [[1.0]], SPACE, Limits(**limits)), [MemoryBackend()])
