"""``/admin/*`` of one worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from admin_calls import ADMIN, TENANTS, ask, configure, is_cached, key_of, make_disk_unlistable, with_tenants
from serving import ADMIN_KEY, KEY, serve

from embedonce.testing.servers.openai import OpenAIServer

# --- stats ------------------------------------------------------------------------------------


async def test_stats_have_counters_models_tenants_and_contents_on_demand(tmp_path: Path) -> None:
    async with serve(with_tenants(tmp_path), tmp_path) as server:
        for _ in range(2):
            await server.embed("a private text", headers=key_of("search"))
        answer = await server.call("GET", "/admin/stats", headers=ADMIN)
        stats = answer.json
        assert (stats["status"], stats["requested"], stats["found"]) == ("ready", 2, 1)
        assert stats["tiers"]["memory"]["hits"] == 1
        assert stats["providers"]["ngram"]["texts"] == 1
        assert [(model["name"], model["dimensions"]) for model in stats["models"]] == [("one", 64), ("two", 128)]
        assert [(tenant["name"], tenant["tokens_per_day"]) for tenant in stats["tenants"]] == [
            ("search", None),
            ("other", 1000),
        ]
        assert "contents" not in stats
        for secret in (b"private", KEY.encode(), ADMIN_KEY.encode(), b"sha256:"):
            assert secret not in answer.body
        answer = await server.call("GET", "/admin/stats?contents=true", headers=ADMIN)
        assert [held["entries"] for held in answer.json["contents"]] == [1, 1]
        assert (await server.call("GET", "/admin/stats?contents=yes", headers=ADMIN)).status == 400


async def test_stats_show_money_at_the_price_of_each_model(api: OpenAIServer, tmp_path: Path) -> None:
    provider = {"type": "openai", "base_url": api.base_url, "api_key": "k"}
    prices = {"usd": "1 USD / 1 token", "eur": "2 EUR / 1 token"}
    models = [{"name": name, "provider": {**provider, "model": name, "price": p}} for name, p in prices.items()]
    async with serve(
        {"tiers": [{"type": "memory"}], "serve": {"admin_key": ADMIN_KEY, "models": models}}, tmp_path
    ) as s:
        for name in prices:
            for _ in range(2):
                await s.embed("abc", model=name)
        stats = (await s.call("GET", "/admin/stats", headers=ADMIN)).json
        tokens = api.tokens_of("abc")
        assert stats["spent"] == stats["money_saved"] == {"USD": str(tokens), "EUR": str(2 * tokens)}
        assert stats["providers"]["openai"]["texts"] == 2


# --- explain ----------------------------------------------------------------------------------


async def test_explain_shows_the_key_and_the_tiers_but_not_the_text(tmp_path: Path) -> None:
    async with serve(with_tenants(tmp_path), tmp_path) as server:
        await server.embed("a private text", headers=key_of("search"), model="two")
        found = await ask(server, "explain", {"input": "a private text", "model": "two", "tenant": "search"})
        assert (found.json["found"], found.json["model"]) == ("memory", "two")
        assert found.json["tiers"] == {"memory": "hit", "disk": "hit"}
        assert found.json["policy"]["namespace"] == "search"
        other = await ask(server, "explain", {"input": "a private text", "model": "two", "tenant": "other"})
        assert other.json["found"] is None
        assert any("namespace 'search'" in reason for reason in other.json["reasons"])
        assert b"private" not in found.body + other.body


async def test_explain_of_other_dimensions_opens_no_space_for_good(tmp_path: Path) -> None:
    async with serve(configure(tmp_path), tmp_path) as server:
        await server.embed("a", dimensions=64)
        assert (await ask(server, "explain", {"input": "a", "dimensions": 64})).json["found"] == "memory"
        assert (await ask(server, "explain", {"input": "a", "dimensions": 32})).json["found"] is None
        [model] = server.service.generation.models
        assert len(model.roots) == 2


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": ["a"]}, 400, "input"),
        ({"input": "a"}, 400, "model"),  # there are two
        ({"input": "a", "model": "unknown"}, 404, "model"),
        ({"input": "a", "model": ""}, 400, "model"),
        ({"input": "a", "model": "one", "tenant": "unknown"}, 404, "tenant"),
        ({"input": "a", "model": "one", "tenant": 1}, 400, "tenant"),
        ({"input": "a", "model": "one", "task": 1}, 400, "task"),
        ({"input": "a", "model": "one", "task": "qurey"}, 400, "task"),
        ({"input": "a", "model": "one", "dimensions": 0}, 400, "dimensions"),
        ({"input": "a", "model": "one", "dimensions": True}, 400, "dimensions"),
    ],
)
async def test_invalid_fields_are_named(tmp_path: Path, fields: dict[str, Any], status: int, param: str) -> None:
    async with serve(with_tenants(tmp_path), tmp_path) as server:
        answer = await ask(server, "explain", fields)
        assert (answer.status, answer.error["param"]) == (status, param)


# --- purge ------------------------------------------------------------------------------------


async def test_purge_counts_first_and_removes_when_asked(tmp_path: Path) -> None:
    async with serve(with_tenants(tmp_path), tmp_path) as server:
        for tenant in TENANTS:
            await server.embed(["a", "b"], headers=key_of(tenant))
        for _ in range(2):
            dry = await ask(server, "purge", {"tenant": "search"})
            assert dry.json["dry_run"]
            assert dry.json["removed"] == {"memory": 2, "disk": 2}
        [card] = dry.json["scopes"].values()
        assert card["namespace"] == "search"
        done = await ask(server, "purge", {"tenant": "search", "dry_run": False})
        assert done.json == {**dry.json, "dry_run": False}
        assert not await is_cached(server, "a", tenant="search")
        assert await is_cached(server, "a", tenant="other")


@pytest.mark.parametrize("part", ["scope", "model", "version", "namespace"])
async def test_purge_by_each_part(tmp_path: Path, part: str) -> None:
    async with serve(with_tenants(tmp_path), tmp_path) as server:
        await server.embed("a", headers=key_of("search"))
        [scope] = (await ask(server, "purge", {"tenant": "search"})).json["scopes"]
        value = {"scope": scope, "model": "one", "version": "v1", "namespace": "search"}[part]
        answer = await ask(server, "purge", {part: value, "dry_run": False})
        assert answer.json["removed"] == {"memory": 1, "disk": 1}
        nothing = await ask(server, "purge", {part: "unknown", "dry_run": False})
        assert sum(nothing.json["removed"].values()) == 0


@pytest.mark.parametrize(
    "fields",
    [{}, {"dry_run": False}, {"scope": ""}, {"tenant": "search", "namespace": "x"}, {"version": "v1", "dry_run": "no"}],
)
async def test_purge_refuses_what_is_not_clear(tmp_path: Path, fields: dict[str, Any]) -> None:
    async with serve(with_tenants(tmp_path), tmp_path) as server:
        await server.embed("a", headers=key_of("search"))
        assert (await ask(server, "purge", fields)).status == 400
        assert await is_cached(server, "a", tenant="search")


async def test_purge_of_a_model_leaves_other_models_with_the_same_upstream(tmp_path: Path) -> None:
    async with serve(with_tenants(tmp_path), tmp_path) as server:
        for model in ("one", "two"):
            await server.embed("a", model=model, headers=key_of("search"))
        dry = await ask(server, "purge", {"model": "one", "namespace": "search"})
        assert [card["dimensions"] for card in dry.json["scopes"].values()] == [64]
        done = await ask(server, "purge", {"model": "one", "dry_run": False})
        assert done.json["removed"] == {"memory": 1, "disk": 1}
        assert not await is_cached(server, "a", model="one", tenant="search")
        assert await is_cached(server, "a", model="two", tenant="search")


async def test_purge_refuses_scopes_that_may_belong_to_two_models(tmp_path: Path) -> None:
    async with serve(with_tenants(tmp_path), tmp_path) as server:
        for model in ("one", "two"):
            await server.embed("a", model=model, headers=key_of("search"))
        await server.embed("a", model="one", headers=key_of("search"), dimensions=32)
        for dry_run in (True, False):
            answer = await ask(server, "purge", {"model": "one", "dry_run": dry_run})
            assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "shared_scopes", "model")
            [(scope, reason)] = answer.error["scopes"].items()
            assert reason == "it belongs to one and two"
        assert await is_cached(server, "a", model="one", tenant="search")
        assert (await ask(server, "purge", {"scope": scope, "dry_run": False})).json["removed"]["disk"] == 1
        assert (await ask(server, "purge", {"model": "one", "dry_run": False})).json["removed"]["disk"] == 1


async def test_purge_of_a_model_covers_its_tasks_dimensions_and_forwarded_fields(
    api: OpenAIServer, tmp_path: Path
) -> None:
    provider = {"type": "openai", "model": "m", "base_url": api.base_url, "api_key": "k"}
    prefixes = {"document": "d: ", "query": "q: "}
    models = [
        {"name": "m", "provider": provider, "forward": ["flavour"]},
        {"name": "with-prefixes", "provider": {**provider, "prefixes": prefixes}},
    ]
    places: list[dict[str, Any]] = [{}, {"flavour": "mint"}, {"flavour": {"a": 1}}, {"input": [[1, 2]]}]
    others: list[dict[str, Any]] = [{}, {"task": "query"}]
    async with serve(configure(tmp_path, models=models), tmp_path) as server:
        for name, fields in (("m", places), ("with-prefixes", others)):
            for place in fields:
                body = {"input": ["a"], **place}
                assert (await server.embed(body.pop("input"), model=name, **body)).status == 200
    async with serve(configure(tmp_path, models=models), tmp_path) as server:
        purged = await ask(server, "purge", {"model": "m", "dry_run": False})
        assert purged.json["removed"]["disk"] == len(places)
        purged = await ask(server, "purge", {"model": "with-prefixes", "dry_run": False})
        assert purged.json["removed"]["disk"] == len(others)


async def test_purge_goes_on_without_a_tier_that_cannot_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_disk_unlistable(monkeypatch)
    async with serve(with_tenants(tmp_path), tmp_path) as server:
        for model in ("one", "two"):
            await server.embed("a", model=model, headers=key_of("search"))
        reason = {"disk": "it cannot list its keys; nothing was removed"}
        dry = await ask(server, "purge", {"model": "one", "namespace": "search"})
        assert (dry.status, dry.json["removed"], dry.json["unable"]) == (200, {"memory": 1}, reason)
        assert [card["dimensions"] for card in dry.json["scopes"].values()] == [64]
        done = await ask(server, "purge", {"model": "one", "dry_run": False})
        assert (done.status, done.error["tiers"], done.error["unable"]) == (503, reason, ["disk"])
        assert "retry-after" not in done.headers
        assert (await ask(server, "purge", {"model": "one"})).json["removed"] == {"memory": 0}
        assert (await ask(server, "purge", {"model": "two"})).json["removed"] == {"memory": 1}
        await server.embed("a", model="one", headers=key_of("search"), dimensions=32)
        shared = await ask(server, "purge", {"model": "one", "dry_run": False})
        assert (shared.status, shared.error["code"]) == (400, "shared_scopes")


# --- check ------------------------------------------------------------------------------------


async def test_check_calls_a_provider_only_with_embed(api: OpenAIServer, tmp_path: Path) -> None:
    provider = {"type": "openai", "model": "m", "base_url": api.base_url, "api_key": "k"}
    settings = {"provider": provider, "tiers": [{"type": "memory"}], "serve": {"admin_key": ADMIN_KEY}}
    async with serve(settings, tmp_path) as server:
        checked = (await ask(server, "check", {})).json
        assert (checked["ok"], [tier["tier"] for tier in checked["tiers"]], checked["providers"]) == (
            True,
            ["memory"],
            [],
        )
        checked = (await ask(server, "check", {"provider": True})).json
        assert [(one["name"], one["ok"]) for one in checked["providers"]] == [("m", True)]
        assert not api.requests
        checked = (await ask(server, "check", {"embed": True})).json
        assert checked["providers"][0]["dimensions"]
        assert len(api.requests) == 1
        api.misbehave("unauthorized", message="the account is suspended")
        checked = (await ask(server, "check", {"embed": True})).json
        assert (checked["ok"], checked["providers"][0]["ok"]) == (False, False)
        assert "the account is suspended" in checked["providers"][0]["detail"]
