"""``/admin/forget`` of one worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from admin_calls import CACHED, TENANTS, ask, configure, is_cached, key_of, make_disk_unlistable, with_tenants
from serving import KEY, serve

from embedonce import Cache
from embedonce.testing.servers.openai import OpenAIServer


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
        answer = await ask(server, "forget", {"input": [3], "model": "texts"})
        assert (answer.status, answer.json["models"]) == (200, [])  # no entry of that model has token numbers
        assert (await server.embed([3], headers=CACHED)).status == 200


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
        answer = await ask(server, "forget", {"input": "tea"})
        [reason] = answer.error["scopes"].values()
        assert 'namespace "apples"' in reason
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


async def test_forget_names_scopes_of_other_namespaces_unless_the_request_limits_it(tmp_path: Path) -> None:
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
        reasons = " ".join(sorted(answer.error["scopes"].values()))
        assert 'namespace "old"' in reasons
        assert 'namespace "other-program/old"' in reasons
        assert "retry-after" not in answer.headers
        assert b"private" not in answer.body
        assert (await ask(server, "forget", {"input": "private", "namespace": "old"})).status == 200
        assert (await ask(server, "forget", {"input": "private", "namespace": "other"})).status == 200
        assert list((await ask(server, "forget", {"input": "private"})).error["scopes"].values()) == [
            'its namespace "other-program/old" is not one of this server; to erase there too, send it as namespace'
        ]
        answer = await ask(server, "forget", {"input": "private", "namespace": "old", "tenant": "new"})
        assert (answer.status, answer.error["param"]) == (400, "namespace")
    async with serve(old, tmp_path) as server:
        assert not await is_cached(server, "private", tenant="search")
        assert await is_cached(server, "kept", tenant="search")
    async with serve(foreign, tmp_path) as server:
        assert await is_cached(server, "private", tenant="search")


async def list_cached(folder: Path, root: str) -> list[str]:
    """Return the tenants that have the text "private". An empty name stands for requests without tenants."""
    cached: list[str] = []
    for names in ([], list(TENANTS)):
        tenants = [{"name": name, "keys": [TENANTS[name]]} for name in names]
        async with serve({**configure(folder, tenants=tenants), "key": {"namespace": root}}, folder) as server:
            cached += [name for name in names or [""] if await is_cached(server, "private", tenant=name or None)]
    return cached


async def store_in_all_namespaces(folder: Path, root: str) -> None:
    for names in ([], list(TENANTS)):
        tenants = [{"name": name, "keys": [TENANTS[name]]} for name in names]
        async with serve({**configure(folder, tenants=tenants), "key": {"namespace": root}}, folder) as server:
            for name in names or [""]:
                assert (await server.embed("private", headers=key_of(name) if name else {})).status == 200


@pytest.mark.parametrize(("before", "now"), [("team", ""), ("", "team"), ("team", "other")])
async def test_no_namespace_of_an_earlier_configuration_is_left_silently(tmp_path: Path, before: str, now: str) -> None:
    await store_in_all_namespaces(tmp_path, before)
    async with serve({**configure(tmp_path), "key": {"namespace": now}}, tmp_path) as server:
        answer = await ask(server, "forget", {"input": "private"})
        assert (answer.status, len(answer.error["scopes"])) == (503, 3)
        assert (await ask(server, "forget", {"input": "private", "namespace": f"{before}x"})).status == 200
    assert await list_cached(tmp_path, before) == ["", *TENANTS]
    async with serve({**configure(tmp_path), "key": {"namespace": now}}, tmp_path) as server:
        assert (await ask(server, "forget", {"input": "private", "namespace": before})).status == 200
        assert (await ask(server, "forget", {"input": "private"})).status == 200
    assert await list_cached(tmp_path, before) == []


async def test_a_namespace_includes_those_in_it_and_no_others(tmp_path: Path) -> None:
    for root in ("team", "team2"):
        await store_in_all_namespaces(tmp_path, root)
    async with serve(configure(tmp_path), tmp_path) as server:
        assert (await ask(server, "forget", {"input": "private", "namespace": "team/search"})).status == 200
    assert await list_cached(tmp_path, "team") == ["", "other"]
    async with serve(configure(tmp_path), tmp_path) as server:
        assert (await ask(server, "forget", {"input": "private", "namespace": "team"})).status == 200
    assert await list_cached(tmp_path, "team") == []
    assert await list_cached(tmp_path, "team2") == ["", *TENANTS]


async def test_the_card_of_another_program_may_have_any_namespace(tmp_path: Path) -> None:
    settings = configure(tmp_path)
    del settings["tiers"][0]
    async with serve(settings, tmp_path) as server:
        await server.embed("private")
        cache = server.service.base
        for i, namespace in enumerate((["a"], {"a": 1}, None, 5, "x" * 9999, "\ud83d")):
            card = {
                "provider": "ngram",
                "namespace": namespace,
                "version": "v1",
                "task": ["a"],
                "fingerprint": "00" * 32,
            }
            cache._chain.cards[f"{i:032x}"] = card
        for fields in ({}, {"task": "query"}, {"model": server.service.generation.models.names[0]}):
            assert (await ask(server, "forget", {"input": "private", **fields})).status == 200
        assert not await is_cached(server, "private")


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


# --- token numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
async def test_a_model_that_takes_no_token_numbers_does_not_stop_an_erasure(
    api: OpenAIServer, tmp_path: Path, order: int
) -> None:
    provider = {"type": "openai", "model": "m", "base_url": api.base_url, "api_key": "k"}
    models = [
        {"name": "m", "provider": provider},
        {"name": "p", "provider": {**provider, "prefixes": {"query": "q: "}}},
    ]
    async with serve(configure(tmp_path, models=models[::order]), tmp_path) as server:
        places: list[dict[str, Any]] = [{}, {"dimensions": 8}]
        for place in places:
            assert (await server.embed([1, 2, 3], model="m", **place)).status == 200
        assert (await server.embed([1, 2, 3], model="p")).status == 400
        answer = await ask(server, "forget", {"input": [1, 2, 3]})
        assert (answer.status, answer.json["models"]) == (200, ["m"])
        assert [await is_cached(server, [1, 2, 3], model="m", **place) for place in places] == [False, False]


async def test_token_numbers_of_a_former_model_are_forgotten(api: OpenAIServer, tmp_path: Path) -> None:
    provider = {"type": "openai", "model": "m", "base_url": api.base_url, "api_key": "k"}
    before = configure(tmp_path, models=[{"name": "m", "provider": provider}])
    async with serve(before, tmp_path) as server:
        assert (await server.embed([1, 2, 3])).status == 200
    async with serve(configure(tmp_path), tmp_path) as server:
        assert (await ask(server, "forget", {"input": [1, 2, 3]})).status == 200
    async with serve(before, tmp_path) as server:
        assert not await is_cached(server, [1, 2, 3])


async def test_a_task_of_a_former_model_can_be_forgotten(api: OpenAIServer, tmp_path: Path) -> None:
    provider = {"type": "openai", "model": "m", "base_url": api.base_url, "api_key": "k"}

    def settings(*tasks: str) -> dict[str, Any]:
        prefixes = {task: f"{task}: " for task in ("document", "query", *tasks)}
        return configure(tmp_path, models=[{"name": "m", "provider": {**provider, "prefixes": prefixes}}])

    async with serve(settings("topic"), tmp_path) as server:
        for task in ("topic", "query"):
            assert (await server.embed("private", task=task)).status == 200
    async with serve(settings(), tmp_path) as server:
        answer = await ask(server, "forget", {"input": "private", "task": "tpoic"})
        assert (answer.status, answer.error["param"]) == (400, "task")
        assert (await ask(server, "forget", {"input": "private", "task": "topic"})).status == 200
    async with serve(settings("topic"), tmp_path) as server:
        assert not await is_cached(server, "private", task="topic")
        assert await is_cached(server, "private", task="query")


# --- failures ---------------------------------------------------------------------------------


async def test_an_error_of_a_cache_stops_no_erasure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve(with_tenants(tmp_path), tmp_path) as server:
        for model in ("one", "two"):
            await server.embed("private", model=model, headers=key_of("search"))
        forget = Cache.aforget

        async def fail(cache: Cache, texts: Any, task: Any = None, *, where: Any = None) -> Any:
            if where is None and task is None:
                raise RuntimeError("the provider has failed")
            return await forget(cache, texts, task, where=where)

        monkeypatch.setattr(Cache, "aforget", fail)
        assert (await ask(server, "forget", {"input": "private"})).status == 200
        for model in ("one", "two"):
            assert not await is_cached(server, "private", model=model, tenant="search")


async def test_a_tier_that_cannot_list_loses_what_the_configuration_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_disk_unlistable(monkeypatch)
    async with serve(with_tenants(tmp_path), tmp_path) as server:
        await server.embed("private", model="one", headers=key_of("search"))
    async with serve(with_tenants(tmp_path), tmp_path) as server:
        answer = await ask(server, "forget", {"input": "private"})
        assert (answer.status, answer.error["code"], answer.error["unable"]) == (503, "erase_incomplete", ["disk"])
        assert answer.error["tiers"] == {
            "disk": "it cannot list its keys; the texts were removed only from spaces that this worker knows or that "
            "the configuration names"
        }
        assert "retry-after" not in answer.headers
        assert "once the" not in answer.error["message"]
        assert not await is_cached(server, "private", model="one", tenant="search")
        await server.embed("private", model="one", headers=key_of("search"))
        other = await ask(server, "forget", {"input": "private", "namespace": "none"})
        assert (other.status, other.error["scopes"]) == (503, {})
        for task, status in (("qurey", 400), ("query", 503)):
            assert (await ask(server, "forget", {"input": "private", "task": task})).status == status


async def test_scopes_of_other_namespaces_are_named_although_a_tier_failed(tmp_path: Path) -> None:
    async with serve({**configure(tmp_path), "key": {"namespace": "other"}}, tmp_path) as server:
        await server.embed("private")
    settings = configure(tmp_path)
    settings["tiers"].append({"type": "redis", "url": "redis://127.0.0.1:1/0"})
    async with serve(settings, tmp_path) as server:
        answer = await ask(server, "forget", {"input": "private"})
        assert (answer.status, list(answer.error["tiers"]), len(answer.error["scopes"])) == (503, ["redis"], 1)
        assert answer.headers["retry-after"] == "1"


async def test_an_erasure_names_a_model_without_room_for_another_space(
    api: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_disk_unlistable(monkeypatch)
    provider = {"type": "openai", "model": "m", "base_url": api.base_url, "api_key": "k"}
    async with serve(configure(tmp_path, models=[{"name": "m", "provider": provider}]), tmp_path) as server:
        monkeypatch.setattr("embedonce_server.models.MAX_SPACES", 1)
        answer = await ask(server, "forget", {"input": [1]})
        assert (answer.status, list(answer.error["models"]), answer.error["unable"]) == (503, ["m"], ["disk"])
        assert answer.headers["retry-after"] == "1"


async def test_lists_of_keys_cover_a_space_for_which_there_is_no_room(
    api: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = {"type": "openai", "model": "m", "base_url": api.base_url, "api_key": "k"}
    settings = configure(tmp_path, models=[{"name": "m", "provider": provider}])
    async with serve(settings, tmp_path) as server:
        await server.embed([1])
    async with serve(settings, tmp_path) as server:
        with monkeypatch.context() as patch:
            patch.setattr("embedonce_server.models.MAX_SPACES", 1)
            assert (await ask(server, "forget", {"input": [1]})).status == 200
        assert not await is_cached(server, [1])


# --- lone surrogates --------------------------------------------------------------------------


async def test_a_text_with_a_lone_surrogate_is_forgotten_as_it_was_sent(tmp_path: Path) -> None:
    async with serve({**configure(tmp_path), "key": {"normalize": ["surrogates"]}}, tmp_path) as server:
        text = "cut \ud83d"
        assert (await server.embed([text, "kept"])).status == 200
        found = await ask(server, "explain", {"input": text})
        assert (found.json["found"], found.json["normalized"]) == ("memory", True)
        assert (await ask(server, "forget", {"input": ["other", text]})).status == 200
        assert not await is_cached(server, text)
        assert await is_cached(server, "kept")


async def test_a_text_that_has_no_key_is_named_by_its_position(tmp_path: Path) -> None:
    async with serve(configure(tmp_path), tmp_path) as server:
        await server.embed("private")
        for path, texts, where in (
            ("explain", "private \ud83d", "the input"),
            ("forget", "private \ud83d", "the input"),
            ("forget", ["private", "\udc00", "a", "\ud83d b"], "input 1 and 3"),
        ):
            answer = await ask(server, path, {"input": texts})
            assert (answer.status, answer.error["param"]) == (400, "input")
            assert answer.error["message"].startswith(f"{where} has a lone surrogate")
            assert b"private" not in answer.body
        assert await is_cached(server, "private")
        answer = await ask(server, "forget", {"input": "a", "namespace": "\ud83d"})
        assert (answer.status, answer.error["param"]) == (400, "namespace")
