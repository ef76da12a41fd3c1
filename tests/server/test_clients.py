"""The vendors' clients against ``embedonce serve``, whose model is an API on loopback that misbehaves."""

from __future__ import annotations

import asyncio
import importlib.util
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai_clients import (
    PROGRAMS,
    Answer,
    Call,
    Program,
    acall_langchain,
    call_langchain,
    make_litellm_program,
    make_node_program,
    run_async,
    start_litellm,
    start_node,
)
from serve_process import ServeProcess

from embedonce.testing.servers.openai import OpenAIMisbehaviour, OpenAIServer

MODEL = "text-embedding-3-small"
KEY = "key-of-the-search-team"
SLOW_KEY = "key-of-the-slow-team"
WORDS = ("tea", "water", "milk", "juice", "beer")

SERVED = """
[serve]

[[serve.models]]
name = "text-embedding-3-small"
provider = {{ {provider}, model = "text-embedding-3-small" }}

[[serve.models]]
name = "tasks"
provider = {{ {provider}, model = "tasks", prefixes = {{ query = "query: " }} }}

[[serve.tenants]]
name = "search"
keys = ["key-of-the-search-team"]

[[serve.tenants]]
name = "slow"
keys = ["key-of-the-slow-team"]
requests_per_minute = 1

[[tiers]]
type = "memory"
"""


def describe_provider(api: OpenAIServer) -> str:
    """Return the options of a provider that passes every error of the API on."""
    return f'type = "openai", base_url = "{api.base_url}", api_key = "upstream-key", max_retries = 0, timeout = 60'


@pytest.fixture(scope="module")
def shared_api() -> Iterator[OpenAIServer]:
    with OpenAIServer() as api:
        yield api


@pytest.fixture
def api(shared_api: OpenAIServer) -> Iterator[OpenAIServer]:
    """The API behind the server, which has seen no request and has no fault."""
    reset(shared_api)
    yield shared_api
    shared_api.heal()


def reset(api: OpenAIServer) -> None:
    api.heal()
    api.requests.clear()
    api.count.clear()


