"""A text that makes a request fail is found with few requests, and the other texts are embedded and stored."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embedonce import Cache, Embedded, Limits, ProviderError, Tier
from embedonce.errors import ErrorInAnswer, TextRefused
from embedonce.events import Computed
from embedonce.functions import wrap
from embedonce.testing import DictBackend
from embedonce_backends.memory import MemoryBackend

SPACE = {"provider": "picky", "model": "picky"}
faces = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


class StatusError(Exception):
    """An exception of a vendor's client."""

    def __init__(self, message: str = "refused", status: int | None = 400, **fields: Any) -> None:
        super().__init__(message)
        if status is not None:
            self.status_code = status
        self.__dict__.update(fields)


class PickyServer:
    """Embeds texts, and fails as a whole if a text starts with ``bad`` or if there are too many texts."""

    def __init__(
        self,
        *,
        limit: int = 10**6,
        max_characters: int = 10**9,
        make_error: Callable[[], Exception] = StatusError,
        make_limit_error: Callable[[], Exception] = lambda: StatusError("batch size is invalid"),
    ) -> None:
        self.limit = limit
        self.max_characters = max_characters
        self.make_error = make_error
        self.make_limit_error = make_limit_error
        self.requests: list[list[str]] = []
        self.failures = 0
        self.in_a_row = 0
        self.most_in_a_row = 0
        self._lock = threading.Lock()

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        with self._lock:
            self.requests.append(list(texts))
            try:
                if len(texts) > self.limit or sum(map(len, texts)) > self.max_characters:
                    raise self.make_limit_error()
                if any(text.startswith("bad") for text in texts):
                    raise self.make_error()
            except Exception:
                self.failures += 1
                self.in_a_row += 1
                self.most_in_a_row = max(self.most_in_a_row, self.in_a_row)
                raise
            self.in_a_row = 0
        return [[float(len(text)), 1.0] for text in texts]

    async def aembed(self, texts: Sequence[str]) -> list[list[float]]:
        return self.embed(texts)


def open_cache(server: PickyServer, asynchronous: bool = False, **limits: Any) -> Cache:
    function: Any = server.aembed if asynchronous else server.embed
    return Cache(wrap(function, SPACE, Limits(**limits)), [MemoryBackend()])


def fetch(cache: Cache, texts: list[str], asynchronous: bool = False) -> Any:
    return asyncio.run(cache.afetch(texts)) if asynchronous else cache.fetch(texts)


def make_texts(count: int, bad: set[int]) -> list[str]:
    return [f"{'bad' if i in bad else 'good'} {i}" for i in range(count)]


def count_halvings(count: int) -> int:
    return max(1, (count - 1).bit_length())


@pytest.mark.parametrize("count", range(1, 41))
def test_one_bad_text_anywhere_costs_two_requests_per_halving(count: int) -> None:
    for bad in range(count):
        server = PickyServer()
        with open_cache(server) as cache:
            fetched = cache.fetch(make_texts(count, {bad}))
            assert sorted(fetched.failed) == [bad]
            assert [source for i, source in enumerate(fetched.sources) if i != bad] == ["provider"] * (count - 1)
        assert len(server.requests) <= 1 + (2 * count_halvings(count) if count > 1 else 0)
        assert [f"bad {bad}"] in server.requests, "a text is sent alone before it fails"


@settings(deadline=None)
@given(st.integers(1, 130), st.sets(st.integers(0, 129), max_size=6), st.booleans())
@example(20, {0, 1, 2, 3, 4}, False)
@example(20, {15, 16, 17, 18, 19}, False)
@example(64, {0, 1, 2, 61, 62, 63}, False)
def test_bad_texts_fail_alone_with_few_requests(count: int, positions: set[int], asynchronous: bool) -> None:
    bad = {i for i in positions if i < count}
    server = PickyServer()
    with open_cache(server, asynchronous) as cache:
        fetched = fetch(cache, make_texts(count, bad), asynchronous)
        if 4 * count_halvings(count) > server.most_in_a_row:
            assert set(fetched.failed) == bad
            assert cache.stats().providers["picky"].failed == len(bad)
        assert bad <= set(fetched.failed)
    assert len(server.requests) <= 1 + 2 * count_halvings(count) * len(bad)
    assert server.most_in_a_row <= 4 * count_halvings(count)


