"""The importer ``redisvl`` reads what RedisVL's EmbeddingsCache has written."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import optional
import pytest
import redis
from importers.redis_sources import RedisSourceContract, as_dict, expect, list_keys, make_database, make_vectors
from importers.stores.redisvl import write
from servers import RedisServer

from embedonce.errors import SourceError
from embedonce_importers.redisvl import RedisVLImporter

pytestmark = optional.needs("redisvl")

TEXTS = ["first", "", "Grüße 🎉", "a\nb\0", " first ", "x" * 5000, "a:the-model", "the-model"]
VECTORS = make_vectors(len(TEXTS))


class TestContract(RedisSourceContract):
    importer = RedisVLImporter
    write = staticmethod(write)

    def damage(self, importer: Any, text: str) -> None:
        key = "embedcache:" + hashlib.sha256(f"{text}:the-model".encode()).hexdigest()
        with redis.Redis.from_url(importer.test_options["url"]) as client:
            assert client.hset(key, "embedding", "[0.5, true]") == 0


def open_both(url: str, **options: Any) -> RedisVLImporter:
    return RedisVLImporter(**{**write(url, TEXTS, VECTORS), **options})  # type: ignore[arg-type]


def test_keys_that_two_texts_share_give_only_the_text_that_was_stored(redis_server: RedisServer) -> None:
    # The key of both is the hash of "a:b:c".
    url = make_database(redis_server)
    write(url, ["a"], make_vectors(1), model="b:c")
    write(url, ["x"], make_vectors(1), model="c")
    other = RedisVLImporter(url=url, model="c")
    found = other.lookup(["a:b", "x"])
    assert list(found.texts) == ["x"]
    assert sum(found.unreadable.values()) == 1
    assert [list(part.texts) for part in other.scan() if part.texts] == [["x"]]
    other.close()


def test_entries_of_bytes_are_not_taken_for_texts(redis_server: RedisServer) -> None:
    from redisvl.extensions.cache.embeddings import EmbeddingsCache

    url = make_database(redis_server)
    with redis.Redis.from_url(url) as client:
        cache = EmbeddingsCache(redis_client=client)
        cache.set(b"hello", "the-model", [1.0, 2.0])  # its key is that of the text "68656c6c6f"
        cache.set(b"\xff\xd8\xff", "the-model", [3.0, 4.0])
    importer = RedisVLImporter(url=url, model="the-model")
    importer.check()
    assert list(importer.lookup(["hello", "68656c6c6f", "ffd8ff"]).texts) == []
    parts = list(importer.scan())
    assert as_dict(*parts) == {}
    assert sum(sum(part.unreadable.values()) for part in parts) == 2
    importer.close()


def test_other_models_and_caches_are_left_out_without_being_counted(redis_server: RedisServer) -> None:
    url = make_database(redis_server)
    importer = open_both(url)
    write(url, ["first", "other"], make_vectors(2, seed=1), model="another-model")
    write(url, ["first", "other"], make_vectors(2, seed=2), name="another")
    parts = list(importer.scan())
    assert as_dict(*parts) == expect(TEXTS, VECTORS)
    assert not any(part.unreadable for part in parts)
    assert as_dict(importer.lookup([*TEXTS, "other", "lone \udc80 surrogate"])) == expect(TEXTS, VECTORS)
    importer.close()


def test_check_names_the_models_and_the_cache(redis_server: RedisServer) -> None:
    url = make_database(redis_server)
    importer = open_both(url, model="the-modell")
    with pytest.raises(SourceError, match='did you mean "the-model"'):
        importer.check()
    importer.close()
    importer = open_both(url, name="embeddings")
    with pytest.raises(SourceError, match="has no EmbeddingsCache with the name 'embeddings'; set name"):
        importer.check()
    importer.close()


def test_damaged_entries_are_counted(redis_server: RedisServer) -> None:
    url = make_database(redis_server)
    importer = open_both(url)
    with redis.Redis.from_url(url) as client:
        keys = list_keys(client)
        client.hset(keys[0], "embedding", b"\x00" * 32)
        client.hdel(keys[1], "embedding")
        client.hdel(keys[2], "content")
        client.set(keys[3], "a string")
        client.delete(keys[4])
    found = importer.lookup(TEXTS)
    assert len(found.texts) == len(TEXTS) - 5
    assert sum(found.unreadable.values()) == 4
    parts = list(importer.scan())
    assert as_dict(*parts) == as_dict(found)
    assert sum(sum(part.unreadable.values()) for part in parts) == 3  # a scan lists only hashes
    assert np.isfinite(list(found.vectors)).all()
    importer.close()


def test_an_entry_that_expires_is_read_without_changing_when(redis_server: RedisServer) -> None:
    url = make_database(redis_server)
    importer = open_both(url)
    with redis.Redis.from_url(url) as client:
        key = list_keys(client)[0]
        client.expire(key, 1000)
        before = client.pexpiretime(key)
        importer.lookup(TEXTS)
        list(importer.scan())
        assert client.pexpiretime(key) == before
    importer.close()
