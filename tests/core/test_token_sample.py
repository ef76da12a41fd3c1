"""The limits of a measured number of tokens contain the real number in about 95 of 100 cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from embedonce._engine.token_sample import MAX_CALLS, TokenBound, TokenSample, compute_quantile
from embedonce.vectors import apportion

LANGUAGES = (0.22, 0.25, 0.35, 0.6)
"""Tokens per byte."""


class Corpus(NamedTuple):
    sizes: NDArray[np.int64]
    tokens: NDArray[np.int64]
    is_missing: NDArray[np.bool_]


def make_corpus(rng: np.random.Generator, texts: int, missing: int, *, document: int, special: int) -> Corpus:
    """Make texts of different lengths and languages. The ``document`` texts of a document have one language.

    Whole documents are missing, and each text has some special tokens.
    """
    documents = -(-texts // document)
    languages = np.repeat(rng.choice(LANGUAGES, documents), document)[:texts]
    sizes = np.maximum(1, rng.lognormal(6, 1, texts)).astype(np.int64)
    tokens = np.maximum(1, sizes * languages * rng.lognormal(0, 0.15, texts)).astype(np.int64) + special
    order = rng.permutation(documents)[: missing // document]
    return Corpus(sizes, tokens, np.repeat(np.isin(np.arange(documents), order), document)[:texts])


def measure(corpus: Corpus, calls: Sequence[int]) -> tuple[TokenBound, int]:
    """Return the bound for the missing texts, and their real tokens. The other texts were embedded in some calls."""
    sample = TokenSample()
    cached = np.flatnonzero(~corpus.is_missing)
    start = 0
    for number, length in enumerate(calls):
        rows = cached[start : start + length]
        start += length
        if not rows.size:
            break
        shares = apportion(int(corpus.tokens[rows].sum()), corpus.sizes[rows].tolist())
        for row, share in zip(rows, shares, strict=True):
            sample.add(1.7e9 + 0.37 * number, share, int(corpus.sizes[row]))
    missing = corpus.is_missing
    bound = sample.estimate(int(missing.sum()), int(corpus.sizes[missing].sum()))
    return bound, int(corpus.tokens[missing].sum())


@pytest.mark.slow
@pytest.mark.parametrize("special", [0, 20])
@pytest.mark.parametrize(
    ("calls", "missing", "document", "least", "widest"),
    [
        ([32] * 30, 2000, 1, 0.92, 0.08),
        ([32] * 5, 2000, 1, 0.9, 0.35),
        ([256] * 8, 4000, 1, 0.9, 0.06),
        ([32, 2048, 64, 512, 1024, 32, 256, 2048, 128, 512, 1024, 1024], 4000, 1, 0.92, 0.05),
        ([1] * 60, 500, 1, 0.88, 0.25),
        ([256] * 12, 4000, 50, 0.88, 0.25),
    ],
)
def test_the_real_number_lies_between_the_limits(
    calls: list[int], missing: int, document: int, special: int, least: float, widest: float
) -> None:
    trials, inside, widths = 150, 0, []
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        corpus = make_corpus(rng, sum(calls) + missing, missing, document=document, special=special)
        bound, real = measure(corpus, calls)
        assert bound.is_measured
        assert bound.least <= bound.tokens <= bound.most
        inside += bound.least <= real <= bound.most
        widths.append((bound.most - bound.least) / 2 / real)
    assert inside / trials >= least
    assert np.median(widths) <= widest


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042), (1e6, 1.96)]
)
def test_the_quantile_is_that_of_the_table(freedom: float, quantile: float) -> None:
    assert compute_quantile(freedom) == pytest.approx(quantile, rel=0.01)


def add_calls(sample: TokenSample, sizes: Sequence[int], first: float = 0.0) -> None:
    for number, size in enumerate(sizes):
        sample.add(first + number, size // 4 + number % 3, size)


@pytest.mark.parametrize(
    ("sizes", "is_measured"),
    [
        ([], False),
        ([400], False),
        ([400] * 3, False),
        ([400] * 4, True),
        ([400] * 100, True),
        ([400_000, *[4] * 30], False),
        ([0] * 30, False),
    ],
)
def test_limits_need_several_calls_of_similar_size(sizes: list[int], is_measured: bool) -> None:
    sample = TokenSample()
    add_calls(sample, sizes)
    bound = sample.estimate(10, 1600)
    assert bound.is_measured == is_measured
    if not is_measured:
        assert bound.least <= 100 <= bound.tokens <= bound.most
        assert (bound.least, bound.most) in ((100, 1640), (100, bound.tokens))


def test_the_texts_of_one_call_are_no_independent_sample() -> None:
    sample = TokenSample()
    for _ in range(1000):
        sample.add(7.0, 25, 100)
    assert sample.estimate(10, 1000) == TokenBound(250, 62, 1040, is_measured=False)
    assert sample.texts == 1000


def test_many_calls_need_little_memory_and_lose_nothing() -> None:
    sample = TokenSample()
    dates = np.random.default_rng(0).permutation(3 * MAX_CALLS)
    for date in dates.tolist():
        sample.add(float(date), 5, 20)
    assert len(sample._calls) <= MAX_CALLS
    assert sum(tokens for tokens, _ in sample._calls.values()) == 5 * len(dates)
    assert sample.estimate(10, 200) == TokenBound(50, 50, 50, is_measured=True)


def test_longer_texts_have_another_share_of_special_tokens() -> None:
    sample = TokenSample()
    for number in range(10):
        sample.add(float(number), 2 + 25, 100)
    real = 10 * (2 + 250)
    bound = sample.estimate(10, 10_000)
    assert bound.least <= real <= bound.most
    assert bound.least > real * 0.8


def test_limits_stay_possible() -> None:
    sample = TokenSample()
    for number in range(8):
        sample.add(float(number), 1 if number % 2 else 400, 400)
    bound = sample.estimate(1, 160)
    assert (bound.least, bound.most) == (10, 164)
    assert sample.estimate(0, 0) == TokenBound(0, 0, 0, is_measured=True)