@settings(deadline=None)
@given(
    st.integers(1, 130),
    st.sets(st.integers(0, 129), max_size=4),
    st.integers(1, 40),
    st.integers(1, 50),
    st.integers(1, 3),
    st.booleans(),
)
def test_bad_texts_in_chunks_of_a_server_with_a_batch_limit(
    count: int, positions: set[int], limit: int, max_batch: int, concurrency: int, asynchronous: bool
) -> None:
    bad = {i for i in positions if i < count}
    server = PickyServer(limit=limit)
    texts = make_texts(count, bad)
    with open_cache(server, asynchronous, max_batch=max_batch, concurrency=concurrency) as cache:
        fetched = fetch(cache, texts, asynchronous)
        assert bad <= set(fetched.failed)
        if server.most_in_a_row < 4 * count_halvings(min(max_batch, count)):
            assert set(fetched.failed) == bad
        server.failures = 0
        again = fetch(cache, [f"new {i}" for i in range(count)], asynchronous)
        assert not again.failed


@pytest.mark.parametrize("count", [2, 3, 20, 100])
def test_a_provider_that_refuses_everything_is_left_alone(count: int) -> None:
    server = PickyServer()
    with open_cache(server) as cache:
        fetched = cache.fetch(make_texts(count, set(range(count))))
        assert len(fetched.failed) == count
        assert cache.stats().providers["picky"].failed == count
    assert len(server.requests) <= 4 * count_halvings(count)


@faces
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_provider_that_is_down_costs_few_requests_for_many_chunks(asynchronous: bool, concurrency: int) -> None:
    server = PickyServer()
    texts = make_texts(1000, set(range(1000)))
    with open_cache(server, asynchronous, max_batch=10, concurrency=concurrency) as cache:
        assert len(fetch(cache, texts, asynchronous).failed) == 1000
    assert len(server.requests) <= 4 * count_halvings(1000) + concurrency


def test_chunks_after_a_chunk_of_bad_texts_are_still_embedded() -> None:
    server = PickyServer()
    with open_cache(server, max_batch=16) as cache:
        fetched = cache.fetch(make_texts(160, set(range(16))))
        assert set(fetched.failed) <= set(range(16))
        assert set(fetched.sources[16:]) == {"provider"}


@faces
@pytest.mark.parametrize(
    "make_error",
    [
        lambda: StatusError("json: unsupported value: NaN", 500),
        lambda: StatusError("input cannot be an empty string", 400),
        lambda: StatusError("input is too large to process. increase the physical batch size", 500),
        lambda: StatusError("Unprocessable", 422),
        lambda: StatusError("Cannot embed 'bad 13': unauthorized entry is prohibited", 400),
        lambda: StatusError("this input has words about authentication and credentials", 400),
        lambda: StatusError("model vocab not found for this input", 400),
        lambda: StatusError("", None, response=SimpleNamespace(status_code=400)),
        lambda: StatusError("", None, code=SimpleNamespace(value=500)),
        lambda: ValueError("a local model cannot tokenize this"),
        lambda: TypeError("cannot read a vector of this answer"),
        lambda: RuntimeError("shape mismatch"),
        lambda: KeyError("embedding"),
        lambda: TextRefused("a text is refused"),
        lambda: TextRefused("a text is refused", [99]),
    ],
)
def test_any_refusal_is_isolated(asynchronous: bool, make_error: Callable[[], Exception]) -> None:
    server = PickyServer(make_error=make_error)
    with open_cache(server, asynchronous) as cache:
        fetched = fetch(cache, make_texts(20, {13}), asynchronous)
        assert {i: type(error) for i, error in fetched.failed.items()} == {13: type(make_error())}
        assert cache.lookup(make_texts(20, {13})).sources.count("memory") == 19
    assert len(server.requests) <= 11


