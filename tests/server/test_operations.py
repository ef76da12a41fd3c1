"""Models, health, the document, and who may use which path."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from serving import ADMIN_KEY, KEY, Served, serve

from embedonce.testing.servers.openai import OpenAIServer
from embedonce_server import access_log

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
TENANT = {"authorization": f"Bearer {KEY}"}
OTHER_KEY = "key-of-the-other-team"

ADMIN_PATHS = [
    ("GET", "/admin/stats"),
    ("POST", "/admin/explain"),
    ("POST", "/admin/forget"),
    ("POST", "/admin/purge"),
    ("POST", "/admin/check"),
]


def configure(**serve: Any) -> dict[str, Any]:
    return {"provider": {"type": "ngram"}, "tiers": [{"type": "memory"}], "serve": serve}


def with_tenants(**serve: Any) -> dict[str, Any]:
    models = [{"name": name, "provider": {"type": "ngram"}} for name in ("BAAI/small", "large")]
    tenants = [
        {"name": "search", "keys": [KEY], "models": ["BAAI/small"]},
        {"name": "other", "keys": [OTHER_KEY]},
    ]
    return configure(models=models, tenants=tenants, **serve)


# --- models -----------------------------------------------------------------------------------


async def test_models_are_listed_as_openai_lists_them(tmp_path: Path) -> None:
    async with serve(configure(), tmp_path) as server:
        answer = await server.call("GET", "/v1/models")
        [model] = answer.json["data"]
        assert answer.json["object"] == "list"
        assert model == {"id": "char-ngram", "object": "model", "created": model["created"], "owned_by": "ngram"}
        assert (await server.call("GET", "/v1/models/char-ngram")).json == model
        assert (await server.call("HEAD", "/v1/models")).status == 200
        unknown = await server.call("GET", "/v1/models/unknown")
        assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")


async def test_a_tenant_sees_its_own_models_only(tmp_path: Path) -> None:
    async with serve(with_tenants(), tmp_path) as server:
        listed = await server.call("GET", "/v1/models", headers=TENANT)
        assert [model["id"] for model in listed.json["data"]] == ["BAAI/small"]
        other = await server.call("GET", "/v1/models", headers={"api-key": OTHER_KEY})
        assert [model["id"] for model in other.json["data"]] == ["BAAI/small", "large"]
        assert (await server.call("GET", "/v1/models/BAAI/small", headers=TENANT)).json["id"] == "BAAI/small"
        hidden = await server.call("GET", "/v1/models/large", headers=TENANT)
        assert hidden.status == 404
        assert "large" not in hidden.error["message"]
        for path in ("/v1/models", "/v1/models/large"):
            answer = await server.call("GET", path)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert (await server.call("GET", path, headers=ADMIN)).status == 401


# --- health -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "status"), [("starting", 503), ("ready", 200), ("draining", 503)])
async def test_ready_follows_the_state_and_live_does_not(tmp_path: Path, state: Any, status: int) -> None:
    async with serve(configure(), tmp_path) as server:
        server.service.state = state
        ready = await server.call("GET", "/health/ready", headers={"host": "any.example"})
        assert (ready.status, ready.json["status"]) == (status, state)
        live = await server.call("GET", "/health/live", headers={"host": "any.example"})
        assert (live.status, live.json) == (200, {"status": "ok"})


async def test_a_tier_and_a_provider_that_are_away_are_shown_and_not_fatal(api: OpenAIServer, tmp_path: Path) -> None:
    provider = {"type": "openai", "model": "m", "base_url": api.base_url, "api_key": "upstream-key", "max_retries": 0}
    away = {"type": "redis", "url": "redis://:private@127.0.0.1:1/0"}
    settings = {"provider": provider, "tiers": [{"type": "memory"}, away], "serve": {}}
    async with serve(settings, tmp_path) as server:
        assert (await server.call("GET", "/health/ready")).json == {
            "status": "ready",
            "tiers": {name: {"status": "ok", "last_error": None} for name in ("memory", "redis")},
            "providers": {"openai": {"status": "ok", "last_error": None}},
        }
        api.misbehave("server_error", times=4)
        for number in range(4):
            assert (await server.embed(f"private {number}")).status == 500
        ready = await server.call("GET", "/health/ready")
        assert (ready.status, ready.json["status"]) == (200, "ready")
        assert ready.json["tiers"]["memory"]["status"] == "ok"
        assert ready.json["tiers"]["redis"]["status"] == "skipped"
        assert ready.json["tiers"]["redis"]["last_error"]
        assert ready.json["providers"]["openai"]["status"] == "failing"
        assert ready.json["providers"]["openai"]["last_error"]
        for secret in (b"private", b"127.0.0.1", b"upstream"):
            assert secret not in ready.body
        api.heal()
        assert (await server.embed("a")).status == 200
        ready = await server.call("GET", "/health/ready")
        assert ready.json["providers"]["openai"] == {"status": "ok", "last_error": None}


async def test_health_names_no_tenant_and_no_model(tmp_path: Path) -> None:
    async with serve(with_tenants(admin_key=ADMIN_KEY), tmp_path) as server:
        await server.embed("a", headers=TENANT)
        ready = await server.call("GET", "/health/ready")
        assert set(ready.json["providers"]) == {"ngram"}
        for name in (b"search", b"other", b"BAAI", b"large", KEY.encode()):
            assert name not in ready.body


# --- who may use which path -------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), [*ADMIN_PATHS, ("GET", "/admin"), ("PUT", "/admin/"), ("GET", "/admin/x")])
async def test_without_an_admin_key_there_is_no_administration(tmp_path: Path, method: str, path: str) -> None:
    async with serve(configure(), tmp_path) as server:
        unknown = await server.call(method, "/unknown")
        answer = await server.call(method, path, {}, headers=ADMIN)
        assert (answer.status, answer.body) == (404, unknown.body)


@pytest.mark.parametrize(("method", "path"), [*ADMIN_PATHS, ("GET", "/admin/x"), ("PUT", "/admin/stats")])
async def test_administration_needs_the_admin_key_in_a_header(tmp_path: Path, method: str, path: str) -> None:
    async with serve(with_tenants(admin_key=ADMIN_KEY), tmp_path) as server:
        wrong: list[dict[str, str]] = [{}, TENANT, {"api-key": ADMIN_KEY}, {"authorization": f"Basic {ADMIN_KEY}"}]
        for headers in wrong:
            answer = await server.call(method, f"{path}?admin_key={ADMIN_KEY}", {}, headers)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert ADMIN_KEY.encode() not in answer.body
        answer = await server.call(method, path, {}, ADMIN)
        assert answer.status != 401


async def test_metrics_are_open_without_tenants(tmp_path: Path) -> None:
    async with serve(configure(admin_key=ADMIN_KEY), tmp_path) as server:
        assert (await server.call("GET", "/metrics")).status == 200


async def test_with_tenants_the_metrics_need_the_admin_key(tmp_path: Path) -> None:
    async with serve(with_tenants(admin_key=ADMIN_KEY), tmp_path) as server:
        for headers in ({}, TENANT, {"api-key": ADMIN_KEY}):
            assert (await server.call("GET", "/metrics", headers=headers)).status == 401
        assert (await server.call("GET", "/metrics", headers=ADMIN)).status == 200
    async with serve(with_tenants(), tmp_path) as server:
        answer = await server.call("GET", "/metrics", headers=TENANT)
        assert (answer.status, answer.error["code"]) == (404, "not_found")


async def test_unknown_paths_and_methods_have_the_form_of_errors(tmp_path: Path) -> None:
    async with serve(configure(admin_key=ADMIN_KEY), tmp_path) as server:
        for path in ("/", "/v1", "/v1/models/", "/v1/embeddings/", "/health", "/health/", "/metrics/", "//v1/models"):
            answer = await server.call("GET", path)
            assert answer.status == 404, path
            assert answer.error["type"] == "invalid_request_error"
        for method, path, allowed in [
            ("POST", "/v1/models", "GET, HEAD"),
            ("DELETE", "/v1/models/char-ngram", "GET, HEAD"),
            ("OPTIONS", "/health/live", "GET, HEAD"),
            ("GET", "/admin/forget", "POST"),
        ]:
            answer = await server.call(method, path, headers=ADMIN)
            assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
            assert answer.headers["allow"] == allowed
            assert answer.headers["x-request-id"]


async def test_foreign_hosts_and_origins_are_refused_on_every_path_but_health(tmp_path: Path) -> None:
    async with serve(configure(admin_key=ADMIN_KEY), tmp_path) as server:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/admin/stats", "/unknown"):
            assert (await server.call("GET", path, headers={**ADMIN, "host": "evil.example"})).status == 403
            assert (await server.call("GET", path, headers={**ADMIN, "origin": "http://evil.example"})).status == 403


@pytest.mark.parametrize("path", [path for method, path in ADMIN_PATHS if method == "POST"])
async def test_only_json_objects_with_known_fields_are_accepted(tmp_path: Path, path: str) -> None:
    async with serve(configure(admin_key=ADMIN_KEY, max_body="1 KiB"), tmp_path) as server:
        answer = await server.call("POST", path, {}, {**ADMIN, "content-type": "text/plain"})
        assert answer.status == 415
        answer = await server.call("POST", path, {"private text": 1}, ADMIN)
        assert (answer.status, answer.error["code"]) == (400, "unsupported_field")
        assert answer.error["message"].startswith('the field "private text" is unknown; the fields are ')
        assert (await server.call("POST", path, b"[", ADMIN)).error["code"] == "invalid_json"
        assert (await server.call("POST", path, [], ADMIN)).status == 400
        assert (await server.call("POST", path, {"input": "a" * 2000}, ADMIN)).status == 413
        assert server.service.bodies.bytes == 0


# --- the document, the log --------------------------------------------------------------------


async def test_the_document_is_open_and_names_nothing_of_the_settings(tmp_path: Path) -> None:
    async with serve(with_tenants(admin_key=ADMIN_KEY), tmp_path) as server:
        answer = await server.call("GET", "/openapi.json")
        assert answer.status == 200
        assert json.loads(answer.body)["openapi"] == "3.1.0"
        for name in (b"BAAI", KEY.encode(), ADMIN_KEY.encode()):
            assert name not in answer.body


async def test_the_access_log_has_a_line_per_request_without_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access_log, "is_on", True)
    caplog.set_level(logging.INFO, logger="embedonce.access")
    async with serve(configure(admin_key=ADMIN_KEY), tmp_path) as server:
        await server.embed("private text")
        await server.call("GET", "/v1/models?private=1")
        await server.call("GET", "/un\nknown")
        await server.call("POST", "/admin/forget", {"input": "private text"}, ADMIN)
        assert (await server.call("GET", "/metrics", headers={"host": "evil.example"})).status == 403
    lines = [record.getMessage() for record in caplog.records]
    shown = [" ".join(line.split()[1:4]) for line in lines]
    assert shown == [
        "POST /v1/embeddings 200",
        "GET /v1/models 200",
        "GET /un%0Aknown 404",
        "POST /admin/forget 200",
        "GET /metrics 403",
    ]
    assert not any("private" in line for line in lines)
    ids = [line.rpartition("id=")[2] for line in lines]
    assert len(set(ids)) == 5


async def test_a_fault_is_an_answer_with_status_500(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(self: object) -> bytes:
        raise RuntimeError("broken")

    async with serve(configure(), tmp_path) as server:
        monkeypatch.setattr(type(server.app.metrics), "show", fail)
        answer = await server.call("GET", "/metrics")
        assert (answer.status, answer.error["code"]) == (500, "internal_error")
        assert "broken" not in answer.error["message"]
        assert f"a request to /metrics failed (id={answer.headers['x-request-id']})" in caplog.text


async def test_a_client_that_goes_before_its_body_is_complete_gets_nothing(tmp_path: Path) -> None:
    async with serve(configure(admin_key=ADMIN_KEY), tmp_path) as server:
        headers = {"host": "localhost", "content-type": "application/json", **ADMIN}
        answer = await server.send("POST", "/admin/forget", [b"{", None], headers)
        assert answer.status == 0
        assert server.service.bodies.bytes == 0
        assert isinstance(server, Served)
        assert server.service.count_active() == 0
