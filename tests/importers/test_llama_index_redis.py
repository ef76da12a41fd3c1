"""The importer ``llama-index-redis`` reads the embeddings cache of LlamaIndex in a RedisKVStore."""

from __future__ import annotations

from typing import Any

import optional
import pytest
import redis
from importers.redis_sources import RedisSourceContract, as_dict, expect, make_database, make_vectors
from importers.stores.llama_index_redis import write
from servers import RedisServer

from embedonce.errors import SourceError
from embedonce_importers.llama_index_redis import LlamaIndexRedisImporter

pytestmark = [optional.needs("llama_index.core"), optional.needs("llama_index.storage.kvstore.redis")]

TEXTS = ["first", "", "Grüße 🎉", "a\nb\0", " first ", "x" * 5000]
VECTORS = make_vectors(len(TEXTS))


class TestContract(RedisSourceContract):
    importer = LlamaIndexRedisImporter
    write = staticmethod(write)

    def damage(self, importer: Any, text: str) -> None:
        with redis.Redis.from_url(importer.test_options["url"]) as client:
            assert client.hset("embeddings", text, '{"1": [0.5, null]}') == 0


def test_line_breaks_are_left_out_unless_the_option_says_what_became_of_them(redis_server: RedisServer) -> None:
    url = make_database(redis_server)
    write(url, TEXTS, VECTORS)
    stored = expect(TEXTS, VECTORS)
    others = {text: row for text, row in stored.items() if text != "a\nb\0"}
    for line_breaks, looked_up, scanned in (
        (None, others, others),
        ("replaced", others, {**others, "a b\0": stored["a\nb\0"]}),
        ("kept", stored, stored),
    ):
        importer = LlamaIndexRedisImporter(url=url, line_breaks=line_breaks)  # type: ignore[arg-type]
        found = importer.lookup([*TEXTS, "not stored", "lone \udc80 surrogate"])
        assert as_dict(found) == looked_up
        assert sum(found.unreadable.values()) == len(TEXTS) - len(looked_up)
        parts = list(importer.scan())
        assert as_dict(*parts) == scanned
        assert sum(sum(part.unreadable.values()) for part in parts) == len(TEXTS) - len(scanned)
        importer.close()


@pytest.mark.parametrize(
    "value",
    ["", "{}", "[0.5]", '{"1": []}', '{"1": [1.0], "2": [2.0]}', '{"1": [[1.0]]}', '{"1": "x"}', '{"1": [NaN]}'],
)
def test_values_that_are_no_vectors_are_counted(redis_server: RedisServer, value: str) -> None:
    url = make_database(redis_server)
    importer = LlamaIndexRedisImporter(**write(url, TEXTS, VECTORS))  # type: ignore[arg-type]
    with redis.Redis.from_url(url) as client:
        client.hset("embeddings", "first", value)
    for found in (importer.lookup(TEXTS), *importer.scan()):
        assert as_dict(found) == {text: row for text, row in expect(TEXTS, VECTORS).items() if text != "first"}
        assert sum(found.unreadable.values()) == 1
    importer.close()


def test_a_field_that_is_not_utf8_is_counted(redis_server: RedisServer) -> None:
    url = make_database(redis_server)
    with redis.Redis.from_url(url) as client:
        client.hset("embeddings", b"\xff", '{"1": [0.5]}')
    importer = LlamaIndexRedisImporter(url=url)
    (part,) = importer.scan()
    assert dict(part.unreadable) == {"a text that is not UTF-8": 1}
    importer.close()


def test_check_says_what_is_wrong(redis_server: RedisServer) -> None:
    url = make_database(redis_server)
    with redis.Redis.from_url(url) as client:
        client.set("string", "a value")
        client.hset("llama_cache", "key", '{"nodes": []}')
    for collection, problem in (
        ("embeddings", "has no collection 'embeddings'"),
        ("string", "'string' of .* is not a hash"),
        ("llama_cache", "An ingestion cache has the importer llama-index-ingestion"),
    ):
        importer = LlamaIndexRedisImporter(url=url, collection=collection)
        with pytest.raises(SourceError, match=problem):
            importer.check()
        importer.close()
    importer = LlamaIndexRedisImporter(url=url, collection="string")
    with pytest.raises(SourceError, match="is not a hash"):
        importer.lookup(["text"])
    with pytest.raises(SourceError, match="is not a hash"):
        list(importer.scan())
    importer.close()


def test_count_is_the_number_of_texts(redis_server: RedisServer) -> None:
    importer = LlamaIndexRedisImporter(**write(make_database(redis_server), TEXTS, VECTORS))  # type: ignore[arg-type]
    assert importer.count() == len(TEXTS)
    importer.close()