class VendorAPIConnectionError(Exception): ...


class AuthenticationError(Exception): ...


def wrap_error(error: Exception) -> Exception:
    wrapper = RuntimeError("the framework failed")
    wrapper.__cause__ = error
    return wrapper


@faces
@pytest.mark.parametrize(
    "make_error",
    [
        *(lambda status=status: StatusError("no", status) for status in (401, 402, 403, 404, 407, 429)),
        lambda: StatusError("The model `bge-x` does not exist", 400),
        lambda: StatusError("API key not valid.", 400, body={"error": {"details": [{"reason": "API_KEY_INVALID"}]}}),
        lambda: StatusError("The model does not exist", 400, body={"error": {"code": "model_not_found"}}),
        lambda: StatusError("", None, response=SimpleNamespace(status=401)),
        lambda: StatusError(
            "", None, grpc_status_code="unknown", code=lambda: SimpleNamespace(name="PERMISSION_DENIED")
        ),
        lambda: wrap_error(StatusError("no", 403)),
        lambda: wrap_error(ConnectionResetError()),
        ConnectionError,
        TimeoutError,
        OSError,
        VendorAPIConnectionError,
        AuthenticationError,
        NotImplementedError,
        ImportError,
        lambda: ProviderError("the answer is invalid"),
    ],
)
def test_what_is_not_about_a_text_fails_all_texts_at_once(
    asynchronous: bool, make_error: Callable[[], Exception]
) -> None:
    server = PickyServer(make_error=make_error)
    with open_cache(server, asynchronous) as cache:
        fetched = fetch(cache, make_texts(20, {13}), asynchronous)
        assert set(fetched.failed) == set(range(20))
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [408, 502, 503, 504])
def test_an_overloaded_server_is_asked_a_few_times_only(status: int) -> None:
    server = PickyServer(make_error=lambda: StatusError("busy", status))
    with open_cache(server) as cache:
        assert len(cache.fetch(make_texts(256, set(range(256)))).failed) == 256
    assert len(server.requests) == 1 + 8 + 1, "as many as the search for the first text of the batch takes"


@faces
@pytest.mark.parametrize("status", [408, 409, 500, 502, 503, 504, 507])
@pytest.mark.parametrize("bad", [0, 13, 19])
def test_a_text_that_overloads_the_server_fails_alone(asynchronous: bool, status: int, bad: int) -> None:
    server = PickyServer(make_error=lambda: StatusError("busy", status))
    with open_cache(server, asynchronous) as cache:
        fetched = fetch(cache, make_texts(20, {bad}), asynchronous)
        assert set(fetched.failed) == {bad}
    assert len(server.requests) <= 1 + 2 * count_halvings(20)


def test_passing_overloads_limit_no_batch() -> None:
    class Busy(PickyServer):
        def embed(self, texts: Sequence[str]) -> list[list[float]]:
            if len(texts) == 100:
                self.requests.append(list(texts))
                raise StatusError("busy", 503)
            return super().embed(texts)

    server = Busy()
    with open_cache(server) as cache:
        for round in range(3):
            assert not cache.fetch([f"{round} {i}" for i in range(100)]).failed
    assert [len(request) for request in server.requests] == [100, 50, 50] * 3


def test_two_passing_failures_with_a_success_between_them_limit_no_batch() -> None:
    class Flaky(PickyServer):
        def embed(self, texts: Sequence[str]) -> list[list[float]]:
            if len(self.requests) in (0, 4):
                self.requests.append(list(texts))
                raise StatusError("internal error", 500)
            return super().embed(texts)

    server = Flaky()
    with open_cache(server) as cache:
        for round in range(4):
            assert not cache.fetch([f"{round} {i}" for i in range(100)]).failed
    assert [len(request) for request in server.requests] == [100, 50, 50, 100, 100, 50, 50, 100]


