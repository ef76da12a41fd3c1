"""The importer ``litellm-redis`` reads the answers that LiteLLM has cached in Redis."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import optional
import pytest
import redis
from http_servers import Handler, HttpServer
from hypothesis import given
from hypothesis import strategies as st
from importers.redis_sources import RedisSourceContract, as_dict, expect, list_keys, make_database, make_vectors
from importers.stores.litellm_redis import make_cache, write
from servers import RedisServer, wait_until

from embedonce.errors import ConfigError, SourceError
from embedonce_importers.litellm_redis import LiteLLMRedisImporter, decode_answer, is_ambiguous

pytestmark = optional.needs("litellm")

TEXTS = ["first", "", "Grüße 🎉", "a\nb\0", " first ", "x" * 5000, "user: name and more"]
VECTORS = make_vectors(len(TEXTS))


class TestContract(RedisSourceContract):
    importer = LiteLLMRedisImporter
    write = staticmethod(write)

    def can_hold(self, text: str) -> bool:
        return not is_ambiguous(text)

    def damage(self, importer: Any, text: str) -> None:
        with redis.Redis.from_url(importer.test_options["url"]) as client:
            assert client.set(make_key(text), '{"timestamp": 1.0, "response": {"embedding": null}}', xx=True)


def make_key(text: str, parameters: str = "") -> str:
    return hashlib.sha256(f"model: the-groupinput: {text}{parameters}".encode()).hexdigest()


class EmbeddingsEndpoint(Handler):
    """An endpoint as OpenAI's. The vector of a text has its length and the number of its bytes."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        data = []
        for index, text in enumerate(texts):
            vector: Any = make_vector(text)
            if body.get("encoding_format") == "base64":
                vector = base64.b64encode(np.array(vector, "<f4").tobytes()).decode()
            data.append({"object": "embedding", "index": index, "embedding": vector})
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        answer = json.dumps({"object": "list", "model": body["model"], "data": data, "usage": usage}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


def make_vector(text: str) -> list[float]:
    return [float(len(text)), len(text.encode()) / 7, -2e-7]


@pytest.fixture
def endpoint() -> Iterator[HttpServer]:
    server = HttpServer(EmbeddingsEndpoint)
    yield server
    server.close()


@pytest.mark.filterwarnings("default")  # of LiteLLM and its libraries
def test_the_answers_of_litellm_itself_are_read(redis_server: RedisServer, endpoint: HttpServer) -> None:
    import litellm

    url = make_database(redis_server)
    model = "openai/text-embedding-3-small"
    common = {"model": model, "api_base": f"{endpoint.url}/v1", "api_key": "none", "caching": True}

    async def embed() -> None:
        await litellm.aembedding(input=["none a", "none bb"], **common)
        await litellm.aembedding(**common, input="float", encoding_format="float")
        await litellm.aembedding(**common, input=["base64"], encoding_format="base64")
        await litellm.aembedding(**common, input=["shortened"], dimensions=3, encoding_format="float")
        await litellm.aembedding(**common, input=["shortened too"], dimensions=3)
        with redis.Redis.from_url(url) as client:
            while client.dbsize() < 6:  # LiteLLM writes its answers in the background
                await asyncio.sleep(0.01)
        await litellm.cache.disconnect()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        litellm.cache = make_cache(url, "the-namespace")
        try:
            asyncio.run(embed())
            litellm.embedding(input="blocking", **common)
            litellm.embedding(input=["in a list"], **common)
            with redis.Redis.from_url(url) as client:
                wait_until(lambda: client.dbsize() == 8, "LiteLLM has written all answers")
        finally:
            litellm.cache = None

    texts = ["none a", "none bb", "float", "base64", "blocking"]
    shortened = ["shortened", "shortened too"]
    for dimensions, expected in ((None, texts), (3, shortened)):
        importer = LiteLLMRedisImporter(url=url, group=model, namespace="the-namespace", dimensions=dimensions)
        importer.check()
        found = importer.lookup([*texts, *shortened, "in a list", "not stored", "lone \udc80 surrogate"])
        assert as_dict(found) == {text: np.float32(make_vector(text)).tobytes() for text in expected}
        assert not found.unreadable
        importer.close()
    importer = LiteLLMRedisImporter(url=url, group=model, namespace="the-namespace")
    # This text is also how LiteLLM writes the list of the request into the key.
    found = importer.lookup(["['in a list']"])
    assert list(found.texts) == []
    assert sum(found.unreadable.values()) == 1
    importer.close()


@pytest.mark.parametrize(
    "parameters",
    [
        {"encoding_format": "float"},
        {"encoding_format": "base64"},
        {"dimensions": 8, "encoding_format": "float"},
        {"encoding_format": "base64", "dimensions": 8},
        {"dimensions": 8},
    ],
)
def test_every_order_of_the_parameters_is_found(redis_server: RedisServer, parameters: dict[str, Any]) -> None:
    importer = LiteLLMRedisImporter(**write(make_database(redis_server), TEXTS, VECTORS, **parameters))  # type: ignore[arg-type]
    importer.check()
    assert as_dict(importer.lookup(TEXTS)) == expect(TEXTS, VECTORS)
    importer.close()


def test_other_groups_namespaces_and_dimensions_find_nothing(redis_server: RedisServer) -> None:
    options = write(make_database(redis_server), TEXTS, VECTORS, namespace="one")
    for changed in ({"group": "the-group2"}, {"namespace": "two"}, {"namespace": ""}, {"dimensions": 8}):
        importer = LiteLLMRedisImporter(**{**options, **changed})  # type: ignore[arg-type]
        assert as_dict(importer.lookup(TEXTS)) == {}
        importer.close()


def test_a_text_whose_key_belongs_to_another_text_is_left_out(redis_server: RedisServer) -> None:
    url = make_database(redis_server)
    options = write(url, ["first"], make_vectors(1), encoding_format="float", dimensions=8, user="somebody")
    write(url, ["second"], make_vectors(1), user="somebody")
    with redis.Redis.from_url(url) as client:  # tokens in place of a text
        for tokens in ("17", "[1, 2]"):
            client.set(make_key(tokens), client.get(list_keys(client)[0]) or b"")
    texts = ["firstencoding_format: floatdimensions: 8user: somebody", "seconduser: somebody", "17", "[1, 2]"]
    importer = LiteLLMRedisImporter(**{**options, "dimensions": None})  # type: ignore[arg-type]
    found = importer.lookup(texts)
    assert list(found.texts) == []
    assert sum(found.unreadable.values()) == len(texts)
    assert importer.lookup(["18 is not stored", "18"]).unreadable == {}
    importer.close()


def test_the_first_valid_answer_counts(redis_server: RedisServer) -> None:
    url = make_database(redis_server)
    importer = LiteLLMRedisImporter(**write(url, ["text"], VECTORS[:1], encoding_format="base64"))  # type: ignore[arg-type]
    with redis.Redis.from_url(url) as client:
        client.set(make_key("text"), "damaged")
    found = importer.lookup(["text"])
    assert as_dict(found) == expect(["text"], VECTORS[:1])
    assert not found.unreadable
    importer.close()


def test_check_says_what_is_missing(redis_server: RedisServer) -> None:
    options = write(make_database(redis_server), TEXTS, VECTORS, namespace="one")
    for namespace, message in (("two", "with the namespace 'two'; check namespace"), ("", "without a namespace")):
        importer = LiteLLMRedisImporter(**{**options, "namespace": namespace})  # type: ignore[arg-type]
        with pytest.raises(SourceError, match=message):
            importer.check()
        importer.close()


def test_an_empty_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="group must be"):
        LiteLLMRedisImporter(url="redis://h", group="")