@pytest.fixture(scope="module")
def server(shared_api: OpenAIServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    configuration = SERVED.format(provider=describe_provider(shared_api))
    with start(configuration, tmp_path_factory.mktemp("served")) as server:
        yield server


def start(configuration: str, folder: Path, *arguments: str) -> ServeProcess:
    (folder / "embedonce.toml").write_text(configuration)
    return ServeProcess("--config", "embedonce.toml", "--access-log", *arguments, folder=folder)


class Client:
    """One of the clients, which asks the server for vectors."""

    def __init__(self, name: str, program: Program, server: ServeProcess) -> None:
        self.name = name
        self._program = program
        self._base_url = server.base_url

    def __call__(self, *texts: str, **options: Any) -> Answer:
        return self._program(Call(base_url=self._base_url, texts=texts, **{"model": MODEL, "key": KEY, **options}))


# The scope groups the tests by client, so that few processes of pytest-xdist import the same one.
@pytest.fixture(scope="module", params=["node", *PROGRAMS])
def embed(request: pytest.FixtureRequest, server: ServeProcess) -> Iterator[Client]:
    if request.param == "node":
        with start_node() as child:
            yield Client("node", make_node_program(child), server)
    else:
        yield Client(request.param, PROGRAMS[request.param], server)


@pytest.fixture
def texts(request: pytest.FixtureRequest) -> list[str]:
    """Five texts that no other test uses."""
    return [f"{word} of {request.node.name}" for word in WORDS]


def has_vectors(answer: Answer, api: OpenAIServer, texts: Sequence[str], **space: Any) -> bool:
    assert answer.error is None
    rows = [api.vector_of(text, **space) for text in texts]
    return len(answer.vectors) == len(rows) and all(map(np.array_equal, answer.vectors, rows))


def read_cache(answer: Answer) -> tuple[str, int, int] | None:
    """Return what the headers say; None if the client does not show them."""
    if answer.headers is None:
        return None
    return (
        answer.headers["x-embedonce-cache"],
        int(answer.headers["x-embedonce-hits"]),
        int(answer.headers["x-embedonce-computed"]),
    )


# --- vectors ------------------------------------------------------------------------------------


def test_the_second_call_is_a_hit_and_says_so(embed: Client, api: OpenAIServer, texts: list[str]) -> None:
    first, second = embed(*texts), embed(*texts)
    assert has_vectors(first, api, texts)
    assert has_vectors(second, api, texts)
    assert len(api.requests) == 1
    assert read_cache(first) in (("miss", 0, 5), None)
    assert read_cache(second) in (("hit", 5, 0), None)
    assert first.tokens in (sum(map(api.tokens_of, texts)), None)
    assert second.tokens in (0, None)


def test_every_encoding_has_the_same_vectors(embed: Client, api: OpenAIServer, texts: list[str]) -> None:
    # LangChain and LlamaIndex do not decode base64 if a program asks for it.
    is_framework = embed.name.startswith(("langchain", "llama-index"))
    for encoding in (None, "float") if is_framework else (None, "float", "base64"):
        assert has_vectors(embed(*texts, encoding=encoding), api, texts)
    assert len(api.requests) == 1


def test_hits_and_misses_of_one_call_come_in_order(embed: Client, api: OpenAIServer, texts: list[str]) -> None:
    a, b, c, d, e = texts
    embed(d, b)
    answer = embed(a, b, c, a, d, e)
    assert has_vectors(answer, api, [a, b, c, a, d, e])
    assert read_cache(answer) in (("partial", 2, 4), None)
    assert api.count == Counter(texts)


def test_dimensions_shorten_the_vectors(embed: Client, api: OpenAIServer, texts: list[str]) -> None:
    for _ in range(2):
        assert has_vectors(embed(*texts, dimensions=4), api, texts, dimensions=4)
    assert len(api.requests) == 1


def test_a_query_is_not_a_document(embed: Client, api: OpenAIServer, texts: list[str]) -> None:
    document = embed(*texts, model="tasks")
    query = embed(*texts, model="tasks", body={"input_type": "query"})
    assert has_vectors(document, api, texts, model="tasks")
    assert has_vectors(query, api, [f"query: {text}" for text in texts], model="tasks")


def test_only_what_is_cached_is_answered(embed: Client, api: OpenAIServer, texts: list[str]) -> None:
    only = {"Cache-Control": "only-if-cached"}
    embed(*texts[:3])
    assert has_vectors(embed(*texts[:3], headers=only), api, texts[:3])
    missing = embed(*texts, headers=only, retries=2)
    assert (missing.status, missing.error) in [(404, "NotFoundError"), (404, None)]
    assert missing.code in ("not_cached", None)
    assert len(api.requests) == 1


# --- errors -------------------------------------------------------------------------------------

NAMES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    429: "RateLimitError",
    500: "InternalServerError",
}


def assert_refused(answer: Answer, status: int, code: str | None = None) -> None:
    """Check the client's own exception. curl has none, and LiteLLM does not show the code."""
    assert answer.status == status
    assert answer.error in (NAMES[status], None)
    if code is not None:
        assert answer.code in (code, None)


REFUSED: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "key": ({"key": "not-the-key-of-a-team"}, 401, "invalid_api_key"),
    "model": ({"model": "text-embedding-9"}, 404, "model_not_found"),
    "dimensions": ({"dimensions": -1}, 400, None),
    "field": ({"body": {"late_chunking": True}}, 400, "unsupported_field"),
}
TEMPORARY: dict[str, tuple[OpenAIMisbehaviour, int]] = {"429": ("rate_limit", 429), "500": ("server_error", 500)}
FAULTS: dict[str, tuple[OpenAIMisbehaviour, int]] = {**TEMPORARY, "400": ("bad_request", 400)}


