"""What clients and the log are told about errors, which have no words of texts or of the model's endpoint."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import KEY, serve

from embedonce.errors import DriftError, ProviderError, ReplayMiss, TextError, TextRefused
from embedonce.testing.servers.loopback import Reply
from embedonce.testing.servers.openai import OpenAIServer
from embedonce_server.api.api_errors import explain_failures


def configure(api: OpenAIServer, serving: dict[str, Any] | None = None) -> dict[str, Any]:
    provider = {"type": "openai", "model": api.model, "base_url": api.base_url, "api_key": "k", "max_retries": 0}
    return {"provider": provider, "tiers": [{"type": "memory"}], "serve": serving or {}}


async def test_words_and_addresses_of_the_endpoint_do_not_reach_the_client(
    api: OpenAIServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def answer_with(reply: Reply) -> None:
        api.failure = lambda fault, inputs: reply  # type: ignore[method-assign]
        api.misbehave("error_as_200", times=None)

    def make_error(code: Any) -> Reply:
        return Reply(200, {"error": {"message": "bad token 'hunter2' at db.internal", "code": code}})

    private = ("hunter2", "internal")
    async with serve(configure(api), tmp_path) as server:
        for reply, words, code in (
            (make_error(None), "contains an error", None),
            (make_error("bad_token"), "(code bad_token)", "bad_token"),
            (make_error("hunter2 at"), "contains an error", None),
            (Reply(307, "", {"Location": "http://db.internal/hunter2"}), "redirect; the administrator must", None),
            (Reply(200, b"<p>hunter2"), "not JSON", None),
            (Reply(400, make_error("bad").content), "status 400", "bad"),
        ):
            answer_with(reply)
            answer = await server.embed("my password is hunter2")
            assert answer.status in (400, 502)
            assert words in answer.error["message"]
            assert answer.error["code"] == code
            assert not any(word in answer.body.decode() + caplog.text for word in private)
            api.heal()


def test_messages_that_may_have_foreign_words_are_replaced() -> None:
    for error, words in (
        (ProviderError("a plugin's words: hunter2"), "it is invalid"),
        (ProviderError("provider 'hunter2' returned NaN or infinity for this text"), "it has NaN or infinity"),
        (DriftError("model 'hunter2'"), "the model has changed"),
        (TextRefused("hunter2 is not allowed"), "the model refuses it"),
        (TextRefused("a text has more than 512 tokens; hunter2"), "more than 512 tokens"),
    ):
        message = str(explain_failures({0: error}, 2, is_stored=True))
        assert words in message
        assert "hunter2" not in message


def test_messages_agree_with_the_number_of_inputs() -> None:
    for error, one, several in (
        (TextError("x"), "input 3 is not valid Unicode", "inputs 3 and 5 are not valid Unicode"),
        (
            TextRefused("a text has more than 9 tokens"),
            "input 3 cannot be embedded: more than 9 tokens",
            "inputs 3 and 5",
        ),
        (ReplayMiss("x"), "input 3 is not in the cache", "inputs 3 and 5 are not in the cache"),
    ):
        assert one in str(explain_failures({3: error}, 8, is_stored=True))
        assert several in str(explain_failures({3: error, 5: error}, 8, is_stored=True))


@pytest.mark.parametrize(
    ("directive", "tiers", "is_stored"),
    [("max-age=0", True, True), ("no-store", True, False), ("no-cache", True, False), ("max-age=0", False, False)],
)
async def test_a_message_says_that_vectors_are_stored_only_if_they_are(
    api: OpenAIServer, tmp_path: Path, directive: str, tiers: bool, is_stored: bool
) -> None:
    settings = {**configure(api), "tiers": [{"type": "memory"}] if tiers else []}
    async with serve(settings, tmp_path) as server:
        answer = await server.embed(["good", "x " * 10_000], headers={"cache-control": directive})
        assert ("are stored" in answer.error["message"]) == is_stored
        again = await server.embed("good", headers={"cache-control": "only-if-cached"})
        assert (again.status == 200) == (is_stored or directive == "no-cache")


async def test_drift_that_refuses_requests_is_logged(
    api: OpenAIServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(configure(api), tmp_path) as server:
        await server.embed("a")
        api.served_model = "another"
        for text in ("b", "c"):
            assert (await server.embed(text)).error["code"] == "drift"
    lines = [record.getMessage() for record in caplog.records if record.name == "embedonce.serve"]
    assert [line for line in lines if "drifted" in line] == [
        f'model "{api.model}": it has drifted: it does not return the vectors that are stored, and nothing is computed '
        "(1 request)"
    ]


@pytest.mark.parametrize("directive", ["max-age=0", "only-if-cached"])
async def test_a_tier_that_must_work_is_an_error_of_the_server_and_one_line_a_minute(
    api: OpenAIServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, directive: str
) -> None:
    tier = {"type": "redis", "url": "redis://127.0.0.1:1", "on_error": "raise"}
    async with serve({**configure(api), "tiers": [tier]}, tmp_path) as server:
        for _ in range(3):
            answer = await server.embed("private text", headers={"cache-control": directive})
            assert (answer.status, answer.error["code"]) == (503, "tier_error")
            assert answer.headers["retry-after"] == "1"
    lines = [record.getMessage() for record in caplog.records if record.name == "embedonce.serve"]
    assert [line for line in lines if "on_error" in line] == [
        f'model "{api.model}": tier "redis" has failed, and its on_error is "raise" (1 request)'
    ]
    assert "Traceback" not in caplog.text


async def test_an_unexpected_error_is_logged_without_its_message(
    api: OpenAIServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(data: Any, *_: Any, **__: Any) -> None:
        raise KeyError(data["input"])

    monkeypatch.setattr("embedonce_server.embedding.read_request", fail)
    async with serve(configure(api), tmp_path) as server:
        answer = await server.embed("hunter2")
        assert (answer.status, answer.error["code"]) == (500, "internal_error")
    assert "a request to /v1/embeddings failed (id=" in caplog.text
    assert "): KeyError" in caplog.text
    assert "embedding.py" in caplog.text
    assert "hunter2" not in caplog.text + answer.body.decode()


@pytest.mark.parametrize(
    ("status", "given", "passed_on"),
    [
        (500, {"Retry-After": "7"}, "7"),
        (408, {"Retry-After": "7"}, "7"),
        (529, {"Retry-After": "1e9"}, "86400"),
        (403, {"Retry-After": "7"}, "7"),
        (400, {"Retry-After": "7"}, "7"),
        (400, {"x-ratelimit-reset-requests": "7s"}, None),
        (503, {"Retry-After": "nan"}, None),
        (503, {"Retry-After": "-5"}, None),
        (503, {"Retry-After": "inf"}, None),
        (503, {"Retry-After": "soon"}, None),
        (503, {}, None),
    ],
)
async def test_the_time_to_wait_of_the_endpoint_is_passed_on(
    api: OpenAIServer, tmp_path: Path, status: int, given: dict[str, str], passed_on: str | None
) -> None:
    api.failure = lambda fault, inputs: Reply(status, {"error": {"message": "busy"}}, given)  # type: ignore[method-assign]
    api.misbehave("server_error", times=None)
    async with serve(configure(api), tmp_path) as server:
        answer = await server.embed("a")
        assert (answer.status, answer.headers.get("retry-after")) == (status, passed_on)


async def test_a_request_that_is_cut_off_by_a_drain_is_told_so(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        for is_draining in (False, True):
            api.misbehave("hang")
            task = asyncio.create_task(server.embed(f"{is_draining}"))
            await asyncio.to_thread(api.until_hanging)
            server.service.state = "draining" if is_draining else "ready"
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() is not is_draining
            api.heal()
        answer = task.result()
        assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "stopping", "1")


async def test_a_text_with_a_lone_surrogate_fails_alone_or_is_repaired(api: OpenAIServer, tmp_path: Path) -> None:
    tenants = {"tenants": [{"name": "search", "keys": [KEY], "tokens_per_day": 1000}]}
    texts = ["a", "cut \ud83d", "b"]
    for serving, headers in (({}, {}), (tenants, {"authorization": f"Bearer {KEY}"})):
        async with serve(configure(api, serving), tmp_path) as server:
            answer = await server.embed(texts, headers=headers)
            assert (answer.status, answer.error["param"]) == (400, "input")
            assert "input 1 is not valid Unicode" in answer.error["message"]
            assert (await server.embed(["a", "b"], headers=headers)).cache[0] == "hit"
            only = {**headers, "cache-control": "only-if-cached"}
            assert (await server.embed(texts, headers=only)).status == 400
        repairing = {**configure(api, serving), "key": {"normalize": ["surrogates"]}}
        async with serve(repairing, tmp_path) as server:
            answer = await server.embed(texts, headers=headers)
            assert np.array_equal(answer.vectors[1], api.vector_of("cut \ufffd"))
            assert (await server.embed("cut \ufffd", headers=headers)).cache[0] == "hit"
