"""The importer ``langchain-redis`` reads what CacheBackedEmbeddings has written to a RedisStore."""

from __future__ import annotations

import hashlib
from typing import Any

import optional
import pytest
import redis
from importers.redis_sources import RedisSourceContract, as_dict, expect, list_keys, make_database, make_vectors
from importers.stores.langchain_redis import write
from servers import RedisServer

from embedonce.errors import ConfigError, SourceError
from embedonce_importers.langchain_redis import LangChainRedisImporter

pytestmark = [optional.needs("langchain_community"), optional.needs("langchain_classic")]

TEXTS = ["first", "", "Grüße 🎉", "a\nb\0", " first ", "x" * 5000]
VECTORS = make_vectors(len(TEXTS))


def open_store(url: str, **options: Any) -> LangChainRedisImporter:
    return LangChainRedisImporter(**write(url, TEXTS, VECTORS, **options))  # type: ignore[arg-type]


class TestContract(RedisSourceContract):
    importer = LangChainRedisImporter
    write = staticmethod(write)

    def damage(self, importer: Any, text: str) -> None:
        with redis.Redis.from_url(importer.test_options["url"]) as client:
            assert client.set("model" + hashlib.sha256(text.encode()).hexdigest(), b"[0.5, null]", xx=True)


@pytest.mark.parametrize("key_encoder", ["sha1", "sha256", "sha512", "blake2b"])
@pytest.mark.parametrize(("store_namespace", "namespace"), [("", ""), ("a/b", "text-embedding-3-small"), ("", "*[x]")])
def test_every_key_encoder_and_namespace_is_read(
    redis_server: RedisServer, key_encoder: str, store_namespace: str, namespace: str
) -> None:
    importer = open_store(
        make_database(redis_server), key_encoder=key_encoder, store_namespace=store_namespace, namespace=namespace
    )
    importer.check()
    found = importer.lookup([*TEXTS, "not stored", "lone \udc80 surrogate"])
    assert as_dict(found) == expect(TEXTS, VECTORS)
    assert not found.unreadable
    importer.close()


def test_other_namespaces_and_encoders_find_nothing_and_check_says_what_to_do(redis_server: RedisServer) -> None:
    options = write(make_database(redis_server), TEXTS, VECTORS, store_namespace="store", namespace="one")
    for changed, advice in (
        ({"namespace": "two"}, "namespace to the one of"),
        ({"store_namespace": ""}, "set store_namespace"),
        ({"key_encoder": "sha1"}, "set key_encoder to sha256"),
        ({"key_encoder": "sha512"}, "set key_encoder to sha256"),
    ):
        importer = LangChainRedisImporter(**{**options, **changed})  # type: ignore[arg-type]
        assert as_dict(importer.lookup(TEXTS)) == {}
        with pytest.raises(SourceError, match=advice):
            importer.check()
        importer.close()


def test_the_task_depends_on_the_query_cache() -> None:
    def make(query_embedding_cache: bool | None) -> tuple[str | None, bool]:
        source = LangChainRedisImporter(url="redis://h", query_embedding_cache=query_embedding_cache).source
        return source.task, bool(source.mixing)

    assert make(None) == (None, True)
    assert make(True) == (None, True)
    assert make(False) == ("document", False)


def test_an_unknown_key_encoder_is_refused() -> None:
    with pytest.raises(ConfigError, match="sha1, blake2b, sha256, sha512"):
        LangChainRedisImporter(url="redis://h", key_encoder="md5")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    [b"", b"[", b"[]", b"null", b"[[1.0]]", b'{"a": 1}', b"[1.0, true]", b"[NaN]", b'["1"]', b"\x80\x05]q", b"1"],
)
def test_values_that_are_no_vectors_are_counted(redis_server: RedisServer, value: bytes) -> None:
    url = make_database(redis_server)
    importer = open_store(url)
    with redis.Redis.from_url(url) as client:
        for key in list_keys(client):
            client.set(key, value)
    found = importer.lookup(TEXTS)
    assert list(found.texts) == []
    assert sum(found.unreadable.values()) == len(TEXTS)
    importer.close()


def test_a_key_of_another_type_is_a_miss(redis_server: RedisServer) -> None:
    url = make_database(redis_server)
    importer = open_store(url)
    with redis.Redis.from_url(url) as client:
        for key in list_keys(client):
            client.delete(key)
            client.hset(key, "f", "v")
    assert list(importer.lookup(TEXTS).texts) == []
    importer.close()
