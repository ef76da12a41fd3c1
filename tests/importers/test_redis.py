"""The importer ``redis`` reads strings and hashes under keys that are made from texts."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import numpy as np
import optional
import pytest
import redis
from importers.redis_sources import (
    RedisSourceContract,
    as_dict,
    expect,
    list_keys,
    make_database,
    make_vectors,
)
from importers.stores.redis import write
from servers import RedisServer

from embedonce.errors import ConfigError, SourceError
from embedonce_importers.redis import RedisImporter

pytestmark = optional.needs("redis")

TEXTS = ["first", "", "Grüße 🎉", "a\nb\0", " first ", "x" * 5000]
VECTORS = make_vectors(len(TEXTS))


class TestStrings(RedisSourceContract):
    importer = RedisImporter
    write = staticmethod(write)

    def damage(self, importer: Any, text: str) -> None:
        with redis.Redis.from_url(importer.test_options["url"]) as client:
            assert client.set("embed:v1:" + hashlib.sha256(text.encode()).hexdigest(), b"[0.5", xx=True)


def test_a_field_of_a_hash_is_read(redis_server: RedisServer) -> None:
    url = make_database(redis_server)
    importer = RedisImporter(**write(url, TEXTS, VECTORS, field="vector"))  # type: ignore[arg-type]
    importer.check()
    assert as_dict(importer.lookup([*TEXTS, "not stored", "lone \udc80 surrogate"])) == expect(TEXTS, VECTORS)
    with redis.Redis.from_url(url) as client:
        first, second, third = list_keys(client)[:3]
        client.set(first, "[1.0]")
        client.hset(second, "vector", "[1.0, [2.0]]")
        client.hdel(third, "vector")
    found = importer.lookup(TEXTS)
    assert len(found.texts) == len(TEXTS) - 3
    assert sorted(found.unreadable.values()) == [1, 1]  # a hash without the field is a miss
    importer.close()


@pytest.mark.parametrize("form", ["json", "float32", "float64", "base64-float64"])
def test_every_form_of_values_is_read(redis_server: RedisServer, form: str) -> None:
    url = make_database(redis_server)
    with redis.Redis.from_url(url) as client:
        for text, row in zip(TEXTS, VECTORS, strict=True):
            doubles = row.astype("<f8").tobytes()
            values = {"json": json.dumps(row.tolist()), "float32": row.tobytes(), "float64": doubles}
            client.set(f"p:m|{text}", values.get(form, base64.b64encode(doubles)))
    importer = RedisImporter(url=url, prefix="p:", key='"{model}|{text}"', model="m", value=form)  # type: ignore[arg-type]
    importer.check()
    assert as_dict(importer.lookup([*TEXTS, "lone \udc80 surrogate"])) == expect(TEXTS, VECTORS)
    importer.close()


def test_texts_that_the_steps_make_equal_get_the_same_vector(redis_server: RedisServer) -> None:
    url = make_database(redis_server)
    vector = np.float32([1, 2])
    with redis.Redis.from_url(url) as client:
        client.set("a b", json.dumps(vector.tolist()))
    importer = RedisImporter(url=url, key='"{text}"', steps=["squeeze", "lower"])
    texts = ["a b", " A  b ", "a\nB"]
    assert as_dict(importer.lookup([*texts, "ab"])) == dict.fromkeys(texts, vector.tobytes())
    importer.close()


def test_check_says_which_option_is_wrong(redis_server: RedisServer) -> None:
    options = write(make_database(redis_server), TEXTS, VECTORS)
    for changed, advice in (
        ({"prefix": "embed:v2:"}, "check prefix"),
        ({"field": "vector"}, "remove the option field"),
    ):
        importer = RedisImporter(**{**options, **changed})  # type: ignore[arg-type]
        with pytest.raises(SourceError, match=advice):
            importer.check()
        importer.close()
    hashes = write(make_database(redis_server), TEXTS, VECTORS, field="vector")
    for field, advice in ((None, "set field"), ("embedding", "has a field 'embedding'; check field")):
        importer = RedisImporter(**{**hashes, "field": field})  # type: ignore[arg-type]
        with pytest.raises(SourceError, match=advice):
            importer.check()
        importer.close()


def test_invalid_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="value must be one of json"):
        RedisImporter(url="redis://h", key='"{text}"', value="jsn")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="column 1"):
        RedisImporter(url="redis://h", key="text")
