"""Collections that LangChain's PGVector has written are read exactly, and nothing else of the database is."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import psycopg
import pytest
from optional import needs
from servers import PostgresServer, wait_until

from embedonce.contracts import FoundVectors, deadline
from embedonce.errors import ConfigError, SourceError, TierTimeout
from embedonce.testing import ImporterContract, Recipe
from embedonce_importers._postgres import is_storable
from embedonce_importers.langchain_pgvector import LangChainPGVectorImporter

from .stores.langchain_pgvector import write
from .stores.postgres_databases import create_database, run

pytestmark = needs("langchain_postgres")

TEXTS = ["a", "A", "a ", " a", "e\u0301", "é", "\n", "🙂", 'it\'s "quoted" \\ %s {} :x', "x" * 9000]


def make_vectors(count: int, dimensions: int = 8, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).uniform(-1, 1, (count, dimensions)).astype(np.float32)


def as_dict(found: FoundVectors) -> dict[str, bytes]:
    assert len(set(found.texts)) == len(found.texts) == len(found.vectors)
    return {text: np.asarray(row, np.float32).tobytes() for text, row in zip(found.texts, found.vectors, strict=True)}


@pytest.fixture(scope="module")
def database(postgres_server: Any) -> Iterator[str]:
    with create_database(postgres_server.url) as url:
        yield url


class TestLangChainPGVector(ImporterContract):
    secrets = ("hunter2",)

    @pytest.fixture(autouse=True)
    def _take_database(self, database: str, postgres_server: Any) -> None:
        self.database = database.replace("postgres@", "postgres:hunter2@")
        self.server = postgres_server
        self.options: dict[Any, dict[str, Any]] = {}

    def make(self, texts: Sequence[str], vectors: np.ndarray[Any, Any]) -> LangChainPGVectorImporter:
        options: dict[str, Any] = write(self.database, list(texts), vectors)
        importer = LangChainPGVectorImporter(**options)
        self.options[importer] = options
        return importer

    def can_hold(self, text: str) -> bool:
        return is_storable(text)

    def recipe(self, importer: Any) -> Recipe:
        return Recipe(LangChainPGVectorImporter, self.options[importer])

    def missing(self) -> tuple[Any, str]:
        write(self.database, [], make_vectors(0))
        return LangChainPGVectorImporter(url=self.database, collection="no such collection"), "no such collection"

    def damage(self, importer: Any, text: str) -> None:
        run(self.database, f"UPDATE langchain_pg_embedding SET embedding = NULL WHERE document = '{text}'")

    def snapshot(self, importer: Any) -> object:
        with psycopg.connect(self.database) as connection:
            tables = ("langchain_pg_collection", "langchain_pg_embedding")
            return [connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables]  # type: ignore[arg-type]

    @contextmanager
    def stall(self, importer: Any) -> Iterator[None]:
        self.server.pause()
        try:
            yield
        finally:
            self.server.resume()


def test_lookup_returns_the_vectors_of_the_asked_texts(database: str) -> None:
    vectors = make_vectors(len(TEXTS))
    options = write(database, TEXTS, vectors)
    importer = LangChainPGVectorImporter(**options)  # type: ignore[arg-type]
    importer.check()
    found = importer.lookup(["absent", *reversed(TEXTS), "with\0nul", "lone \ud800"])
    assert isinstance(found.vectors, np.ndarray)
    assert as_dict(found) == {text: row.tobytes() for text, row in zip(TEXTS, vectors, strict=True)}
    assert not found.unreadable
    assert as_dict(importer.lookup(["absent"])) == {}
    importer.close()
    importer.close()


def test_scan_yields_the_whole_collection_in_bounded_parts_and_the_same_order(database: str) -> None:
    texts = [f"text {number}" for number in range(2500)]
    vectors = make_vectors(len(texts), 3)
    importer = LangChainPGVectorImporter(**write(database, texts, vectors))  # type: ignore[arg-type]
    write(database, ["of another collection"], make_vectors(1, 3))
    first, second = (list(importer.scan()) for _ in range(2))
    assert [len(part.texts) for part in first] == [1000, 1000, 500]
    # The order is that of the table, in which a new row may take the place of a deleted one.
    assert [list(part.texts) for part in first] == [list(part.texts) for part in second]
    read = {text: row for part in first for text, row in as_dict(part).items()}
    assert read == {text: row.tobytes() for text, row in zip(texts, vectors, strict=True)}
    assert importer.count() == len(texts)
    next(iter(importer.scan()))  # a scan that is given up
    assert len(importer.lookup(texts[:5]).texts) == 5
    importer.close()


def test_a_text_with_several_different_vectors_is_left_out(database: str) -> None:
    vectors = make_vectors(4)
    vectors[1] = vectors[0] * np.float32(1 + 1e-6)
    options = write(database, ["same", "same", "differs", "differs"], vectors)
    importer = LangChainPGVectorImporter(**options)  # type: ignore[arg-type]
    found = importer.lookup(["same", "differs"])
    assert list(found.texts) == ["same"]
    assert found.unreadable == {"several different vectors of one text": 1}
    importer.close()


def test_rows_without_a_text_or_a_vector_are_counted(database: str) -> None:
    options = write(database, ["a", "b", "c"], make_vectors(3))
    where = f"collection_id = (SELECT uuid FROM langchain_pg_collection WHERE name = '{options['collection']}')"
    run(database, f"UPDATE langchain_pg_embedding SET document = NULL WHERE document = 'a' AND {where}")
    run(database, f"UPDATE langchain_pg_embedding SET embedding = NULL WHERE document = 'b' AND {where}")
    importer = LangChainPGVectorImporter(**options)  # type: ignore[arg-type]
    (part,) = importer.scan()
    assert list(part.texts) == ["c"]
    assert part.unreadable == {"no text": 1, "no vector": 1}
    assert importer.lookup(["a", "b", "c"]).unreadable == {"no vector": 1}
    importer.close()


def test_rows_of_different_dimensions_are_all_returned(database: str) -> None:
    options = write(database, ["three"], make_vectors(1, 3))
    write(database, ["five"], make_vectors(1, 5), str(options["collection"]))
    importer = LangChainPGVectorImporter(**options)  # type: ignore[arg-type]
    (part,) = importer.scan()
    assert {text: len(row) for text, row in zip(part.texts, part.vectors, strict=True)} == {"three": 3, "five": 5}  # type: ignore[arg-type]
    importer.close()


def test_a_missing_collection_names_the_existing_ones(database: str) -> None:
    write(database, ["a"], make_vectors(1), "product texts")
    importer = LangChainPGVectorImporter(url=database, collection="product_texts")
    with pytest.raises(SourceError, match=r'no collection "product_texts"; did you mean "product texts"\?'):
        importer.check()
    with pytest.raises(SourceError, match="no collection"):
        importer.lookup(["a"])
    importer.close()


def test_collections_of_one_name_are_refused(postgres_server: Any) -> None:
    with create_database(postgres_server.url) as url:
        write(url, ["a"], make_vectors(1), "twice")
        run(url, "ALTER TABLE langchain_pg_collection DROP CONSTRAINT langchain_pg_collection_name_key")
        run(url, "INSERT INTO langchain_pg_collection (uuid, name) VALUES (gen_random_uuid(), 'twice')")
        importer = LangChainPGVectorImporter(url=url, collection="twice")
        with pytest.raises(SourceError, match="2 collections with the name 'twice'"):
            importer.check()
        importer.close()


def test_a_database_of_another_program_is_refused_with_advice(postgres_server: Any) -> None:
    with create_database(postgres_server.url) as url:
        importer = LangChainPGVectorImporter(url=url)
        with pytest.raises(SourceError, match=r'no table "langchain_pg_collection"; it has no tables.*"postgres"'):
            importer.check()
        run(url, "CREATE SCHEMA other; CREATE TABLE other.langchain_pg_collection (uuid uuid, name text)")
        with pytest.raises(SourceError, match=r"in the schema other: add \?options=-csearch_path%3Dother to url"):
            importer.check()
        run(url, "CREATE TABLE langchain_pg_collection (uuid uuid, name text)")
        run(url, "CREATE TABLE langchain_pg_embedding (collection_id uuid, document text, embedding text)")
        with pytest.raises(SourceError, match="has the type text; expected vector"):
            importer.check()
        importer.close()


def test_a_schema_of_the_search_path_is_read(postgres_server: Any) -> None:
    with create_database(postgres_server.url) as url:
        run(url, "CREATE EXTENSION vector; CREATE SCHEMA other")
        within = f"{url}?options=-csearch_path%3Dother,public"
        write(within, ["a"], make_vectors(1), "mine")
        importer = LangChainPGVectorImporter(url=within, collection="mine")
        importer.check()
        assert list(importer.lookup(["a"]).texts) == ["a"]
        importer.close()


def test_nothing_is_written(database: str) -> None:
    options = write(database, ["a"], make_vectors(1))
    importer = LangChainPGVectorImporter(**options)  # type: ignore[arg-type]
    importer.check()
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        importer._database.run(psycopg.sql.SQL("DELETE FROM langchain_pg_embedding"))
    assert len(importer.lookup(["a"]).texts) == 1
    importer.close()


def test_a_role_without_privileges_is_told_what_to_ask_for(database: str) -> None:
    write(database, ["a"], make_vectors(1), "private")
    run(database, "DROP ROLE IF EXISTS embedonce_reader; CREATE ROLE embedonce_reader LOGIN")
    importer = LangChainPGVectorImporter(url=database.replace("postgres@", "embedonce_reader@"), collection="private")
    with pytest.raises(SourceError, match=r"permission denied for table langchain_pg_collection.*GRANT SELECT"):
        importer.check()
    importer.close()


def test_a_url_of_sqlalchemy_is_read(database: str) -> None:
    options = write(database, ["a"], make_vectors(1))
    url = database.replace("postgresql://", "postgresql+psycopg://")
    importer = LangChainPGVectorImporter(url=url, collection=str(options["collection"]))
    assert list(importer.lookup(["a"]).texts) == ["a"]
    importer.close()


@pytest.mark.parametrize("url", ["postgresql://u:hunter2@h:5432/d?schema=x", "hunter2", "postgresql://u:hunter2@[h/d"])
def test_an_invalid_url_is_an_error_that_does_not_repeat_it(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LangChainPGVectorImporter(url=url)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_no_message_has_the_password() -> None:
    importer = LangChainPGVectorImporter(url="postgresql://u:hunter2@127.0.0.1:1/d")
    assert "hunter2" not in repr(importer) + importer.source.name
    with pytest.raises(
        SourceError, match=r"cannot connect to postgresql://127.0.0.1:1/d: no server is listening"
    ) as caught:
        importer.check()
    assert "hunter2" not in str(caught.value)
    importer.close()
    leaking = LangChainPGVectorImporter(url="postgresql://u:not@escaped@127.0.0.1:1/d")
    with pytest.raises(SourceError) as caught:
        leaking.check()
    assert "escaped" not in str(caught.value)
    assert caught.value.__cause__ is None
    leaking.close()


def test_threads_share_an_importer(database: str) -> None:
    texts = [f"text {number}" for number in range(40)]
    vectors = make_vectors(len(texts))
    importer = LangChainPGVectorImporter(**write(database, texts, vectors))  # type: ignore[arg-type]
    wrong: list[object] = []

    def look_up(number: int) -> None:
        mine = texts[number * 4 : number * 4 + 4]
        for _ in range(5):
            found = as_dict(importer.lookup(mine))
            if found != {text: vectors[texts.index(text)].tobytes() for text in mine}:
                wrong.append(found)

    threads = [threading.Thread(target=look_up, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    importer.close()


def test_a_server_that_stops_answering_does_not_hold_a_call() -> None:
    with PostgresServer() as server:
        options = write(server.url, ["a"], make_vectors(1))
        importer = LangChainPGVectorImporter(**options)  # type: ignore[arg-type]
        assert list(importer.lookup(["a"]).texts) == ["a"]
        server.pause()
        with pytest.raises(TierTimeout), deadline(0.3):
            importer.lookup(["a"])
        with pytest.raises(TierTimeout), deadline(0.3):
            importer.lookup(["a"])  # on a new connection
        server.resume()
        assert list(importer.lookup(["a"]).texts) == ["a"]
        # A session that the server has ended is replaced.
        server.call("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'embedonce'")
        assert list(importer.lookup(["a"]).texts) == ["a"]
        importer.close()
        count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'embedonce'"
        wait_until(lambda: server.call(count) == "0", "the sessions of the importer have ended")


def test_a_slow_statement_ends_at_the_deadline(database: str) -> None:
    importer = LangChainPGVectorImporter(url=database)
    with pytest.raises(TierTimeout), deadline(0.2):
        importer._database.run(psycopg.sql.SQL("SELECT pg_sleep(60)"))
    importer.close()
    with pytest.raises(SourceError, match="closed"):
        importer.lookup(["a"])