@pytest.mark.parametrize(("options", "status", "code"), REFUSED.values(), ids=REFUSED)
def test_a_refused_request_is_not_repeated(
    embed: Client,
    server: ServeProcess,
    api: OpenAIServer,
    texts: list[str],
    options: dict[str, Any],
    status: int,
    code: str | None,
) -> None:
    before = server.count_answers(status)
    assert_refused(embed(*texts, retries=2, **options), status, code)
    assert server.count_answers(status) == before + 1
    assert not api.requests


@pytest.mark.parametrize(("fault", "status"), FAULTS.values(), ids=FAULTS)
def test_an_error_of_the_api_is_the_clients_error(
    embed: Client, api: OpenAIServer, texts: list[str], fault: OpenAIMisbehaviour, status: int
) -> None:
    api.misbehave(fault, times=None)
    assert_refused(embed(*texts), status)
    api.heal()
    assert has_vectors(embed(*texts), api, texts)


@pytest.mark.parametrize(("fault", "status"), TEMPORARY.values(), ids=TEMPORARY)
def test_a_client_tries_again_until_the_api_is_well(
    embed: Client,
    server: ServeProcess,
    api: OpenAIServer,
    texts: list[str],
    fault: OpenAIMisbehaviour,
    status: int,
) -> None:
    before = server.count_answers(status)
    api.misbehave(fault)
    answer = embed(texts[0], retries=2)
    assert has_vectors(answer, api, texts[:1])
    assert read_cache(answer) in (("miss", 0, 1), None)
    assert server.count_answers(status) == before + 1


def test_a_limited_tenant_is_told_when_to_try_again(server: ServeProcess, api: OpenAIServer) -> None:
    embed = Client("openai", PROGRAMS["openai"], server)
    embed("one request of the slow team", key=SLOW_KEY)
    refused = embed("two requests of the slow team", key=SLOW_KEY)
    assert_refused(refused, 429, "requests_per_minute_exceeded")
    assert refused.headers is not None
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert 'the limit of tenant "slow" is 1 request per minute; try again in ' in str(refused.message)


@pytest.mark.timeout(300)  # its import takes a minute on a very busy machine
def test_litellm_behaves_as_the_other_clients(server: ServeProcess, api: OpenAIServer) -> None:
    """All of the above in one test, because each process of pytest-xdist would import LiteLLM for seconds."""
    with start_litellm() as child:
        embed = Client("litellm", make_litellm_program(child), server)
        checks: list[Callable[..., None]] = [
            test_the_second_call_is_a_hit_and_says_so,
            test_every_encoding_has_the_same_vectors,
            test_hits_and_misses_of_one_call_come_in_order,
            test_dimensions_shorten_the_vectors,
            test_a_query_is_not_a_document,
            test_only_what_is_cached_is_answered,
        ]
        checks += [
            partial(test_a_refused_request_is_not_repeated, server=server, options=options, status=status, code=code)
            for options, status, code in REFUSED.values()
        ]
        checks += [
            partial(test_an_error_of_the_api_is_the_clients_error, fault=fault, status=status)
            for fault, status in FAULTS.values()
        ]
        checks += [
            partial(test_a_client_tries_again_until_the_api_is_well, server=server, fault=fault, status=status)
            for fault, status in TEMPORARY.values()
        ]
        for number, check in enumerate(checks):
            reset(api)
            check(embed=embed, api=api, texts=[f"{word} of LiteLLM's check {number}" for word in WORDS])


# --- what only some clients can do ----------------------------------------------------------------


