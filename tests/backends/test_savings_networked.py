"""Four processes share a Redis, Postgres or disk tier: their records add up to what the API counted."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from decimal import Decimal
from multiprocessing.pool import Pool
from typing import Any

import children
import pytest
from optional import needs

from embedonce import config
from embedonce.savings import add_up, group_savings
from embedonce.testing import OpenAIServer

pytestmark = needs("openai")

OPTIONS = {
    "redis": lambda request: {"url": request.getfixturevalue("redis_server").url, "prefix": "savings:"},
    "postgres": lambda request: {"url": request.getfixturevalue("postgres_server").url, "table": "savings"},
    "disk": lambda request: {"path": str(request.getfixturevalue("tmp_path") / "disk")},
}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Four processes. The tests share them, because a process imports the client for longer than it embeds."""
    with multiprocessing.get_context("spawn").Pool(4) as processes:
        yield processes


@pytest.mark.parametrize("kind", OPTIONS)
def test_savings_of_four_processes_equal_what_the_api_counted(
    kind: str, pool: Pool, request: pytest.FixtureRequest
) -> None:
    shared = {"type": kind, **OPTIONS[kind](request), "timeout": "60s"}
    tiers: list[dict[str, Any]] = [{"type": "memory", "max_entries": 60}, shared]
    with OpenAIServer() as api:
        requested = sum(pool.starmap(children.embed_with_api, [(tiers, api.base_url, seed) for seed in range(4)]))
        charged = sum(api.tokens_of(text) * times for text, times in api.count.items())
        texts = api.count.total()
    with config.open({"provider": {"type": "ngram"}, "tiers": tiers}) as cache:
        found = cache.savings()
    sums = add_up(found.records)
    assert len(found.records) == len({record.process for record in found.records}) == 4
    assert (sums.computed.texts, sums.computed.tokens) == (texts, charged)
    assert sums.spent == {"USD": Decimal("0.02") * charged / 1_000_000}
    # Each requested text was computed or saved. What a process computed is stored with its cost, and no cost is lost.
    assert sums.computed.texts + sums.saved.texts == requested == 4 * 650
    assert sums.saved.unknown_tokens == sums.saved.unknown_seconds == 0
    each = {text: api.tokens_of(text) for text in api.count}
    assert len(each) == 200
    expected = 4 * (3 * sum(each.values()) + sum(list(dict(sorted(each.items(), key=_number)).values())[:50]))
    assert sums.computed.tokens + sums.saved.tokens == pytest.approx(expected, rel=0.01)
    assert list(group_savings(found.records, "tier"))[-1] == "provider"


def _number(item: tuple[str, int]) -> int:
    return int(item[0].split()[1])
