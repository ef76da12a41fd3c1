"""``/admin/*`` of one worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import ADMIN_KEY, KEY, Answer, Served, serve

from embedonce.testing.servers.openai import OpenAIServer

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
OTHER_KEY = "key-of-the-other-team"
TENANTS = {"search": KEY, "other": OTHER_KEY}
CACHED = {"cache-control": "only-if-cached"}


@pytest.fixture
def api() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


def configure(folder: Path, **serve: Any) -> dict[str, Any]:
    return {
        "provider": {"type": "ngram"},
        "tiers": [{"type": "memory"}, {"type": "disk", "path": str(folder / "disk")}],
        "serve": {"admin_key": ADMIN_KEY, **serve},
    }


def with_tenants(folder: Path) -> dict[str, Any]:
    models = [{"name": name, "provider": {"type": "ngram", "dimensions": n}} for name, n in (("one", 64), ("two", 128))]
    tenants: list[dict[str, Any]] = [{"name": name, "keys": [key]} for name, key in TENANTS.items()]
    tenants[1]["tokens_per_day"] = 1000
    return configure(folder, models=models, tenants=tenants)


async def ask(server: Served, path: str, body: Any) -> Answer:
    return await server.call("POST", f"/admin/{path}", body, ADMIN)


def key_of(tenant: str) -> dict[str, str]:
    return {"authorization": f"Bearer {TENANTS[tenant]}"}


async def is_cached(server: Served, text: str, *, tenant: str | None = None, **fields: Any) -> bool:
    headers = {**CACHED, **({} if tenant is None else key_of(tenant))}
    answer = await server.embed(text, headers=headers, **fields)
    assert answer.status in (200, 404)
    return answer.status == 200


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


# --- forget -----------------------------------------------------------------------------------


async def test_forget_removes_a_text_everywhere_by_default(tmp_path: Path) -> None:
    async with serve(with_tenants(tmp_path), tmp_path) as server:
        places: list[dict[str, Any]] = [
            {"tenant": tenant, "model": model, **fields}
            for tenant in TENANTS
            for model in ("one", "two")
            for fields in ({}, {"dimensions": 32}, {"task": "query"}, {"task": "classification"})
        ]
        for place in places:
            fields = {**place, "headers": key_of(place["tenant"])}
            del fields["tenant"]
            assert (await server.embed(["a", "b"], **fields)).status == 200
        answer = await ask(server, "forget", {"input": "a"})
        assert (answer.status, answer.json) == (200, {"inputs": 1, "models": ["one", "two"], "workers": [1]})
        assert [await is_cached(server, "a", **place) for place in places] == [False] * len(places)
        assert [await is_cached(server, "b", **place) for place in places] == [True] * len(places)


async def test_forget_leaves_no_remembered_request_with_a_text(tmp_path: Path) -> None:
    async with serve(with_tenants(tmp_path), tmp_path) as server:
        for _ in range(2):
            await server.embed("a", model="one", headers=key_of(next(iter(TENANTS))))
        assert len(server.service.generation.recent) == 1
        assert (await ask(server, "forget", {"input": "a"})).status == 200
        assert len(server.service.generation.recent) == 0


async def test_forget_of_one_tenant_model_and_task_leaves_the_others(tmp_path: Path) -> None:
    async with serve(with_tenants(tmp_path), tmp_path) as server:
        for tenant in TENANTS:
            for model in ("one", "two"):
                await server.embed("a", model=model, headers=key_of(tenant))
        assert (await ask(server, "forget", {"input": ["a"], "model": "one", "tenant": "search"})).status == 200
        assert not await is_cached(server, "a", model="one", tenant="search")
        assert await is_cached(server, "a", model="two", tenant="search")
        assert await is_cached(server, "a", model="one", tenant="other")


async def test_forget_reaches_entries_from_before_there_were_tenants(tmp_path: Path) -> None:
    async with serve(configure(tmp_path), tmp_path) as server:
        await server.embed("a")
    tenants = [{"name": "search", "keys": [KEY]}]
    async with serve(configure(tmp_path, tenants=tenants), tmp_path) as server:
        assert (await ask(server, "forget", {"input": "a"})).status == 200
    async with serve(configure(tmp_path), tmp_path) as server:
        assert not await is_cached(server, "a")


async def test_forget_of_token_numbers(api: OpenAIServer, tmp_path: Path) -> None:
    provider = {"type": "openai", "model": "m", "base_url": api.base_url, "api_key": "k"}
    models = [{"name": "m", "provider": provider}, {"name": "texts", "provider": {"type": "ngram"}}]
    async with serve(configure(tmp_path, models=models), tmp_path) as server:
        await server.embed([[1, 2], [3]])
    async with serve(configure(tmp_path, models=models), tmp_path) as server:
        assert (await ask(server, "forget", {"input": [1, 2]})).status == 200
        answer = await server.embed([[1, 2], [3]], headers=CACHED)
        assert answer.error["positions"] == [0]
        answer = await ask(server, "forget", {"input": [1, 2], "model": "texts"})
        assert (answer.status, answer.error["param"]) == (400, "input")


async def test_an_incomplete_erasure_names_the_tiers(tmp_path: Path) -> None:
    settings = configure(tmp_path)
    settings["tiers"].append({"type": "redis", "url": "redis://127.0.0.1:1/0"})
    async with serve(settings, tmp_path) as server:
        for path, fields in (("forget", {"input": "private"}), ("purge", {"version": "v1", "dry_run": False})):
            answer = await ask(server, path, fields)
            assert (answer.status, answer.error["code"]) == (503, "erase_incomplete")
            assert list(answer.error["tiers"]) == ["redis"]
            assert answer.headers["retry-after"]
            assert b"private" not in answer.body


async def test_forget_refuses_a_task_that_no_model_knows(tmp_path: Path) -> None:
    async with serve(configure(tmp_path), tmp_path) as server:
        answer = await ask(server, "forget", {"input": "a", "task": "qurey"})
        assert (answer.status, answer.error["param"]) == (400, "task")


async def test_forget_reaches_spaces_and_tenants_that_this_process_does_not_know(
    api: OpenAIServer, tmp_path: Path
) -> None:
    provider = {"type": "openai", "model": "m", "base_url": api.base_url, "api_key": "k"}
    models = [{"name": "m", "provider": provider, "forward": ["flavour"]}]

    def settings(tenant: str, **key: Any) -> dict[str, Any]:
        tenants = [{"name": tenant, "keys": [KEY]}]
        return {**configure(tmp_path, models=models, tenants=tenants), "key": {"namespace": "app", **key}}

    places: list[dict[str, Any]] = [{}, {"dimensions": 4}, {"flavour": "mint"}, {"task": "query", "flavour": {"a": 1}}]
    for config in (settings("old", version="v0"), settings("old"), settings("now")):
        async with serve(config, tmp_path) as server:
            for place in places:
                assert (await server.embed(["tea", "milk"], headers=key_of("search"), **place)).status == 200
            await server.embed([[1, 2], [3]], headers=key_of("search"))
    other = {**configure(tmp_path, models=models), "key": {"namespace": "apples"}}
    async with serve(other, tmp_path) as server:
        await server.embed("tea")
    async with serve(settings("now"), tmp_path) as server:
        assert (await ask(server, "forget", {"input": "tea"})).status == 200
        assert (await ask(server, "forget", {"input": [1, 2]})).status == 200
    for config in (settings("old", version="v0"), settings("old"), settings("now")):
        async with serve(config, tmp_path) as server:
            cached = {**CACHED, **key_of("search")}
            for place in places:
                answer = await server.embed(["tea", "milk"], headers=cached, **place)
                assert answer.error["positions"] == [0]
            assert (await server.embed([[1, 2], [3]], headers=cached)).error["positions"] == [0]
    async with serve(other, tmp_path) as server:
        assert await is_cached(server, "tea")


async def test_forget_names_a_namespace_that_may_be_that_of_a_former_tenant(tmp_path: Path) -> None:
    old, new = (configure(tmp_path, tenants=[{"name": name, "keys": [KEY]}]) for name in ("old", "new"))
    foreign = {**old, "key": {"namespace": "other-program"}}
    for config in (foreign, old):
        async with serve(config, tmp_path) as server:
            await server.embed(["private", "kept"], headers=key_of("search"))
    async with serve(new, tmp_path) as server:
        assert (await ask(server, "forget", {"input": "never seen"})).status == 200
        assert (await ask(server, "forget", {"input": "private", "tenant": "new"})).status == 200
        answer = await ask(server, "forget", {"input": "private"})
        assert (answer.status, answer.error["code"], answer.error["tiers"]) == (503, "erase_incomplete", {})
        [reason] = answer.error["scopes"].values()
        assert 'namespace "old"' in reason
        assert b"private" not in answer.body
        assert (await ask(server, "forget", {"input": "private", "namespace": "old"})).status == 200
        assert (await ask(server, "forget", {"input": "private"})).status == 200
        answer = await ask(server, "forget", {"input": "private", "namespace": "old", "tenant": "new"})
        assert (answer.status, answer.error["param"]) == (400, "namespace")
    async with serve(old, tmp_path) as server:
        assert not await is_cached(server, "private", tenant="search")
        assert await is_cached(server, "kept", tenant="search")
    async with serve(foreign, tmp_path) as server:
        assert await is_cached(server, "private", tenant="search")


async def test_forget_of_one_model_after_a_restart_leaves_the_other_models(tmp_path: Path) -> None:
    async with serve(with_tenants(tmp_path), tmp_path) as server:
        for model in ("one", "two"):
            for fields in ({}, {"dimensions": 32}):
                await server.embed("a", model=model, headers=key_of("search"), **fields)
    async with serve(with_tenants(tmp_path), tmp_path) as server:
        assert (await ask(server, "forget", {"input": "a", "model": "one", "tenant": "search"})).status == 200
        assert not await is_cached(server, "a", model="one", tenant="search")
        # Both models have this space.
        assert not await is_cached(server, "a", model="one", tenant="search", dimensions=32)
        assert await is_cached(server, "a", model="two", tenant="search")


async def test_forget_names_scopes_whose_keys_it_cannot_make(tmp_path: Path) -> None:
    async with serve({**configure(tmp_path), "key": {"secret": "an earlier secret"}}, tmp_path) as server:
        await server.embed("private")
    async with serve(configure(tmp_path), tmp_path) as server:
        answer = await ask(server, "forget", {"input": "private"})
        assert answer.status == 503
        [scope] = answer.error["scopes"]
        assert "another secret" in answer.error["scopes"][scope]
        assert (await ask(server, "purge", {"scope": scope, "dry_run": False})).json["removed"]["disk"] == 1
        assert (await ask(server, "forget", {"input": "private"})).status == 200


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
        api.misbehave("unauthorized")
        checked = (await ask(server, "check", {"embed": True})).json
        assert (checked["ok"], checked["providers"][0]["ok"]) == (False, False)
