"""``POST /v1/embeddings`` against a loopback API that misbehaves."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import wait_until_async
from serving import KEY, Served, serve

from embedonce.testing.servers.openai import OpenAIServer
from embedonce_server.api.answer_memory import PART_BYTES
from embedonce_server.failure_log import FailureLog

MODEL = "text-embedding-3-small"


def provider(api: OpenAIServer, **options: Any) -> dict[str, Any]:
    return {
        "type": "openai",
        "model": MODEL,
        "base_url": api.base_url,
        "api_key": "upstream-key",
        "max_retries": 0,
        "timeout": 30,
        **options,
    }


def configure(api: OpenAIServer, serve: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return {"provider": provider(api, **options), "tiers": [{"type": "memory"}], "serve": serve or {}}


def equal(one: Any, other: Any) -> bool:
    return bool(np.array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32)))


# --- hits and misses ------------------------------------------------------------------------------


async def test_the_second_request_is_a_hit_and_says_so(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        first = await server.embed("tea is ready")
        assert (first.status, first.cache) == (200, ("miss", 0, 1))
        assert first.json["usage"] == {"prompt_tokens": api.tokens_of("tea is ready")} | {
            "total_tokens": api.tokens_of("tea is ready")
        }
        second = await server.embed("tea is ready")
        assert second.cache == ("hit", 1, 0)
        assert second.json["usage"] == {"prompt_tokens": 0, "total_tokens": 0}
        assert second.headers["x-embedonce-saved-tokens"] == str(api.tokens_of("tea is ready"))
        assert first.json["data"] == second.json["data"]
        assert first.json["model"] == MODEL
        assert equal(second.vectors[0], api.vector_of("tea is ready"))
        assert len(api.requests) == 1


async def test_a_mixed_request_computes_only_what_is_missing(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        await server.embed(["b"])
        answer = await server.embed(["a", "b", "c", "a"])
        assert answer.cache == ("partial", 1, 3)
        assert api.texts == 3
        assert all(equal(row, api.vector_of(text)) for row, text in zip(answer.vectors, "abca", strict=True))
        assert answer.json["usage"]["prompt_tokens"] == api.tokens_of("a") + api.tokens_of("c")


async def test_float_and_base64_are_one_entry(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        answers = [await server.embed("a", encoding_format=form) for form in (None, "base64", "float", "base64")]
        assert [answer.cache[0] for answer in answers] == ["miss", "hit", "hit", "hit"]
        assert [type(answer.json["data"][0]["embedding"]) for answer in answers] == [list, str, list, str]
        assert all(equal(answer.vectors[0], api.vector_of("a")) for answer in answers)
        assert len(api.requests) == 1


async def test_a_user_changes_nothing(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        await server.embed("a", user="one")
        assert (await server.embed("a", user="two")).cache[0] == "hit"


async def test_many_clients_at_once_compute_each_text_once(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        texts = [f"text {i}" for i in range(100)]
        answers = await asyncio.gather(*(server.embed(texts) for _ in range(8)))
        assert api.texts == 100
        assert sum(answer.json["usage"]["prompt_tokens"] for answer in answers) == sum(map(api.tokens_of, texts))
        for answer in answers:
            assert sum(answer.cache[1:]) == 100
            assert all(equal(row, api.vector_of(text)) for row, text in zip(answer.vectors, texts, strict=True))


# --- spaces ---------------------------------------------------------------------------------------


async def test_dimensions_are_a_space_of_their_own(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api, dimensions=16), tmp_path) as server:
        await server.embed("a")
        assert (await server.embed("a", dimensions=16)).cache[0] == "hit"
        small = [await server.embed("a", dimensions=4) for _ in range(2)]
        assert [answer.cache[0] for answer in small] == ["miss", "hit"]
        assert equal(small[0].vectors[0], api.vector_of("a", dimensions=4))


async def test_a_model_that_cannot_make_other_dimensions_says_so(tmp_path: Path) -> None:
    async with serve({"provider": {"type": "ngram", "dimensions": 8}, "tiers": []}, tmp_path) as server:
        assert (await server.embed("a", dimensions=8)).status == 200
        assert (await server.embed("a", dimensions=16)).status == 200
        assert len((await server.embed("a", dimensions=16)).vectors[0]) == 16


async def test_tasks_separate_queries_from_documents(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api, prefixes={"query": "query: "}), tmp_path) as server:
        await server.embed("a")
        answer = await server.embed("a", input_type="search_query")
        assert answer.cache[0] == "miss"
        assert equal(answer.vectors[0], api.vector_of("query: a"))
        assert (await server.embed("a", task_type="RETRIEVAL_QUERY")).cache[0] == "hit"
        assert (await server.embed("a", task="retrieval.passage")).cache[0] == "hit"


async def test_a_misspelled_task_is_refused_and_nothing_is_sent(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api, prefixes={"query": "query: "}), tmp_path) as server:
        for field in ("input_type", "task", "task_type"):
            answer = await server.embed("a", **{field: "qurey"})
            assert (answer.status, answer.error["param"]) == (400, field)
        assert "query" in answer.error["message"]
        assert len(api.requests) == 0


async def test_forwarded_fields_are_sent_and_are_part_of_the_space(api: OpenAIServer, tmp_path: Path) -> None:
    serving = {"models": [{"name": "m", "provider": provider(api), "forward": ["truncate", "style"]}]}
    async with serve({"tiers": [{"type": "memory"}], "serve": serving}, tmp_path) as server:
        await server.embed("a")
        for _ in range(2):
            answer = await server.embed("a", truncate="END", style={"b": 1, "a": [2]})
            assert equal(answer.vectors[0], api.vector_of("a", truncate="END", style={"a": [2], "b": 1}))
        assert answer.cache[0] == "hit"
        assert (await server.embed("a", style={"a": [2], "b": 1}, truncate="END")).cache[0] == "hit"
        assert (await server.embed("a", truncate="START")).cache[0] == "miss"
        refused = await server.embed("a", padding=True)
        assert refused.error["code"] == "unsupported_field"
        assert "list it in forward" in refused.error["message"]
        refused = await server.embed("a", late_chunking=True)
        assert "depend on the other texts of the request; remove it. The model accepts" in refused.error["message"]
    async with serve({"provider": {"type": "ngram"}, "tiers": []}, tmp_path) as server:
        refused = await server.embed("a", padding=True)
        assert refused.error["message"].endswith("it may change the vectors; remove it")


async def test_settings_that_tie_vectors_to_their_batch_are_refused(api: OpenAIServer, tmp_path: Path) -> None:
    serving = {"models": [{"name": "m", "provider": provider(api), "forward": ["options"]}]}
    async with serve({"tiers": [], "serve": serving}, tmp_path) as server:
        answer = await server.embed(["a", "b"], options={"late_chunking": True})
        assert answer.status == 400
        assert "batch" in answer.error["message"]
        assert (await server.embed("a", options={"late_chunking": False})).status == 200
        nested: Any = 1
        for _ in range(900):
            nested = [nested]
        assert (await server.embed("a", options=nested)).status == 400
        assert len(api.requests) == 1


async def test_the_number_of_spaces_is_bounded_and_invalid_ones_do_not_count(
    api: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedonce_server.models.MAX_SPACES", 4)
    async with serve(configure(api), tmp_path) as server:
        for dimensions in range(100, 106):
            assert (await server.embed("a", dimensions=dimensions)).status == 400
        assert [(await server.embed("a", dimensions=d)).status for d in (1, 2, 3, 4, 5)] == [200] * 5
        assert len(server.service.generation.models.find(MODEL).roots) == 4
        # A space that was closed is opened again, and its entries are still there.
        assert [(await server.embed("a", dimensions=d)).cache[0] for d in (1, 5, 2)] == ["hit"] * 3
        assert (await server.embed("a")).status == 200


async def test_a_space_in_use_is_not_closed_for_another_one(
    api: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedonce_server.models.MAX_SPACES", 2)
    async with serve(configure(api), tmp_path) as server:
        api.misbehave("hang")
        task = asyncio.create_task(server.embed("a", dimensions=1))
        await wait_until_async(lambda: len(api.requests) == 1)
        answer = await server.embed("a", dimensions=2)
        assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "too_many_spaces", "1")
        api.heal()
        assert (await task).status == 200
        assert (await server.embed("a", dimensions=2)).status == 200


async def test_token_numbers_are_sent_as_such_and_cached(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        answer = await server.embed([1, 2, 3])
        assert equal(answer.vectors[0], api.vector_of([1, 2, 3]))
        assert answer.json["usage"]["prompt_tokens"] == 3
        both = await server.embed([[1, 2, 3], [4]])
        assert both.cache == ("partial", 1, 1)
        assert equal(both.vectors[1], api.vector_of([4]))
        assert (await server.embed("[1,2,3]")).cache[0] == "miss"  # a text is not its token numbers


async def test_a_model_without_token_numbers_says_what_to_do(tmp_path: Path) -> None:
    async with serve({"provider": {"type": "ngram"}, "tiers": []}, tmp_path) as server:
        answer = await server.embed([[1, 2]])
        assert (answer.status, answer.error["param"]) == (400, "input")
        assert "check_embedding_ctx_length" in answer.error["message"]


async def test_a_model_with_prefixes_takes_texts_only(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api, prefixes={"query": "query: "}), tmp_path) as server:
        answer = await server.embed([[1, 2, 3]])
        assert (answer.status, answer.error["param"]) == (400, "input")
        assert "check_embedding_ctx_length=False" in answer.error["message"]
        assert not api.requests


async def test_an_unknown_model_is_answered_with_the_list(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        answer = await server.embed("a", model="private text")
        assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
        assert MODEL in answer.error["message"]
        assert "private" not in answer.error["message"]
        assert (await server.embed("a", model=None)).status == 400
        assert (await server.embed("a", model=5)).status == 400


# --- Cache-Control --------------------------------------------------------------------------------


async def test_no_store_stores_nothing_but_may_hit(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        await server.embed("a")
        answer = await server.embed(["a", "b"], headers={"cache-control": "no-store"})
        assert answer.cache == ("partial", 1, 1)
        assert (await server.embed("b")).cache[0] == "miss"


async def test_no_cache_computes_anew_and_keeps_the_stored_entry(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        await server.embed("a")
        api.vector_of = lambda text, **other: np.full(16, 0.25, np.float32)  # type: ignore[method-assign]
        answer = await server.embed(["a", "b"], headers={"cache-control": "no-cache"})
        assert answer.cache == ("miss", 0, 2)
        assert all(equal(row, [0.25] * 16) for row in answer.vectors)
        stored = await server.embed(["a", "b"])
        assert stored.cache[0] == "hit"
        assert not equal(stored.vectors[0], [0.25] * 16)
        assert equal(stored.vectors[1], [0.25] * 16)


async def test_only_if_cached_computes_nothing_and_names_the_positions(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        await server.embed("a")
        headers = {"cache-control": "only-if-cached"}
        assert (await server.embed("a", headers=headers)).cache[0] == "hit"
        answer = await server.embed(["b", "a", "c"], headers=headers)
        assert (answer.status, answer.error["code"], answer.error["positions"]) == (404, "not_cached", [0, 2])
        assert len(api.requests) == 1


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("bad_request", 400),
        ("unauthorized", 401),
        ("rate_limit", 429),
        ("quota", 429),
        ("server_error", 500),
        ("not_json", 502),
        ("nan", 502),
        ("short", 502),
        ("disconnect", 502),
    ],
)
async def test_failures_of_the_endpoint_have_its_status(
    api: OpenAIServer, tmp_path: Path, kind: Any, status: int
) -> None:
    async with serve(configure(api), tmp_path) as server:
        api.misbehave(kind)
        answer = await server.embed("private text")
        assert answer.status == status
        assert answer.error["type"]
        assert "private" not in answer.body.decode()
        assert ("retry-after" in answer.headers) == (kind == "rate_limit")
        api.heal()
        assert (await server.embed("private text")).status == 200


async def test_a_refused_key_of_the_server_is_not_mistaken_for_the_key_of_the_client(
    api: OpenAIServer, tmp_path: Path
) -> None:
    async with serve(configure(api), tmp_path) as server:
        api.misbehave("unauthorized")
        answer = await server.embed("a")
        assert (answer.status, answer.error["type"], answer.error["code"]) == (
            *(401, "upstream_error"),
            "upstream_unauthorized",
        )
        assert "refused the server's own key with status 401" in answer.error["message"]
        api.heal()


async def test_a_model_that_fails_is_logged_once_a_minute_without_texts(
    api: OpenAIServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(configure(api), tmp_path) as server:
        now = 0.0
        server.service.failures = FailureLog(lambda: now)
        api.misbehave("unauthorized", times=None)
        for _ in range(3):
            await server.embed(["private text", "another private text"])
        now = 61.0
        await server.embed("private text")
        api.heal()
        api.misbehave("disconnect")
        await server.embed("private text")
        await server.embed("x " * 10_000)  # too long, which is not a failure of the model
    lines = [record.getMessage() for record in caplog.records if record.name == "embedonce.serve"]
    refused = f'model "{MODEL}": the endpoint answered with status 401; check api_key of the model'
    assert lines == [
        f"{refused} (1 request)",
        f"{refused} (3 requests since the last line like this)",
        f'model "{MODEL}": the endpoint cannot be reached (APIConnectionError); check base_url of the model\'s '
        "provider (1 request)",
    ]


async def test_one_text_that_fails_is_named_and_the_others_are_stored(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        long = "x " * 10_000
        answer = await server.embed(["a", long, "b"])
        assert answer.status == 400
        assert "input 1" in answer.error["message"]
        assert (await server.embed(["a", "b"])).cache[0] == "hit"


async def test_an_endpoint_that_hangs_is_a_timeout(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api, timeout=0.2), tmp_path) as server:
        api.misbehave("hang")
        answer = await server.embed("a")
        assert (answer.status, answer.error["type"]) == (504, "upstream_error")
        api.heal()


async def test_replay_mode_names_what_is_missing(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve({**configure(api), "cache": {"mode": "replay"}}, tmp_path) as server:
        answer = await server.embed(["a", "b"])
        assert (answer.status, answer.error["positions"]) == (404, [0, 1])


# --- requests that are refused before anything is sent --------------------------------------------


async def test_other_methods_hosts_origins_and_types_are_refused(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        get = await server.call("GET", "/v1/embeddings")
        assert (get.status, get.headers["allow"]) == (405, "POST")
        assert (await server.embed("a", headers={"host": "evil.example"})).status == 403
        assert (await server.embed("a", headers={"origin": "https://evil.example"})).status == 403
        assert (await server.embed("a", headers={"content-type": "text/plain"})).status == 415
        assert (await server.embed("a", headers={"content-encoding": "gzip"})).status == 415
        assert len(api.requests) == 0


async def test_bodies_are_bounded_with_and_without_a_length(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api, {"max_body": "1 KiB"}), tmp_path) as server:
        assert (await server.embed("a" * 2000)).status == 413
        headers = {"host": "localhost", "content-type": "application/json"}
        answer = await server.send("POST", "/v1/embeddings", [b"a" * 600, b"a" * 600], headers)
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert server.service.bodies.bytes == 0
        parts: list[bytes | None] = [b'{"model": "%b", ' % MODEL.encode(), b'"input": "a"}']
        assert (await server.send("POST", "/v1/embeddings", parts, headers)).status == 200
        assert (await server.send("POST", "/v1/embeddings", [b'{"model":', None], headers)).status == 0
        assert server.service.bodies.bytes == 0


async def test_all_bodies_together_are_bounded(
    api: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve(configure(api), tmp_path) as server:
        monkeypatch.setattr("embedonce_server.api.incoming.MAX_BODIES", 100)
        server.service.bodies.bytes = 90
        answer = await server.embed("a" * 50)
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert server.service.bodies.bytes == 90


# --- tenants --------------------------------------------------------------------------------------


def tenants(*more: dict[str, Any]) -> dict[str, Any]:
    return {"tenants": [{"name": "search", "keys": [KEY]}, *more]}


def authorize(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_tenants_need_a_key(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api, tenants()), tmp_path) as server:
        for headers in ({}, authorize("a wrong key, but long"), {"authorization": KEY}, {"authorization": "Bearer "}):
            answer = await server.embed("a", headers=headers)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
            assert KEY not in answer.body.decode()
        assert (await server.embed("a", headers=authorize(KEY))).status == 200
        assert (await server.embed("a", headers={"authorization": f"bearer {KEY}"})).status == 200
        assert (await server.embed("a", headers={"api-key": KEY})).cache[0] == "hit"


async def test_tenants_share_no_entries_unless_they_share_a_namespace(api: OpenAIServer, tmp_path: Path) -> None:
    keys = [f"key-of-tenant-number-{i}" for i in range(2)]
    more = [{"name": "b", "keys": [keys[0]]}, {"name": "c", "keys": [keys[1]], "namespace": "search"}]
    async with serve(configure(api, tenants(*more)), tmp_path) as server:
        states = [(await server.embed("a", headers=authorize(key))).cache[0] for key in (KEY, *keys)]
        assert states == ["miss", "miss", "hit"]


async def test_a_tenant_sees_only_its_models(api: OpenAIServer, tmp_path: Path) -> None:
    models = [{"name": name, "provider": provider(api, model=name)} for name in ("one", "two")]
    serving = {"models": models, "tenants": [{"name": "search", "keys": [KEY], "models": ["two"]}]}
    async with serve({"tiers": [], "serve": serving}, tmp_path) as server:
        answer = await server.embed("a", model="one", headers=authorize(KEY))
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")
        assert '"one"' not in answer.error["message"]
        assert (await server.embed("a", model="two", headers=authorize(KEY))).status == 200


async def test_the_same_body_of_another_tenant_is_another_request(api: OpenAIServer, tmp_path: Path) -> None:
    models = [{"name": name, "provider": provider(api, model=name)} for name in ("one", "two")]
    keys = {name: f"{KEY}-{name}" for name in ("search", "ads", "mail")}
    tenants: list[dict[str, Any]] = [{"name": name, "keys": [key]} for name, key in keys.items()]
    tenants[2]["models"] = ["two"]
    settings = {"tiers": [{"type": "memory"}], "serve": {"models": models, "tenants": tenants}}
    async with serve(settings, tmp_path) as server:
        for _ in range(3):
            assert (await server.embed("a", model="one", headers=authorize(keys["search"]))).status == 200
        assert (await server.embed("a", model="one", headers=authorize(keys["ads"]))).cache[0] == "miss"
        refused = await server.embed("a", model="one", headers=authorize(keys["mail"]))
        assert (refused.status, refused.error["code"]) == (404, "model_not_found")


async def test_the_same_body_with_another_cache_control_is_another_request(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        for wanted in ("miss", "hit", "hit"):
            assert (await server.embed("a")).cache[0] == wanted
        assert (await server.embed("a", headers={"cache-control": "no-cache"})).cache[0] == "miss"
        both = {"cache-control": "no-cache, only-if-cached"}
        assert (await server.embed("a", headers=both)).status == 400
        assert (await server.embed("a")).cache[0] == "hit"


async def test_an_answer_of_one_hit_is_that_of_any_other(api: OpenAIServer, tmp_path: Path) -> None:
    """A hit in memory takes a short way, and its answer has the same bytes and headers as a hit in another tier."""
    disk = {"type": "disk", "path": str(tmp_path / "store")}
    folders = [tmp_path / name for name in ("long", "short")]
    for folder in folders:
        folder.mkdir()
    async with (
        serve({**configure(api), "tiers": [disk]}, folders[0]) as long,
        serve({**configure(api), "tiers": [{"type": "memory"}, disk]}, folders[1]) as short,
    ):
        for server in (long, short):
            await server.embed("a")
        fields: dict[str, Any]
        for fields in ({}, {"encoding_format": "base64"}, {"input_type": "document"}):
            answers = [await server.embed(texts, **fields) for server in (long, short, short) for texts in ("a", ["a"])]
            assert len({answer.body for answer in answers}) == 1
            headers = [{**answer.headers, "x-request-id": ""} for answer in answers]
            assert headers == headers[:1] * len(headers)
            assert int(answers[-1].headers["x-embedonce-saved-tokens"]) == api.tokens_of("a")
        assert dict(short.service.counters.list_samples())["hits", ("memory", "", MODEL)] == 12


async def test_a_hit_whose_answer_is_long_gives_its_bytes_back(tmp_path: Path) -> None:
    with OpenAIServer(dimensions=8192) as api:
        async with serve(configure(api), tmp_path) as server:
            answers = [await server.embed("a") for _ in range(3)]
            assert [answer.cache[0] for answer in answers] == ["miss", "hit", "hit"]
            assert len(answers[1].body) > PART_BYTES
            assert answers[1].body == answers[2].body
            assert equal(answers[0].vectors, answers[1].vectors)
            assert server.service.answers.bytes == 0


async def test_requests_per_minute_are_limited(api: OpenAIServer, tmp_path: Path) -> None:
    limited = {"tenants": [{"name": "search", "keys": [KEY], "requests_per_minute": 3}]}
    async with serve(configure(api, limited), tmp_path) as server:
        answers = [await server.embed("a", headers=authorize(KEY)) for _ in range(5)]
        assert [answer.status for answer in answers] == [200, 200, 200, 429, 429]
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 20


# --- reloads --------------------------------------------------------------------------------------


async def reload(server: Served, settings: dict[str, Any]) -> None:
    from embedonce import config

    server.service.reload(config.load(settings))


async def test_a_reload_changes_models_and_tenants_and_keeps_entries(api: OpenAIServer, tmp_path: Path) -> None:
    one = {"name": "one", "provider": provider(api, model="one")}
    two = {"name": "two", "provider": provider(api, model="two")}
    tiers = [{"type": "memory"}]
    async with serve({"tiers": tiers, "serve": {"models": [one]}}, tmp_path) as server:
        await server.embed("a")
        kept = server.service.generation.models.find("one")
        await reload(server, {"tiers": tiers, "serve": {"models": [two, one]}})
        assert server.service.generation.models.find("one") is kept
        assert (await server.embed("a", model="one")).cache[0] == "hit"
        assert (await server.embed("a", model="two")).status == 200
        await reload(server, {"tiers": tiers, "serve": {"models": [two]}})
        assert (await server.embed("a", model="one")).status == 404
        await wait_until_async(lambda: not server.service._retired)
        await reload(server, {"tiers": tiers, "serve": {"models": [one, two]}})
        assert (await server.embed("a", model="one")).cache[0] == "hit"


async def test_a_request_under_way_is_answered_by_the_settings_with_which_it_began(
    api: OpenAIServer, tmp_path: Path
) -> None:
    one = {"name": "one", "provider": provider(api, model="one")}
    two = {"name": "two", "provider": provider(api, model="two")}
    async with serve({"tiers": [], "serve": {"models": [one]}}, tmp_path) as server:
        api.misbehave("hang")
        task = asyncio.create_task(server.embed("a", model="one"))
        await wait_until_async(lambda: len(api.requests) == 1)
        await reload(server, {"tiers": [], "serve": {"models": [two]}})
        api.heal()
        assert (await task).status == 200
        await wait_until_async(lambda: not server.service._retired)


async def test_a_model_of_the_same_name_from_another_table_is_another_model(api: OpenAIServer, tmp_path: Path) -> None:
    served = {"models": [{"name": MODEL, "provider": provider(api, model="big-model")}]}
    async with serve(configure(api, served), tmp_path) as server:
        assert equal((await server.embed("a")).vectors[0], api.vector_of("a", model="big-model"))
        await reload(server, configure(api))
        assert equal((await server.embed("a")).vectors[0], api.vector_of("a"))
        await reload(server, configure(api, served))
        assert equal((await server.embed("a")).vectors[0], api.vector_of("a", model="big-model"))


async def test_a_request_survives_two_reloads(api: OpenAIServer, tmp_path: Path) -> None:
    one = {"name": "one", "provider": provider(api, model="one")}
    two = {"name": "two", "provider": provider(api, model="two")}
    async with serve({"tiers": [], "serve": {"models": [one, two]}}, tmp_path) as server:
        api.misbehave("hang")
        task = asyncio.create_task(server.embed("a", model="one"))
        await wait_until_async(lambda: len(api.requests) == 1)
        await reload(server, {"tiers": [], "serve": {"models": [one, two], "max_body": "1 MiB"}})
        await reload(server, {"tiers": [], "serve": {"models": [two]}})
        await wait_until_async(lambda: len(server.service._retired) == 1)
        api.heal()
        assert (await task).status == 200
        await wait_until_async(lambda: not server.service._retired)


async def test_the_provider_of_the_start_is_served_until_a_restart(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        await reload(server, configure(api, model="another"))
        assert server.service.generation.models.names == [MODEL]
        assert equal((await server.embed("a", dimensions=4)).vectors[0], api.vector_of("a", dimensions=4))


# --- fallbacks ------------------------------------------------------------------------------------


async def test_a_fallback_answers_under_its_own_name(api: OpenAIServer, tmp_path: Path) -> None:
    fallback = {"type": "ngram", "dimensions": 16}
    async with serve(configure(api, dimensions=16, fallback=fallback), tmp_path) as server:
        assert (await server.embed("a")).json["model"] == MODEL
        api.misbehave("server_error", times=None)
        answer = await server.embed(["a", "b"])
        assert (answer.status, answer.json["model"]) == (200, "char-ngram")
        api.heal()
        assert (await server.embed(["a", "b"])).json["model"] == MODEL


async def test_a_fallback_for_fetch_alone_is_not_used(api: OpenAIServer, tmp_path: Path) -> None:
    fallback = {"type": "ngram", "dimensions": 64, "fetch_only": True}
    async with serve(configure(api, fallback=fallback), tmp_path) as server:
        api.misbehave("server_error", times=None)
        assert (await server.embed("a")).status == 500


async def test_an_invalid_reload_changes_nothing(api: OpenAIServer, tmp_path: Path) -> None:
    from embedonce import ConfigError

    async with serve(configure(api), tmp_path) as server:
        before = server.service.generation
        wrong = {"tenants": [{"name": "search", "keys": [KEY], "models": ["unknown"]}]}
        with pytest.raises(ConfigError, match="unknown"):
            await reload(server, configure(api, wrong))
        assert server.service.generation is before
        assert (await server.embed("a")).status == 200


# --- every mix of inputs --------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6),
            st.sampled_from(["float", "base64"]),
            st.sampled_from([None, 4, 16]),
            st.sampled_from([None, "no-store", "no-cache", "only-if-cached"]),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_each_input_gets_its_own_vector_in_every_mix(tmp_path_factory: pytest.TempPathFactory, calls: Any) -> None:
    async def run(api: OpenAIServer) -> None:
        async with serve(configure(api, dimensions=16), tmp_path_factory.mktemp("run")) as server:
            for texts, form, dimensions, control in calls:
                headers = {} if control is None else {"cache-control": control}
                before = api.texts
                answer = await server.embed(texts, encoding_format=form, dimensions=dimensions, headers=headers)
                if answer.status == 404:
                    assert control == "only-if-cached"
                    assert api.texts == before
                    continue
                expected = [api.vector_of(text, dimensions=dimensions or 16) for text in texts]
                assert all(map(equal, answer.vectors, expected))
                state, hits, computed = answer.cache
                assert hits + computed == len(texts)
                assert state == ("hit" if not computed else "partial" if hits else "miss")
                assert (api.texts - before > 0) == (computed > 0)

    with OpenAIServer() as api:
        asyncio.run(run(api))
