"""What a provider may charge without giving vectors is counted, so that nobody pays for it unseen."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from embedonce import Cache
from embedonce.contracts import Embedded, Limits, note_lost_request
from embedonce.drift import DriftGuard
from embedonce.errors import ErrorInAnswer, ProviderError, ProviderTimeout, TextRefused
from embedonce.keys import VectorSpace
from embedonce.testing.fakes import DictBackend
from embedonce.vectors import NO_WORK, Work


class Charging:
    """Answers as ``answer`` says: with what it returns, or with the error that it raises."""

    def __init__(self, answer: Callable[[Sequence[str]], Any], *, name: str = "charging") -> None:
        self.limits = Limits(max_batch=8)
        self.answer = answer
        self.name = name

    def space(self, task: str) -> VectorSpace:
        return VectorSpace(provider=self.name, model="m", dimensions=2)

    def embed(self, texts: Sequence[str], task: str) -> Any:
        return self.answer(texts)

    def close(self) -> None:
        pass


def embed(texts: Sequence[str], **fields: Any) -> Embedded:
    return Embedded(np.ones((len(texts), 2), np.float32), **{"tokens": 10 * len(texts), **fields})


def lose(count: int) -> None:
    for _ in range(count):
        note_lost_request()


def work(texts: int, tokens: int = 0, unknown: int = 0) -> Work:
    return Work(texts, tokens, 0.0, unknown, texts)


def raise_(error: Exception) -> Any:
    raise error


def refuse_and_report(texts: Sequence[str]) -> Any:
    error = ProviderError("the answer is invalid")
    error.tokens = 7
    raise error


TIMEOUT = type("ReadTimeout", (Exception,), {})

CASES: dict[str, tuple[Callable[[Sequence[str]], Any], Work]] = {
    "vectors": (embed, NO_WORK),
    "an invalid row": (lambda texts: Embedded([[1.0, 0.0], None][: len(texts)], 20), work(1, 10)),
    "a wrong number of vectors": (lambda texts: Embedded(np.ones((5, 2)), 20), work(2, 20)),
    "an answer that the provider refuses": (refuse_and_report, work(2, 7)),
    "an answer that the provider refuses and that reports nothing": (
        lambda texts: raise_(ProviderError("invalid")),
        work(2, unknown=2),
    ),
    "an invalid answer that reports nothing": (lambda texts: np.ones((5, 2)), work(2, unknown=2)),
    "a timeout": (lambda texts: raise_(ProviderTimeout("late")), work(2, unknown=2)),
    "a timeout of a client": (lambda texts: raise_(TIMEOUT()), work(2, unknown=2)),
    "a repeated timeout": (lambda texts: lose(3) or raise_(TIMEOUT()), work(6, unknown=6)),
    "a timeout before an answer": (lambda texts: lose(2) or embed(texts), work(4, 40)),
    "a timeout before an answer that reports nothing": (
        lambda texts: lose(2) or embed(texts, tokens=None),
        work(4, unknown=4),
    ),
    "a timeout before an invalid answer": (lambda texts: lose(1) or Embedded(np.ones((5, 2)), 20), work(4, 40)),
    "a timeout before an error": (lambda texts: lose(1) or raise_(ProviderError("invalid")), work(4, unknown=4)),
    "a refused connection": (lambda texts: raise_(ConnectionRefusedError()), NO_WORK),
    "a timeout of connecting": (lambda texts: raise_(type("ConnectTimeout", (TIMEOUT,), {})()), NO_WORK),
    "a timeout of waiting for a connection": (lambda texts: raise_(type("PoolTimeout", (TIMEOUT,), {})()), NO_WORK),
    "a text that is refused": (lambda texts: raise_(TextRefused("too long", range(len(texts)))), NO_WORK),
    "a status": (lambda texts: raise_(type("StatusError", (Exception,), {"status_code": 401})()), NO_WORK),
    "an error in an answer": (lambda texts: raise_(ErrorInAnswer("busy", 401)), NO_WORK),
}


@pytest.mark.parametrize("case", CASES)
def test_work_without_vectors_is_counted(case: str) -> None:
    answer, expected = CASES[case]
    with Cache(Charging(answer), [DictBackend()]) as cache:
        assert cache.fetch(["aa", "bb"]).wasted == expected
        if case == "vectors":
            assert cache.fetch(["aa", "bb"]).wasted == NO_WORK


def test_a_search_for_the_text_that_fails_counts_each_request() -> None:
    calls: list[int] = []

    def answer(texts: Sequence[str]) -> Any:
        calls.append(len(texts))
        return lose(1) or (raise_(ValueError("bad")) if "bad" in texts else embed(texts))

    with Cache(Charging(answer), [DictBackend()]) as cache:
        fetched = cache.fetch(["a", "bad", "c", "d"])
    assert list(fetched.failed) == [1]
    assert fetched.wasted.texts == sum(calls)


def test_what_the_provider_made_before_the_fallback_took_over_is_counted() -> None:
    def answer(texts: Sequence[str]) -> Any:
        return embed(texts) if "a" in texts else raise_(TIMEOUT())

    provider, fallback = Charging(answer), Charging(lambda texts: embed(texts, tokens=1), name="other")
    provider.limits = Limits(max_batch=1)
    with Cache(provider, [DictBackend()], fallback=fallback) as cache:
        fetched = cache.fetch(["a", "b"])
    assert fetched.space.provider == "other"
    assert fetched.computed.tokens == 1
    assert (fetched.wasted.texts, fetched.wasted.tokens, fetched.wasted.unknown_tokens) == (2, 10, 1)


def test_what_was_made_before_the_provider_drifted_is_counted() -> None:
    model = "first"

    def answer(texts: Sequence[str]) -> Any:
        return embed(texts, model=model)

    with Cache(Charging(answer), [DictBackend()], drift=DriftGuard(action="new-space", texts=["canary"])) as cache:
        assert cache.fetch(["a"]).wasted == NO_WORK, "canary texts are no work of the call"
        model = "second"
        fetched = cache.fetch(["b"])
        assert fetched.space.extra == {"drift": 1}
        assert (fetched.computed.tokens, fetched.wasted) == (10, work(1, 10))


def test_fresh_vectors_count_what_they_wasted() -> None:
    with Cache(Charging(lambda texts: lose(1) or embed(texts)), [DictBackend()]) as cache:
        assert cache.fetch(["a"], fresh=True).wasted == work(1, 10)


def test_chunks_that_fail_at_the_same_time_in_threads_are_all_counted() -> None:
    provider = Charging(lambda texts: raise_(TIMEOUT()))
    provider.limits = Limits(max_batch=1, concurrency=8)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with Cache(provider, [DictBackend()]) as cache:
            for _ in range(5):
                fetched = cache.fetch([str(i) for i in range(300)])
                assert fetched.wasted == work(300, unknown=300)
    finally:
        sys.setswitchinterval(interval)