def test_failures_of_calls_at_the_same_time_limit_no_batch() -> None:
    """When an outage ends, all calls that were under way look as if they had been too large."""

    class Outage(PickyServer):
        async def aembed(self, texts: Sequence[str]) -> list[list[float]]:
            if len(self.requests) in (1, 2):
                self.requests.append(list(texts))
                while len(self.requests) < 3:  # both calls have been sent before one of them fails
                    await asyncio.sleep(0)
                raise StatusError("internal error", 500)
            return self.embed(texts)

    server = Outage()

    async def run(cache: Cache) -> None:
        await cache.aembed("the first call shows the number of dimensions, and other calls wait for that")
        for fetched in await asyncio.gather(*(cache.afetch([f"{call} {i}" for i in range(100)]) for call in range(2))):
            assert not fetched.failed
        await cache.afetch([f"more {i}" for i in range(100)])

    with open_cache(server, asynchronous=True, concurrency=2) as cache:
        asyncio.run(run(cache))
    assert [len(request) for request in server.requests] == [1, 100, 100, 50, 50, 50, 50, 100]


@pytest.mark.parametrize("row", [None, [float("nan"), 1.0]])
def test_a_text_that_fails_alone_does_not_bring_in_the_fallback(row: Any) -> None:
    calls: list[list[str]] = []

    def embed_second(texts: list[str]) -> list[list[float]]:
        calls.append(texts)
        return [[1.0, 2.0] for _ in texts]

    def embed_first(texts: list[str]) -> Embedded:
        if row is None and any(text.startswith("bad") for text in texts):
            raise StatusError("refused", 500)
        return Embedded([row if text.startswith("bad") else [1.0, 1.0] for text in texts])

    dimensions = {**SPACE, "dimensions": 2}
    first, second = wrap(embed_first, dimensions), wrap(embed_second, {**dimensions, "model": "second"})
    with Cache(first, [MemoryBackend()], fallback=second) as cache:
        assert set(cache.fetch(make_texts(20, {13})).failed) == {13}
        assert calls == []
        assert cache.fetch(["bad alone"]).sources == ["provider"]
        assert calls == [["bad alone"]], "nothing shows that the first provider works"


@pytest.mark.parametrize("quote", [str, repr, json.dumps])
def test_the_words_of_a_text_in_a_message_are_not_read(quote: Callable[[str], str]) -> None:
    text = 'bad: "API key not valid", says this model, which does not exist'

    class Echoing(PickyServer):
        def embed(self, texts: Sequence[str]) -> list[list[float]]:
            if text in texts:
                raise StatusError(f"Cannot embed {quote(text)}", 400)
            return super().embed(texts)

    with open_cache(Echoing()) as cache:
        assert set(cache.fetch(["good 1", text, "good 2", "good 3"]).failed) == {1}


def test_a_number_in_a_text_that_a_message_repeats_is_no_batch_limit() -> None:
    text = "bad: a batch has at most 2 inputs"

    class Echoing(PickyServer):
        def embed(self, texts: Sequence[str]) -> list[list[float]]:
            if text in texts:
                self.requests.append(list(texts))
                raise StatusError(f"Cannot embed {text!r}", 400)
            return super().embed(texts)

    server = Echoing()
    with open_cache(server) as cache:
        assert set(cache.fetch([*make_texts(20, set()), text]).failed) == {20}
        server.requests.clear()
        cache.embed_batch([f"more {i}" for i in range(20)])
    assert len(server.requests) == 1, "no batch limit was learned"


def test_an_unrelated_exception_that_was_being_handled_says_nothing_about_the_error() -> None:
    def make_error() -> Exception:
        error = ValueError("a text")
        error.__context__ = ConnectionError()
        return error

    server = PickyServer(make_error=make_error)
    with open_cache(server) as cache:
        assert set(cache.fetch(make_texts(20, {3})).failed) == {3}


def test_a_response_whose_body_is_read_by_a_coroutine_is_left_alone() -> None:
    class AioResponse:
        async def text(self) -> str:
            return "the model was not found"

    server = PickyServer(make_error=lambda: StatusError("refused", 400, response=AioResponse()))
    with open_cache(server) as cache:
        assert set(cache.fetch(make_texts(20, {3})).failed) == {3}


