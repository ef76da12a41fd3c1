"""What Dify keeps in Postgres and Redis is read exactly, and a pickle of anything else is never run."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import psycopg
import pytest
from optional import needs

from embedonce.contracts import FoundVectors
from embedonce.errors import ConfigError, SourceError
from embedonce.testing import ImporterContract, Recipe
from embedonce_importers.dify import DifyImporter

from .stores.dify import PROVIDER, hash_text, write
from .stores.postgres_databases import create_database, run

pytestmark = [needs("psycopg"), needs("redis")]

TEXTS = ["a", "aNone", "A", "a ", "", "é", "e\u0301", "🙂", "with\0nul", "x" * 9000]
VECTORS = np.random.default_rng(2).uniform(-1, 1, (len(TEXTS), 1536)).astype(np.float32)


def as_dict(found: FoundVectors) -> dict[str, bytes]:
    return {text: np.asarray(row, np.float32).tobytes() for text, row in zip(found.texts, found.vectors, strict=True)}


@pytest.fixture(scope="module")
def database(postgres_server: Any) -> Iterator[str]:
    with create_database(postgres_server.url) as url:
        yield url


@pytest.fixture(params=["postgres", "redis"])
def url(request: pytest.FixtureRequest, database: str) -> str:
    return database if request.param == "postgres" else str(request.getfixturevalue("redis_server").url)


class DifyContract(ImporterContract):
    options: dict[Any, dict[str, Any]]
    url: str

    def make(self, texts: Sequence[str], vectors: np.ndarray[Any, Any]) -> DifyImporter:
        options: dict[str, Any] = write(self.url, list(texts), vectors)
        importer = DifyImporter(**options)
        self.options[importer] = options
        return importer

    def recipe(self, importer: Any) -> Recipe:
        return Recipe(DifyImporter, self.options[importer])


class TestDocumentsOfDify(DifyContract):
    @pytest.fixture(autouse=True)
    def _take_database(self, database: str) -> None:
        self.url, self.options = database, {}

    def missing(self) -> tuple[Any, str]:
        return DifyImporter(url=f"{self.url}_missing", provider=PROVIDER, model="m"), "_missing"

    def damage(self, importer: Any, text: str) -> None:
        run(self.url, f"UPDATE embeddings SET embedding = 'x' WHERE hash = '{hash_text(text)}'")


class TestQueriesOfDify(DifyContract):
    @pytest.fixture(autouse=True)
    def _take_server(self, redis_server: Any) -> None:
        self.url, self.options = redis_server.url, {}

    def missing(self) -> tuple[Any, str]:
        return DifyImporter(url="redis://127.0.0.1:1/0", provider="p", model="m"), "redis://127.0.0.1:1/0"

    def damage(self, importer: Any, text: str) -> None:
        import redis

        with redis.Redis.from_url(self.url) as client:
            client.set(f"{PROVIDER}_{self.options[importer]['model']}_{hash_text(text)}", "{}")


def test_the_vectors_of_the_asked_texts_are_returned(url: str) -> None:
    options: dict[str, Any] = write(url, TEXTS, VECTORS)
    importer = DifyImporter(**options)
    importer.check()
    found = importer.lookup([*reversed(TEXTS), "absent", "None", "lone \ud800"])
    assert as_dict(found) == {text: row.tobytes() for text, row in zip(TEXTS, VECTORS, strict=True)}
    assert not found.unreadable
    other = DifyImporter(**{**options, "provider": "openai"})
    assert not other.lookup(TEXTS).texts
    for each in (importer, other):
        each.close()
        each.close()


def test_each_store_has_its_own_task(database: str) -> None:
    options = {"provider": "p", "model": "m"}
    documents = DifyImporter(url=database, **options)
    queries = DifyImporter(url="redis://user:hunter2@127.0.0.1:1/0", **options)
    assert (documents.source.task, queries.source.task) == ("document", "query")
    assert documents.source.mixing == queries.source.mixing == ""
    assert "hunter2" not in queries.source.name + repr(queries)
    with pytest.raises(SourceError, match=r"127\.0\.0\.1:1") as caught:
        queries.check()
    assert "hunter2" not in str(caught.value)
    queries.close()
    documents.close()


class Bomb:
    """An object whose pickle runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("the pickle was run",)


def test_a_value_of_another_form_is_counted_and_never_run(database: str, redis_server: Any) -> None:
    options: dict[str, Any] = write(database, ["good"], VECTORS[:1])
    values = {
        "bomb": pickle.dumps(Bomb()),
        "text": pickle.dumps("x"),
        "nested": pickle.dumps([[1.0]]),
        "cut": b"\x80\x05",
    }
    with psycopg.connect(database) as connection:
        for text, value in values.items():
            connection.execute(
                "INSERT INTO embeddings (model_name, hash, embedding, provider_name) VALUES (%s, %s, %s, %s)",
                (options["model"], hash_text(text), value, PROVIDER),
            )
    importer = DifyImporter(**options)
    found = importer.lookup(["good", *values])
    assert list(found.texts) == ["good"]
    assert sum(found.unreadable.values()) == len(values)
    importer.close()
    import redis

    options = write(redis_server.url, ["good"], VECTORS[:1])
    with redis.Redis.from_url(redis_server.url) as client:
        for text, content in (("cut", base64.b64encode(bytes(12))), ("other", b"{}"), ("empty", b"")):
            client.set(f"{PROVIDER}_{options['model']}_{hash_text(text)}", content)
    importer = DifyImporter(**options)
    found = importer.lookup(["good", "cut", "other", "empty"])
    assert list(found.texts) == ["good"]
    assert sum(found.unreadable.values()) == 3
    importer.close()


def test_a_model_without_vectors_names_the_existing_models(database: str) -> None:
    write(database, ["a"], VECTORS[:1], "text-embedding-3-small")
    importer = DifyImporter(url=database, provider="openai", model="text-embedding-3-small")
    with pytest.raises(SourceError, match=f'did you mean "{PROVIDER} text-embedding-3-small"'):
        importer.check()
    importer.close()


def test_a_table_of_another_program_is_refused(postgres_server: Any) -> None:
    with create_database(postgres_server.url) as url:
        importer = DifyImporter(url=url, provider="p", model="m")
        with pytest.raises(SourceError, match='no table "embeddings"; it has no tables'):
            importer.check()
        run(url, "CREATE TABLE embeddings (hash text, embedding bytea)")
        with pytest.raises(SourceError, match=r'no column "provider_name"\. Its columns: "hash", "embedding"'):
            importer.check()
        importer.close()


@pytest.mark.parametrize("url", ["dify", "http://hunter2@h", "mysql://u:hunter2@h/d"])
def test_another_kind_of_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="url must begin with postgresql://") as caught:
        DifyImporter(url=url, provider="p", model="m")
    assert "hunter2" not in str(caught.value)
