"""The loopback APIs, called with the vendors' own clients: their answers, refusals and faults."""

from __future__ import annotations

import concurrent.futures
import json
import threading
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from google import genai
from google.genai import errors, types

from embedonce.testing import GeminiServer, OpenAIServer


@pytest.fixture
def api() -> Iterator[OpenAIServer]:
    with OpenAIServer(deployments={"mine": "text-embedding-3-small"}) as server:
        yield server


@pytest.fixture
def client(api: OpenAIServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=api.base_url, api_key="any", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def gemini() -> Iterator[GeminiServer]:
    with GeminiServer() as server:
        yield server


@pytest.fixture
def genai_client(gemini: GeminiServer) -> Iterator[genai.Client]:
    with genai.Client(api_key="any", http_options=types.HttpOptions(base_url=gemini.base_url)) as client:
        yield client


def make_contents(*texts: str) -> Any:
    return [types.Content(parts=[types.Part(text=text)]) for text in texts]


# --- OpenAI -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["float", "base64", None])
@pytest.mark.parametrize("given", ["a", ["a", "b"], [1, 2], [[1, 2], [3]]], ids=str)
def test_each_shape_of_input_in_each_format(api: OpenAIServer, client: openai.OpenAI, given: Any, form: Any) -> None:
    inputs = given if isinstance(given[0], list) or (isinstance(given, list) and given[0] == "a") else [given]
    answer = client.embeddings.create(
        model=api.model, input=given, encoding_format=form or openai.omit, dimensions=4, extra_body={"kind": 7}
    )
    for index, (one, item) in enumerate(zip(inputs, answer.data, strict=True)):
        raw: Any = item.embedding
        found = np.frombuffer(b64decode(raw), "<f4") if form == "base64" else np.float32(raw)
        assert np.array_equal(found, api.vector_of(one, dimensions=4, kind=7))
        assert item.index == index
    assert answer.usage.total_tokens == sum(map(api.tokens_of, inputs))
    assert api.texts == len(inputs)
    assert api.requests[-1].headers["authorization"] == "Bearer any"


def test_a_vector_depends_on_everything_but_user_and_format(api: OpenAIServer, client: openai.OpenAI) -> None:
    def vector(**options: Any) -> bytes:
        asked = {"model": api.model, "input": "a", **options}
        return np.float32(client.embeddings.create(**asked).data[0].embedding).tobytes()

    others = [
        {"model": "another"},
        {"dimensions": 4},
        {"extra_body": {"input_type": "query"}},
        {"input": "b"},
        {"input": [1]},
    ]
    assert len({vector(), *(vector(**other) for other in others)}) == 1 + len(others)
    assert vector() == vector(user="me") == vector(encoding_format="float")
    assert np.linalg.norm(api.vector_of("a")) == pytest.approx(1)


def test_both_paths_of_azure(api: OpenAIServer) -> None:
    with openai.AzureOpenAI(azure_endpoint=api.url, api_key="k", api_version="2024-10-21", max_retries=0) as azure:
        found = azure.embeddings.create(model="mine", input="a").data[0].embedding
        with pytest.raises(openai.NotFoundError):
            azure.embeddings.create(model="another", input="a")
    with openai.OpenAI(base_url=f"{api.url}/openai/v1/", api_key="k", max_retries=0) as client:
        again = client.embeddings.create(model="mine", input="a").data[0].embedding
    assert found == again == api.vector_of("a").tolist()
    assert api.requests[0].path == "/openai/deployments/mine/embeddings"
    assert api.requests[0].query == {"api-version": "2024-10-21"}


def test_a_server_without_base64_answers_floats(client: openai.OpenAI) -> None:
    with OpenAIServer(base64=False) as api:
        answer = client.with_options(base_url=api.base_url).embeddings.create(model="m", input="a")
        assert answer.data[0].embedding == api.vector_of("a", model="m").tolist()


def test_models_are_listed(api: OpenAIServer, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [api.model]


@pytest.mark.parametrize(
    "given",
    ["", [], ["a", ""], [[1], []], ["a", 1], ["a"] * 11, "word " * 101, ["word " * 60] * 5],
    ids=["empty", "none", "empty_in_list", "no_tokens", "mixed", "too_many", "too_long", "too_long_together"],
)
def test_what_the_api_refuses(client: openai.OpenAI, given: Any) -> None:
    with OpenAIServer(max_inputs=10, max_tokens=100, max_total_tokens=250) as api:
        with pytest.raises(openai.BadRequestError):
            client.with_options(base_url=api.base_url).embeddings.create(model="m", input=given)
        assert api.texts == 0


def test_a_wrong_key_is_refused(client: openai.OpenAI) -> None:
    with OpenAIServer(api_key="right") as api:
        right = client.with_options(base_url=api.base_url, api_key="right")
        assert right.embeddings.create(model="m", input="a").data
        with pytest.raises(openai.AuthenticationError):
            right.with_options(api_key="wrong").embeddings.create(model="m", input="a")


FAILURES = {
    "rate_limit": openai.RateLimitError,
    "rate_limit_message": openai.RateLimitError,
    "rate_limit_no_hint": openai.RateLimitError,
    "quota": openai.RateLimitError,
    "server_error": openai.InternalServerError,
    "bad_request": openai.BadRequestError,
    "unauthorized": openai.AuthenticationError,
    "truncated": openai.APIConnectionError,
    "disconnect": openai.APIConnectionError,
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_happens_the_given_number_of_times(api: OpenAIServer, client: openai.OpenAI, kind: Any) -> None:
    api.misbehave(kind, times=2)
    for _ in range(2):
        with pytest.raises(FAILURES[kind]):
            client.embeddings.create(model=api.model, input="a")
    assert client.embeddings.create(model=api.model, input="a").data


def test_a_rate_limit_sends_retry_after(api: OpenAIServer, client: openai.OpenAI) -> None:
    api.misbehave("rate_limit", seconds=7)
    with pytest.raises(openai.RateLimitError) as caught:
        client.embeddings.create(model=api.model, input="a")
    assert caught.value.response.headers["retry-after"] == "7"
    api.misbehave("rate_limit", seconds=0.01)
    assert client.with_options(max_retries=1).embeddings.create(model=api.model, input="a").data


def request_embeddings(url: str, **more: Any) -> Any:
    reply = httpx2.post(f"{url}/v1/embeddings", json={"model": "m", "input": ["a", "b", "c"], **more}, timeout=60)
    assert reply.status_code == 200
    return reply.text


DAMAGED = {
    "out_of_order": ([2, 1, 0], "cba"),
    "duplicate_index": ([0, 1, 0], "abc"),
    "short": ([0, 1], "bc"),
    "long": ([0, 1, 2, 3], "?abc"),
    "empty": ([], ""),
    "nan": ([0, 1, 2], "?bc"),
    "infinity": ([0, 1, 2], "?bc"),
    "zeros": ([0, 1, 2], "?bc"),
    "dimension": ([0, 1, 2], "???"),
    "ragged": ([0, 1, 2], "?bc"),
    "no_values": ([0, 1, 2], "?bc"),
    "null": ([0, 1, 2], "-bc"),
}


@pytest.mark.parametrize("form", ["float", "base64"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_fault_damages_the_answer_as_its_name_says(api: OpenAIServer, kind: Any, form: str) -> None:
    api.misbehave(kind)
    data = json.loads(request_embeddings(api.url, encoding_format=form))["data"]
    known = {api.vector_of(text, model="m").tobytes(): text for text in "abc"}

    def raw(embedding: Any) -> bytes:
        return b64decode(embedding) if form == "base64" else np.float32(embedding).tobytes()

    found = "".join("-" if one is None else known.get(raw(one), "?") for one in (item["embedding"] for item in data))
    assert ([item["index"] for item in data], found) == DAMAGED[kind]
    if kind in ("nan", "infinity"):
        values = np.frombuffer(raw(data[0]["embedding"]), np.float32)
        assert np.isnan(values).sum() == (kind == "nan")
        assert np.isinf(values).sum() == (kind == "infinity")


def test_one_missing_index(api: OpenAIServer) -> None:
    api.misbehave("no_zero_index")
    data = json.loads(request_embeddings(api.url))["data"]
    assert [item.get("index") for item in data] == [None, 1, 2]


@pytest.mark.parametrize("kind", ["nan", "zeros", "null", "ragged"])
def test_a_fault_damages_the_vectors_of_matching_texts(api: OpenAIServer, kind: Any) -> None:
    api.misbehave(kind, times=None, where=lambda text: text in ("a", "c"))
    data = json.loads(request_embeddings(api.url))["data"]
    right = [
        item["embedding"] == api.vector_of(text, model="m").tolist() for item, text in zip(data, "abc", strict=True)
    ]
    assert right == [False, True, False]
    data = json.loads(request_embeddings(api.url, input=["b", "d"]))["data"]
    assert [item["embedding"] for item in data] == [api.vector_of(text, model="m").tolist() for text in "bd"]


def test_several_faults_for_different_texts(api: OpenAIServer, client: openai.OpenAI) -> None:
    api.misbehave("server_error", times=None, where=lambda text: text == "a", message="cannot embed {text}")
    api.misbehave("bad_request", where=lambda text: text == "b", message="invalid: {text!r}")
    with pytest.raises(openai.BadRequestError, match=r"invalid: 'b'"):
        client.embeddings.create(model="m", input=["b", "c"])
    assert client.embeddings.create(model="m", input=["b", "c"]).data
    for _ in range(2):
        with pytest.raises(openai.InternalServerError, match="cannot embed a"):
            client.embeddings.create(model="m", input=["b", "a"])
    api.heal()
    assert client.embeddings.create(model="m", input=["b", "a"]).data


def test_a_rate_of_requests(api: OpenAIServer, client: openai.OpenAI) -> None:
    now = [100.0]
    api.limit_rate(2, 60, kind="rate_limit_message", clock=lambda: now[0])
    for text in "ab":
        client.embeddings.create(model="m", input=text)
    now[0] += 45
    with pytest.raises(openai.RateLimitError, match=r"try again in 15s"):
        client.embeddings.create(model="m", input="c")
    now[0] += 15
    assert client.embeddings.create(model="m", input="c").data
    api.limit_rate(0, 60)
    with pytest.raises(openai.RateLimitError):
        client.embeddings.create(model="m", input="c")
    api.heal()
    assert client.embeddings.create(model="m", input="c").data


def test_a_rate_limit_without_a_hint(api: OpenAIServer, client: openai.OpenAI) -> None:
    api.misbehave("rate_limit_no_hint", seconds=7)
    with pytest.raises(openai.RateLimitError) as caught:
        client.embeddings.create(model="m", input="a")
    assert "retry-after" not in caught.value.response.headers
    assert "7" not in str(caught.value)


def test_a_batch_that_is_too_large(client: openai.OpenAI) -> None:
    message = "batch size is invalid, it should not be larger than {limit}"
    with OpenAIServer(max_inputs=10, batch_status=422, batch_message=message) as api:
        client = client.with_options(base_url=api.base_url)
        with pytest.raises(openai.UnprocessableEntityError, match="larger than 10"):
            client.embeddings.create(model="m", input=["a"] * 11)
        assert client.embeddings.create(model="m", input=["a"] * 10).data


def test_a_format_that_the_server_refuses(client: openai.OpenAI) -> None:
    with OpenAIServer(encoding_formats=("base64",), served_model="e5-base") as api:
        client = client.with_options(base_url=api.base_url)
        with pytest.raises(openai.BadRequestError, match="encoding_format"):
            client.embeddings.create(model="m", input="a", encoding_format="float")
        assert client.embeddings.create(model="m", input="a").model == "e5-base"
        assert isinstance(json.loads(request_embeddings(api.url))["data"][0]["embedding"], list)


def test_answers_without_usable_vectors(api: OpenAIServer) -> None:
    api.misbehave("no_index")
    assert "index" not in json.loads(request_embeddings(api.url))["data"][0]
    api.misbehave("error_as_200")
    assert "data" not in json.loads(request_embeddings(api.url))
    api.misbehave("not_json")
    assert request_embeddings(api.url).startswith("<html>")


@pytest.mark.parametrize("kind", ["hang", "drip"])
def test_a_slow_reply_ends_when_the_fault_does(api: OpenAIServer, kind: Any) -> None:
    api.misbehave(kind, times=None, seconds=30)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(request_embeddings, api.url)
        if kind == "hang":
            api.until_hanging()
        while not api.requests:
            threading.Event().wait(0.01)
        assert not answer.done()
        api.heal()
        assert json.loads(answer.result(60))["data"]
    assert json.loads(request_embeddings(api.url))["data"]


def test_a_body_that_drips_is_complete(api: OpenAIServer) -> None:
    api.misbehave("drip", seconds=0.0001)
    assert json.loads(request_embeddings(api.url, dimensions=1))["data"]


def test_closing_releases_hanging_requests(client: openai.OpenAI) -> None:
    api = OpenAIServer()
    api.misbehave("hang", times=None)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(request_embeddings, api.url)
        api.until_hanging()
        api.close()
        assert json.loads(answer.result(60))["data"]
    with pytest.raises(openai.APIConnectionError):
        client.with_options(base_url=api.base_url).embeddings.create(model="m", input="a")


def test_an_unknown_fault_is_refused(api: OpenAIServer, gemini: GeminiServer) -> None:
    for server in (api, gemini):
        with pytest.raises(ValueError, match="kind must be one of"):
            server.misbehave("no_such_thing")  # type: ignore[arg-type]


# --- Gemini -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gemini-embedding-001", "gemini-embedding-2", "text-embedding-004"])
def test_gemini_answers_its_client(gemini: GeminiServer, genai_client: genai.Client, model: str) -> None:
    about = types.EmbedContentConfig(task_type="RETRIEVAL_QUERY", output_dimensionality=4)
    answer = genai_client.models.embed_content(model=model, contents=make_contents("a", "b"), config=about)
    assert answer.embeddings is not None
    for text, found in zip("ab", answer.embeddings, strict=True):
        wanted = gemini.vector_of(text, model=model, task_type="RETRIEVAL_QUERY", dimensions=4)
        assert np.array_equal(np.float32(found.values), wanted)
    assert gemini.count == {"a": 1, "b": 1}
    assert gemini.requests[-1].headers["x-goog-api-key"] == "any"


def test_gemini_has_one_vector_for_a_content_of_parts(gemini: GeminiServer, genai_client: genai.Client) -> None:
    """For a newer model, its client turns a list of strings into one content, which is easy to miss."""
    answer = genai_client.models.embed_content(model="gemini-embedding-2", contents=["a", "b"])
    assert answer.embeddings is not None
    assert len(answer.embeddings) == 1
    assert gemini.count == {"ab": 1}


def test_the_request_for_a_single_content(gemini: GeminiServer) -> None:
    body = {"content": {"parts": [{"text": "a"}]}, "outputDimensionality": 16}
    reply = httpx2.post(f"{gemini.url}/v1beta/models/{gemini.model}:embedContent", json=body, timeout=60)
    assert np.array_equal(np.float32(reply.json()["embedding"]["values"]), gemini.vector_of("a"))


def test_vectors_with_fewer_dimensions_do_not_have_length_1(gemini: GeminiServer) -> None:
    assert np.linalg.norm(gemini.vector_of("a")) == pytest.approx(1)
    assert np.linalg.norm(gemini.vector_of("a", dimensions=8)) == pytest.approx(0.75)


def test_what_gemini_refuses(genai_client: genai.Client, gemini: GeminiServer) -> None:
    for texts in ([""], ["a"] * 101):
        with pytest.raises(errors.ClientError) as caught:
            genai_client.models.embed_content(model=gemini.model, contents=make_contents(*texts))
        assert caught.value.code == 400
    with pytest.raises(errors.ClientError):
        genai_client.models.embed_content(
            model=gemini.model, contents=make_contents("a"), config=types.EmbedContentConfig(output_dimensionality=17)
        )


def test_gemini_truncates_or_refuses_a_text_that_is_too_long() -> None:
    long = "word " * 3000
    for truncates in (True, False):
        with GeminiServer(truncates=truncates, api_key="k") as server:
            options = types.HttpOptions(base_url=server.base_url)
            with genai.Client(api_key="k", http_options=options) as client:
                if not truncates:
                    with pytest.raises(errors.ClientError):
                        client.models.embed_content(model=server.model, contents=make_contents(long))
                    continue
                answer = client.models.embed_content(model=server.model, contents=make_contents(long, long + "more"))
                assert answer.embeddings is not None
                assert answer.embeddings[0].values == answer.embeddings[1].values
            with genai.Client(api_key="wrong", http_options=options) as client, pytest.raises(errors.ClientError):
                client.models.embed_content(model=server.model, contents=make_contents("a"))


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("rate_limit", errors.ClientError),
        ("rate_limit_message", errors.ClientError),
        ("rate_limit_no_hint", errors.ClientError),
        ("rate_limit_info", errors.ClientError),
        ("bad_request", errors.ClientError),
        ("quota", errors.ClientError),
        ("server_error", errors.ServerError),
        ("unauthorized", errors.ClientError),
        ("not_json", json.JSONDecodeError),
        ("truncated", httpx2.RemoteProtocolError),
        ("disconnect", httpx2.RemoteProtocolError),
    ],
)
def test_gemini_fails_on_demand(
    gemini: GeminiServer, genai_client: genai.Client, kind: Any, error: type[Exception]
) -> None:
    gemini.misbehave(kind)
    with pytest.raises(error):
        genai_client.models.embed_content(model=gemini.model, contents=make_contents("a"))
    assert genai_client.models.embed_content(model=gemini.model, contents=make_contents("a")).embeddings


def test_gemini_names_the_time_to_wait(gemini: GeminiServer, genai_client: genai.Client) -> None:
    gemini.misbehave("rate_limit_info", seconds=32)
    with pytest.raises(errors.ClientError) as caught:
        genai_client.models.embed_content(model=gemini.model, contents=make_contents("a"))
    assert caught.value.details["error"]["details"][0]["retryDelay"] == "32s"
    gemini.misbehave("rate_limit_message", seconds=32)
    with pytest.raises(errors.ClientError, match="retry in 32s"):
        genai_client.models.embed_content(model=gemini.model, contents=make_contents("a"))


def test_a_gemini_fault_for_one_text(gemini: GeminiServer, genai_client: genai.Client) -> None:
    gemini.misbehave("server_error", times=None, where=lambda text: text == "b", message="cannot embed {text}")
    assert genai_client.models.embed_content(model=gemini.model, contents=make_contents("a", "c")).embeddings
    with pytest.raises(errors.ServerError, match="cannot embed b"):
        genai_client.models.embed_content(model=gemini.model, contents=make_contents("a", "b"))


@pytest.mark.parametrize("kind", sorted(DAMAGED.keys() - {"out_of_order", "duplicate_index"}))
def test_a_gemini_fault_damages_the_answer_as_its_name_says(
    gemini: GeminiServer, genai_client: genai.Client, kind: Any
) -> None:
    gemini.misbehave(kind)
    answer = genai_client.models.embed_content(model=gemini.model, contents=make_contents("a", "b", "c"))
    known = {gemini.vector_of(text).tobytes(): text for text in "abc"}
    rows = [item.values for item in answer.embeddings or []]
    found = ["-" if row is None else known.get(np.float32(row).tobytes(), "?") for row in rows]
    assert "".join(found) == DAMAGED[kind][1]