def test_an_interrupt_ends_the_search() -> None:
    class Interrupting(PickyServer):
        def embed(self, texts: Sequence[str]) -> list[list[float]]:
            if len(self.requests) == 2:
                raise KeyboardInterrupt
            return super().embed(texts)

    with open_cache(Interrupting()) as cache, pytest.raises(KeyboardInterrupt):
        cache.fetch(make_texts(20, {3}))


def test_a_passing_failure_of_a_server_fails_no_text_and_limits_no_batch() -> None:
    class Flaky(PickyServer):
        def embed(self, texts: Sequence[str]) -> list[list[float]]:
            if not self.requests:
                self.requests.append(list(texts))
                raise StatusError("internal error", 500)
            return super().embed(texts)

    server = Flaky()
    with open_cache(server) as cache:
        assert not cache.fetch(make_texts(100, set())).failed
        assert [len(request) for request in server.requests] == [100, 50, 50]
        cache.embed_batch([f"more {i}" for i in range(100)])
    assert len(server.requests) == 4


def test_each_request_that_works_is_stored_before_the_next_one() -> None:
    backend = DictBackend()
    stored: list[int] = []

    class Watching(PickyServer):
        def embed(self, texts: Sequence[str]) -> list[list[float]]:
            stored.append(len(backend))
            return super().embed(texts)

    server = Watching()
    with Cache(server.embed, space=SPACE, tiers=[Tier(backend, write="inline")]) as cache:
        cache.fetch(make_texts(8, {7}))
    assert stored == [0, 0, 4, 4, 6, 7]


def test_counts_of_requests_and_texts() -> None:
    server = PickyServer()
    events: list[Any] = []
    with open_cache(server) as cache:
        cache.subscribe(events.append)
        cache.fetch(make_texts(8, {7}))
        stats = cache.stats().providers["picky"]
    computed = [event for event in events if isinstance(event, Computed)]
    assert [(event.texts, event.failed) for event in computed] == [(0, 8), (4, 0), (0, 4), (2, 0), (1, 0), (0, 1)]
    assert (stats.texts, stats.failed) == (7, 1)


def test_another_call_that_waits_for_a_bad_text_gets_its_error() -> None:
    entered, release = threading.Event(), threading.Event()

    class Slow(PickyServer):
        def embed(self, texts: Sequence[str]) -> list[list[float]]:
            entered.set()
            release.wait()
            return super().embed(texts)

    with open_cache(Slow()) as cache, ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.fetch, make_texts(8, {5}))
        entered.wait()
        second = pool.submit(cache.fetch, make_texts(8, {5}))
        release.set()
        assert set(first.result().failed) == set(second.result().failed) == {5}


# --- rows that are not vectors ------------------------------------------------------------------

GOOD = [1.0, 2.0]


@faces
@pytest.mark.parametrize("known", [True, False], ids=["dimensions known", "dimensions not known"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "no vector"),
        ([float("nan"), 1.0], "NaN or infinity"),
        ([1.0, float("inf")], "NaN or infinity"),
        ([1e39, 1.0], "NaN or infinity"),
        ([0.0, 0.0], "zeros"),
        ([1.0, 2.0, 3.0], "3 dimensions"),
        ([1.0], "1 dimension "),
        ([], "not numbers"),
        ([1.0, None], "not numbers"),
        (["a", "b"], "not numbers"),
        ("text", "not numbers"),
        (7.0, "not numbers"),
        (np.array([np.nan, 1.0]), "NaN or infinity"),
    ],
)
def test_a_row_that_is_no_vector_fails_its_text(asynchronous: bool, known: bool, bad: Any, message: str) -> None:
    calls: list[int] = []

    def embed(texts: Sequence[str]) -> Any:
        calls.append(len(texts))
        return Embedded([bad if text == "bad" else GOOD for text in texts], 7)

    async def aembed(texts: Sequence[str]) -> Any:
        return embed(texts)

    space = {**SPACE, "dimensions": 2} if known else SPACE
    function: Any = aembed if asynchronous else embed
    with Cache(function, [MemoryBackend()], space=space) as cache:
        fetched = fetch(cache, ["a", "bad", "b", "c"], asynchronous)
        assert set(fetched.failed) == {1}
        assert type(fetched.failed[1]) is ProviderError
        assert message in str(fetched.failed[1])
        assert fetched.sources == ["provider", None, "provider", "provider"]
        assert all((row == GOOD).all() for i, row in enumerate(fetched.rows) if i != 1)
        stats = cache.stats().providers["picky"]
        assert (stats.texts, stats.failed, stats.tokens) == (3, 1, 7)
        assert calls == [4]


