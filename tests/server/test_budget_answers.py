"""What clients of the endpoint see when a budget is used up, or when its file cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serving import KEY, serve

from embedonce.testing.servers.openai import OpenAIServer

HEADERS = {"authorization": f"Bearer {KEY}"}


def configure(api: OpenAIServer, tokens_per_day: int) -> dict[str, Any]:
    provider = {"type": "openai", "model": "m", "base_url": api.base_url, "api_key": "upstream-key"}
    tenant = {"name": "search", "keys": [KEY], "tokens_per_day": tokens_per_day}
    return {"provider": provider, "tiers": [{"type": "memory"}], "serve": {"tenants": [tenant]}}


async def test_beyond_the_budget_the_answer_says_when_to_come_back_and_hits_are_answered(
    api: OpenAIServer, tmp_path: Path
) -> None:
    text = "tea is ready " * 20
    async with serve(configure(api, api.tokens_of(text)), tmp_path) as server:
        first = await server.embed(text, headers=HEADERS)
        assert (first.status, first.cache[0]) == (200, "miss")
        refused = await server.embed([text, "another text"], headers=HEADERS)
        assert (refused.status, refused.error["type"], refused.error["code"]) == (
            429,
            "rate_limit_error",
            "tokens_per_day_exceeded",
        )
        assert 1 <= int(refused.headers["retry-after"]) <= 86_400
        assert refused.headers["x-should-retry"] == "false"
        assert refused.error["message"].startswith('tenant "search" has 0 tokens left today (UTC), fewer than')
        assert "tea" not in refused.error["message"]
        assert (await server.embed(text, headers=HEADERS)).cache == ("hit", 1, 0)
        fresh = await server.embed(text, headers={**HEADERS, "cache-control": "no-cache"})
        assert fresh.status == 429
        assert len(api.requests) == 1


async def test_a_tenant_without_tokens_is_told_to_use_cached_texts(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api, 0), tmp_path) as server:
        refused = await server.embed("a", headers=HEADERS)
        assert refused.status == 429
        assert refused.error["message"] == (
            'tenant "search" gets only cached texts (tokens_per_day = 0), and at least one input is not cached'
        )


async def test_without_the_file_misses_get_503_and_hits_are_answered(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api, 1000), tmp_path) as server:
        await server.embed("a", headers=HEADERS)
        server.service.budgets.close()
        refused = await server.embed(["a", "b"], headers=HEADERS)
        assert (refused.status, refused.error["code"]) == (503, "budgets_unavailable")
        assert refused.headers["retry-after"] == "5"
        assert (await server.embed("a", headers=HEADERS)).cache == ("hit", 1, 0)


async def test_usage_and_headers_of_a_request_that_is_sent_in_parts_are_those_of_one_request(
    api: OpenAIServer, tmp_path: Path
) -> None:
    texts = [f"text {i} " * 10 for i in range(6)]
    tokens = sum(map(api.tokens_of, texts))
    async with serve(configure(api, 2 * tokens), tmp_path) as server:
        await server.embed(texts[:2], headers=HEADERS)
        answer = await server.embed(texts, headers=HEADERS)
        assert answer.cache == ("partial", 2, 4)
        assert answer.json["usage"]["prompt_tokens"] == sum(map(api.tokens_of, texts[2:]))
        assert answer.headers["x-embedonce-saved-tokens"] == str(sum(map(api.tokens_of, texts[:2])))