ENTRY = {"embedding": [1.0, 2.5], "index": 0, "object": "embedding", "model": "m", "format_version": 2}
RESPONSE = json.dumps({"model": "m", "data": [{"embedding": [1.0, 2.5], "index": 0}]})


def test_both_forms_of_answers_are_decoded() -> None:
    for value in (json.dumps({"timestamp": 1.5, "response": ENTRY}), repr({"timestamp": 1.5, "response": RESPONSE})):
        assert decode_answer(value.encode()).tolist() == [1.0, 2.5]


@pytest.mark.parametrize(
    "stored",
    [
        {"response": {**ENTRY, "format_version": 1}},
        {"response": {**ENTRY, "embedding": None}},
        {"response": {**ENTRY, "embedding": []}},
        {"response": {**ENTRY, "embedding": [True]}},
        {"response": {**ENTRY, "embedding": [[1.0]]}},
        {"response": {**ENTRY, "embedding": "AAAA"}},
        {"response": {**ENTRY, "embedding": "no base64 ü"}},
        {"response": {"choices": [{"message": "an answer of a chat"}]}},
        {"response": [1.0]},
        [1.0],
    ],
)
def test_answers_that_are_no_embedding_are_refused(stored: object) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decode_answer(json.dumps(stored).encode())


@pytest.mark.parametrize(
    "stored",
    [
        {"timestamp": 1.0, "response": json.dumps({"data": [{"embedding": [1.0]}, {"embedding": [2.0]}]})},
        {"timestamp": 1.0, "response": json.dumps({"data": [[1.0]]})},
        {"timestamp": 1.0, "response": json.dumps({"choices": []})},
        {"timestamp": 1.0, "response": 5},
        {"timestamp": 1.0},
    ],
)
def test_blocking_answers_that_are_not_one_embedding_are_refused(stored: object) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decode_answer(repr(stored).encode())


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: f"{{'{text}".encode(errors="replace")))
def test_other_bytes_are_refused_with_a_reason(value: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        decode_answer(value)
    assert str(caught.value) in REASONS


REASONS = {
    "not an embedding of LiteLLM",
    "truncated or invalid JSON",
    "an answer of LiteLLM without a vector",
}


def test_code_and_deep_nesting_are_refused() -> None:
    for value in (b"{'a': __import__('os')}", b"{'" * 5000, b"{'a': " + b"[" * 100_000, b"{" * 100_000):
        with pytest.raises(ValueError, match=r"not an embedding|invalid JSON"):
            decode_answer(value)