@pytest.mark.parametrize(
    "matrix",
    [
        np.array([[1, 2], [np.nan, 1], [3, 4]]),
        np.array([[1, 2], [0, 0], [3, 4]], np.float16),
        np.array([[1, 2], [np.inf, 0], [3, 4]], np.float32),
    ],
)
def test_rows_of_a_numpy_matrix_fail_alone(matrix: Any) -> None:
    with Cache(lambda texts: matrix, [MemoryBackend()], space=SPACE) as cache:
        fetched = cache.fetch(["a", "b", "c"])
        assert fetched.sources == ["provider", None, "provider"]
        assert [row.tolist() for row in fetched.rows if row is not None] == [[1.0, 2.0], [3.0, 4.0]]


def test_a_row_that_cannot_be_rounded_fails_alone() -> None:
    with Cache(
        lambda texts: [[1e6, 1.0] if text == "b" else GOOD for text in texts],
        [MemoryBackend()],
        space=SPACE,
        dtype="float16",
    ) as cache:
        assert set(cache.fetch(["a", "b", "c"]).failed) == {1}


def test_an_iterator_of_rows_is_read_once() -> None:
    with Cache(lambda texts: iter([GOOD, [0.0, 0.0], GOOD]), [MemoryBackend()], space=SPACE) as cache:
        assert set(cache.fetch(["a", "b", "c"]).failed) == {1}


@pytest.mark.parametrize(
    "answer",
    [
        [None, None, None],
        [[0.0, 0.0]] * 3,
        [[1.0], [1.0, 2.0], [1.0, 2.0, 3.0]],
        [GOOD, GOOD],
        [GOOD] * 4,
        np.zeros((3, 0)),
    ],
)
def test_an_answer_without_valid_rows_or_with_a_wrong_count_fails_as_a_whole(answer: Any) -> None:
    calls: list[int] = []

    def embed(texts: list[str]) -> Any:
        calls.append(len(texts))
        return answer

    with Cache(embed, [MemoryBackend()], space=SPACE) as cache:
        assert set(cache.fetch(["a", "b", "c"]).failed) == {0, 1, 2}
    assert calls == [3]


@faces
@pytest.mark.parametrize(
    ("code", "is_searched"),
    [(401, False), ("invalid_api_key", False), (429, False), ("rate_limit_exceeded", False), (400, True), (None, True)],
)
def test_the_code_of_an_error_in_an_answer_is_read_like_a_status(
    code: Any, is_searched: bool, asynchronous: bool
) -> None:
    server = PickyServer(make_error=lambda: ErrorInAnswer("the answer contains an error", code))
    with open_cache(server, asynchronous) as cache:
        assert len(fetch(cache, make_texts(64, set(range(64))), asynchronous).failed) == 64
    assert (len(server.requests) > 1) == is_searched
    assert len(server.requests) <= 4 * 6


@faces
@pytest.mark.parametrize("row", [[float("nan"), 1.0], [0.0, 0.0], None, ["x", "y"]])
def test_an_invalid_answer_to_a_single_text_does_not_end_the_search(row: Any, asynchronous: bool) -> None:
    class Server(PickyServer):
        def embed(self, texts: Sequence[str]) -> list[Any]:
            vectors: list[Any] = super().embed(texts)
            return [row if text == "no vector" else vector for text, vector in zip(texts, vectors, strict=True)]

    texts = ["bad", "no vector", "good", "too"]
    with open_cache(Server(), asynchronous) as cache:
        assert set(fetch(cache, texts, asynchronous).failed) == {0, 1}