@pytest.fixture
def vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tiktoken use the vocabulary that comes with LlamaIndex, because tests must not download one."""
    spec = importlib.util.find_spec("llama_index.core")
    assert spec is not None
    assert spec.origin is not None
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path(spec.origin).parent / "_static" / "tiktoken_cache"))


TOKEN_PROGRAMS: dict[str, Program] = {
    "blocking": partial(call_langchain, sends_tokens=True),
    "async": run_async(acall_langchain, sends_tokens=True),
}


@pytest.mark.usefixtures("vocabulary")
@pytest.mark.parametrize("program", TOKEN_PROGRAMS.values(), ids=TOKEN_PROGRAMS)
def test_langchain_sends_token_numbers(
    server: ServeProcess, api: OpenAIServer, texts: list[str], program: Program
) -> None:
    import tiktoken

    tokens = [tiktoken.get_encoding("cl100k_base").encode(text) for text in texts]
    for _ in range(2):
        answer = Client("langchain", program, server)(*texts)
        assert all(map(np.array_equal, answer.vectors, map(api.vector_of, tokens)))
        assert len(answer.vectors) == len(tokens)
    assert [request.body["input"] for request in api.requests] == [tokens]


@pytest.mark.usefixtures("vocabulary")
def test_langchain_is_told_to_send_texts_if_a_model_has_no_token_numbers(
    server: ServeProcess, api: OpenAIServer, texts: list[str]
) -> None:
    answer = Client("langchain", TOKEN_PROGRAMS["blocking"], server)(*texts, model="tasks")
    assert_refused(answer, 400)
    assert "check_embedding_ctx_length=False" in str(answer.message)
    assert not api.requests


def test_clients_list_the_models(server: ServeProcess) -> None:
    with openai.OpenAI(base_url=server.base_url, api_key=KEY) as client:
        assert [model.id for model in client.models.list()] == [MODEL, "tasks"]
        assert client.models.retrieve(MODEL).id == MODEL
    with start_node() as node:
        assert node.ask(baseURL=server.base_url, apiKey=KEY) == {"models": [MODEL, "tasks"]}


# --- several workers ------------------------------------------------------------------------------

SHARED = """
[[serve.models]]
name = "text-embedding-3-small"
provider = {{ {provider}, model = "text-embedding-3-small", coalesce = "2ms" }}

[[tiers]]
type = "memory"

[[tiers]]
type = "redis"
url = "{redis}"
prefix = "clients:"
timeout = "60s"
lease = "30s"
"""

COLD = [f"cold text {i}" for i in range(1000)]


async def ask_for_cold_texts(base_url: str, seed: int) -> list[Any]:
    """Ask for all texts in a random order, 40 at a time. Return the rows in the order of the texts."""
    order = list(range(len(COLD)))
    random.Random(seed).shuffle(order)
    parts = [order[start : start + 40] for start in range(0, len(order), 40)]
    rows: list[Any] = [None] * len(COLD)
    async with openai.AsyncOpenAI(base_url=base_url, api_key="any", max_retries=0, timeout=90) as client:

        async def ask(part: list[int]) -> None:
            answer = await client.embeddings.create(model=MODEL, input=[COLD[i] for i in part])
            for i, item in zip(part, answer.data, strict=True):
                rows[i] = item.embedding

        # Four connections per client, so that each client talks to several workers.
        for start in range(0, len(parts), 4):
            await asyncio.gather(*map(ask, parts[start : start + 4]))
    return rows


async def ask_with_clients(base_url: str, count: int) -> list[list[Any]]:
    return await asyncio.gather(*(ask_for_cold_texts(base_url, seed) for seed in range(count)))


@pytest.mark.timeout(300)  # four workers and sixteen clients, on a busy machine
def test_sixteen_clients_of_four_workers_compute_a_thousand_cold_texts_once(
    api: OpenAIServer, tmp_path: Path, redis_server: Any
) -> None:
    configuration = SHARED.format(provider=describe_provider(api), redis=redis_server.url)
    with start(configuration, tmp_path, "--workers", "4") as server:
        found = asyncio.run(ask_with_clients(server.base_url, 16))
        workers = set(re.findall(r" worker (\d+): .* POST /v1/embeddings ", server.log))
    expected = np.array([api.vector_of(text) for text in COLD])
    assert all(np.array_equal(np.float32(rows), expected) for rows in found)
    assert api.count == Counter(COLD)
    assert len(workers) > 1