def test_put_refuses_all_vectors_if_one_is_invalid() -> None:
    with Cache(lambda texts: [GOOD] * len(texts), [MemoryBackend()], space=SPACE) as cache:
        with pytest.raises(ProviderError, match="zeros"):
            cache.put(["a", "b"], [GOOD, [0.0, 0.0]])
        assert cache.lookup(["a"]).sources == [None]


# --- batch sizes --------------------------------------------------------------------------------


@faces
@pytest.mark.parametrize(
    ("message", "status", "accepted"),
    [
        ("batch size is invalid, it should not be larger than 10.: input.contents", 400, 10),
        ("Too many inputs. The max number of inputs is 10.", 400, 10),
        ("batch size 100 > maximum allowed batch size 10", 413, 10),
        ("total number of texts must be at most 10 - received 100", 400, 10),
        ("expected maximum item count: 10, found: 100 (texts)", 422, 10),
        ("at most 10 requests can be in one batch", 400, 10),
        ("batch size is invalid", 400, 6),
        ("payload too large", 413, None),
        ("error", 422, 6),
        ("internal error", 500, 6),
        ("too many texts", None, 6),
    ],
)
def test_a_batch_size_that_is_refused_is_halved_until_it_works(
    asynchronous: bool, message: str, status: int | None, accepted: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    server = PickyServer(limit=10, make_limit_error=lambda: StatusError(message, status))
    with open_cache(server, asynchronous) as cache, caplog.at_level(logging.WARNING, "embedonce"):
        assert not fetch(cache, [f"first {i:03}" for i in range(100)], asynchronous).failed
        server.failures = 0
        assert not fetch(cache, [f"other {i:03}" for i in range(100)], asynchronous).failed
        assert server.failures == 0, "the size that worked must be remembered"
    (warning,) = [record.message for record in caplog.records if "refuses" in record.message]
    if accepted is not None:
        assert f"set batch_size = {accepted} in [provider]" in warning
        assert f"Limits(max_batch={accepted})" in warning
    if accepted == 10:
        assert max(len(request) for request in server.requests[-10:]) == 10


@pytest.mark.parametrize("number", ["1,000", "1000", "1 000"])
def test_a_number_with_thousands_is_read(number: str) -> None:
    server = PickyServer(limit=1000, make_limit_error=lambda: StatusError(f"at most {number} inputs are allowed", 400))
    with open_cache(server, max_batch=2048) as cache:
        assert not cache.fetch([f"text {i}" for i in range(1500)]).failed
    assert [len(request) for request in server.requests] == [1500, 1000, 500]


def test_a_limit_on_the_size_of_a_request_does_not_limit_the_number_of_short_texts() -> None:
    server = PickyServer(max_characters=1000, make_limit_error=lambda: StatusError("bad request", 400))
    with open_cache(server) as cache:
        assert not cache.fetch([f"{i} ".ljust(800, "x") for i in range(16)]).failed
        server.failures = 0
        del server.requests[:]
        assert not cache.fetch([f"short {i}" for i in range(100)]).failed
        assert server.failures == 0
        assert len(server.requests) <= 8
        assert not cache.fetch([f"{i} ".ljust(400, "y") for i in range(16)]).failed


def test_a_number_of_tokens_in_a_message_is_no_number_of_texts() -> None:
    error = StatusError("the inputs have more tokens than the limit of 8192 tokens, at most 20 tokens", 400)
    server = PickyServer(make_error=lambda: error)
    with open_cache(server) as cache:
        assert set(cache.fetch(make_texts(100, {40})).failed) == {40}
        cache.embed_batch([f"more {i}" for i in range(100)])
    assert len(server.requests[-1]) == 100
