"""Tables of the shapes that tutorials show are read exactly, whatever the types of their columns."""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import md5, sha256
from typing import Any
from uuid import uuid4

import numpy as np
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from optional import needs
from psycopg import sql

from embedonce.contracts import FoundVectors
from embedonce.errors import ConfigError, SourceError
from embedonce.testing import ImporterContract, Recipe
from embedonce_importers import _postgres
from embedonce_importers._postgres import is_storable
from embedonce_importers._postgres_tables import BinaryDecoder
from embedonce_importers.postgres import PostgresImporter

from .stores.postgres import write
from .stores.postgres_databases import create_database, run

pytestmark = needs("psycopg")

TEXTS = ["a", "A", "a ", "e\u0301", "é", "\n", "🙂", 'it\'s "quoted" %s {}', "x" * 9000]
VECTORS = np.random.default_rng(1).uniform(-1, 1, (len(TEXTS), 6)).astype(np.float32)


def as_dict(found: FoundVectors) -> dict[str, bytes]:
    assert len(set(found.texts)) == len(found.texts) == len(found.vectors)
    return {text: np.asarray(row, np.float32).tobytes() for text, row in zip(found.texts, found.vectors, strict=True)}


EXPECTED = {text: row.tobytes() for text, row in zip(TEXTS, VECTORS, strict=True)}


@pytest.fixture(scope="module")
def database(postgres_server: Any) -> Iterator[str]:
    with create_database(postgres_server.url) as url:
        run(url, "CREATE EXTENSION vector")
        yield url


def make_table(url: str, columns: str, rows: Sequence[Sequence[object]] = ()) -> str:
    """Make a table with these columns and rows, and return its name."""
    name = f"t_{uuid4().hex}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE {name} ({columns})")  # type: ignore[arg-type]
        if rows:
            values = sql.SQL(", ").join([sql.Placeholder()] * len(rows[0]))
            with connection.cursor() as cursor:
                cursor.executemany(sql.SQL("INSERT INTO {} VALUES ({})").format(sql.Identifier(name), values), rows)
    return name


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def read(url: str, texts: Sequence[str] = TEXTS, **options: Any) -> FoundVectors:
    importer = PostgresImporter(url=url, **options)
    try:
        importer.check()
        return importer.lookup(texts)
    finally:
        importer.close()


def test_the_table_of_tutorials_is_read(database: str) -> None:
    options: dict[str, Any] = write(database, TEXTS, VECTORS)
    importer = PostgresImporter(**options)
    importer.check()
    found = importer.lookup([*reversed(TEXTS), "absent", "with\0nul", "lone \ud800"])
    assert isinstance(found.vectors, np.ndarray)
    assert as_dict(found) == EXPECTED
    assert not hasattr(importer, "scan")
    assert not hasattr(importer, "count")
    importer.close()
    importer.close()


class PostgresContract(ImporterContract):
    secrets = ("hunter2",)

    @pytest.fixture(autouse=True)
    def _take_database(self, database: str, postgres_server: Any) -> None:
        self.database = database.replace("postgres@", "postgres:hunter2@")
        self.server = postgres_server
        self.options: dict[Any, dict[str, Any]] = {}

    def _open_table(self, options: dict[str, Any]) -> PostgresImporter:
        importer = PostgresImporter(**options)
        self.options[importer] = options
        return importer

    def recipe(self, importer: Any) -> Recipe:
        return Recipe(PostgresImporter, self.options[importer])

    def missing(self) -> tuple[Any, str]:
        return PostgresImporter(url=self.database, table="no_such_table", key_column="k"), "no_such_table"

    def snapshot(self, importer: Any) -> object:
        with psycopg.connect(self.database) as connection:
            query = sql.SQL("SELECT * FROM {}").format(sql.Identifier(self.options[importer]["table"]))
            return connection.execute(query).fetchall()

    @contextmanager
    def stall(self, importer: Any) -> Iterator[None]:
        self.server.pause()
        try:
            yield
        finally:
            self.server.resume()


class TestTableWithKeys(PostgresContract):
    def make(self, texts: Sequence[str], vectors: np.ndarray[Any, Any]) -> PostgresImporter:
        return self._open_table(write(self.database, list(texts), vectors))

    def damage(self, importer: Any, text: str) -> None:
        table = self.options[importer]["table"]
        run(self.database, f"UPDATE {table} SET embedding = NULL WHERE text_hash = '{digest(text)}'")


class TestTableWithTexts(PostgresContract):
    def make(self, texts: Sequence[str], vectors: np.ndarray[Any, Any]) -> PostgresImporter:
        rows = list(zip(texts, vectors.tolist(), strict=True))
        table = make_table(self.database, "content text, embedding real[]", rows)
        return self._open_table({"url": self.database, "table": table, "text_column": "content"})

    def can_hold(self, text: str) -> bool:
        return is_storable(text)

    def damage(self, importer: Any, text: str) -> None:
        run(self.database, f"UPDATE {self.options[importer]['table']} SET embedding = '{{}}' WHERE content = '{text}'")


FORMS: dict[str, tuple[str, Callable[[np.ndarray[Any, Any]], object], str | None]] = {
    "vector": ("vector(6)", lambda row: str(row.tolist()), None),
    "real[]": ("real[]", lambda row: row.tolist(), None),
    "double precision[]": ("double precision[]", lambda row: row.tolist(), None),
    "jsonb": ("jsonb", lambda row: json.dumps(row.tolist()), None),
    "json": ("json", lambda row: json.dumps(row.tolist()), None),
    "text": ("text", lambda row: json.dumps(row.tolist()), None),
    "varchar pgvector": ("varchar", lambda row: str(row.tolist()), "pgvector"),
    "text base64": (
        "text",
        lambda row: base64.b64encode(row.astype("<f8").tobytes()).decode(),
        "base64-float64",
    ),
    "bytea float32": ("bytea", lambda row: row.astype("<f4").tobytes(), "float32"),
    "bytea float64": ("bytea", lambda row: row.astype("<f8").tobytes(), "float64"),
    "bytea pickle": ("bytea", lambda row: pickle.dumps(row.tolist()), "pickled-list"),
    "bytea json": ("bytea", lambda row: json.dumps(row.tolist()).encode(), "json"),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_type_of_a_vector_column_is_read_exactly(database: str, name: str) -> None:
    kind, encode, value = FORMS[name]
    rows = [(digest(text), encode(row)) for text, row in zip(TEXTS, VECTORS, strict=True)]
    table = make_table(database, f"text_hash text, embedding {kind}", rows)
    assert as_dict(read(database, table=table, key_column="text_hash", value=value)) == EXPECTED


def test_a_halfvec_column_is_read(database: str) -> None:
    table = make_table(database, "k text, v halfvec(3)", [(digest("a"), "[0.1,1,-2]")])
    found = read(database, table=table, key_column="k", vector_column="v")
    assert as_dict(found) == {"a": np.array([0.1, 1, -2], np.float16).astype(np.float32).tobytes()}


@pytest.mark.parametrize(
    ("kind", "key", "message"),
    [
        # bytes.fromhex takes "AB CD" and "abcd" for the same bytes.
        ("bytea", "{text}", "type bytea, so it can only have the bytes of a hash"),
        ("bytea", "v1:{text}", "type bytea, so it can only have the bytes of a hash"),
        ("char(20)", "v1:{text}", "drops spaces at the end of a key"),
    ],
)
def test_a_column_that_has_one_key_for_different_texts_is_refused(
    database: str, kind: str, key: str, message: str
) -> None:
    table = make_table(database, f"k {kind}, embedding real[]")
    with pytest.raises(SourceError, match=message):
        read(database, ["abcd", "AB CD", "ab cd "], table=table, key_column="k", key=f'"{key}"')


@pytest.mark.parametrize("kind", ["text", "varchar(64)", "char(64)", "bytea"])
def test_every_type_of_a_key_column_is_read(database: str, kind: str) -> None:
    keys = [digest(text) for text in TEXTS]
    rows = [
        (bytes.fromhex(key) if kind == "bytea" else key, row.tolist()) for key, row in zip(keys, VECTORS, strict=True)
    ]
    table = make_table(database, f"k {kind} PRIMARY KEY, embedding real[]", rows)
    assert as_dict(read(database, table=table, key_column="k")) == EXPECTED


def test_keys_are_made_as_the_options_say(database: str) -> None:
    rows = [(f"embed:m1:{md5(b'm1|hello').hexdigest()[:16]}", [1.0, 2.0])]
    table = make_table(database, "cache_key text, vector real[]", rows)
    options = {"key_column": "cache_key", "vector_column": "vector", "model": "m1", "steps": ["strip", "lower"]}
    key = '"embed:{model}:" + md5("{model}|{text}")[:16]'
    found = read(database, ["Hello", " hello\n", "hel lo"], table=table, key=key, **options)
    assert sorted(found.texts) == [" hello\n", "Hello"]


def test_only_the_rows_of_the_model_are_read(database: str) -> None:
    rows = [(digest("a"), "old", [1.0, 2.0]), (digest("a"), "new", [3.0, 4.0]), (digest("b"), "old", [5.0, 6.0])]
    table = make_table(database, "k text, model_name varchar, embedding real[]", rows)
    options = {"table": table, "key_column": "k", "model_column": "model_name"}
    assert as_dict(read(database, ["a", "b"], model="new", **options)) == {"a": np.float32([3, 4]).tobytes()}
    both = read(database, ["a", "b"], table=table, key_column="k")
    assert list(both.texts) == ["b"]
    assert both.unreadable == {"several different vectors of one text": 1}
    with pytest.raises(ConfigError, match="model_column needs the option model"):
        PostgresImporter(url=database, **options)


def test_with_a_key_and_a_text_a_lookup_finds_only_the_stored_text(database: str) -> None:
    table = make_table(database, "k text, content text, embedding real[]", [(digest("a"), "A", [1.0, 2.0])])
    options: dict[str, Any] = {"table": table, "key_column": "k", "steps": ["lower"]}
    assert set(read(database, ["A", "a"], **options).texts) == {"A", "a"}
    found = read(database, ["A", "a"], text_column="content", **options)
    assert list(found.texts) == ["A"]
    other = read(database, ["a"], text_column="content", **options)
    assert list(other.texts) == []
    assert other.unreadable == {"the row has another text, which has the same key because of the option steps": 1}


def test_a_table_with_texts_is_looked_up_and_scanned(database: str) -> None:
    rows = [(text, row.tolist()) for text, row in zip(TEXTS, VECTORS, strict=True)]
    for kind in ("text", "varchar"):
        table = make_table(database, f"content {kind}, embedding double precision[]", rows)
        importer = PostgresImporter(url=database, table=table, text_column="content")
        importer.check()
        assert as_dict(importer.lookup([*TEXTS, "absent", "X", "with\0nul"])) == EXPECTED
        first, second = (list(importer.scan()) for _ in range(2))
        assert [list(part.texts) for part in first] == [TEXTS] == [list(part.texts) for part in second]
        assert as_dict(first[0]) == EXPECTED
        assert importer.count() == len(TEXTS)
        importer.close()


def test_a_view_adapts_a_table(database: str) -> None:
    table = make_table(database, "title text, body text, embedding real[]", [("t", "b", [1.0, 2.0])])
    run(database, f"CREATE VIEW whole_{table} AS SELECT title || ': ' || body AS content, embedding FROM {table}")
    found = read(database, ["t: b"], table=f"whole_{table}", text_column="content")
    assert as_dict(found) == {"t: b": np.float32([1, 2]).tobytes()}


def test_a_scan_leaves_out_previews_of_texts(database: str) -> None:
    rows = [(digest("a" * 300), "a" * 200, [1.0, 2.0]), (digest("b"), "b", [3.0, 4.0]), (digest("c"), None, [5.0, 6.0])]
    table = make_table(database, "text_hash char(64), text_preview text, embedding real[]", rows)
    importer = PostgresImporter(url=database, table=table, key_column="text_hash", text_column="text_preview")
    (part,) = importer.scan()
    assert as_dict(part) == {"b": np.float32([3, 4]).tobytes()}
    assert part.unreadable == {
        "no text": 1,
        "the text of the row does not have the key of the row, so it is not the whole text": 1,
    }
    assert list(importer.lookup(["a" * 300]).texts) == ["a" * 300]
    importer.close()


def test_invalid_values_are_counted_and_never_raised(database: str) -> None:
    stored = ["[1, 2]", "[]", "null", "[1, null]", "[[1], [2]]", '{"a": 1}', '"x"', "[true, 1]", None, "7"]
    rows = [(f"text {place}", value) for place, value in enumerate(stored)]
    table = make_table(database, "content text, embedding jsonb", rows)
    importer = PostgresImporter(url=database, table=table, text_column="content")
    (part,) = importer.scan()
    assert list(part.texts) == ["text 0"]
    assert sum(part.unreadable.values()) == len(stored) - 1
    assert "text" not in " ".join(part.unreadable).replace("no text", "")
    importer.close()
    lists: list[object] = [[1.0, 2.0], [], [[1.0], [2.0]], [1.0, None], [1e300, 1.0], None, "{1,2,3,4}"]
    rows_of_arrays = [(f"text {place}", value) for place, value in enumerate(lists)]
    table = make_table(database, "content text, embedding double precision[]", rows_of_arrays)
    importer = PostgresImporter(url=database, table=table, text_column="content")
    (part,) = importer.scan()
    assert [(text, np.asarray(row).tolist()) for text, row in zip(part.texts, part.vectors, strict=True)] == [
        ("text 0", [1, 2]),
        ("text 4", [np.inf, 1]),
        ("text 6", [1, 2, 3, 4]),
    ]
    assert part.unreadable == {"an empty array": 1, "an array of arrays": 1, "an array with a null": 1, "no vector": 1}
    importer.close()


def test_a_huge_value_is_not_read(database: str) -> None:
    table = make_table(database, "content text, embedding text")
    run(database, f"INSERT INTO {table} SELECT 'a', string_agg(md5(n::text), ',') FROM generate_series(1, 200000) n")
    importer = PostgresImporter(url=database, table=table, text_column="content")
    (part,) = importer.scan()
    assert not part.texts
    assert part.unreadable == {"larger than 1 MiB": 1}
    importer.close()


def test_wrong_names_are_errors_that_list_what_exists(database: str) -> None:
    table = make_table(database, "Text_Hash text, vec real[], embedding text, n int, raw bytea, c char(5)")
    options: dict[str, Any] = {"table": table, "key_column": "text_hash", "vector_column": "vec"}
    for changed, message in [
        ({"table": table[:-2]}, f'has no table "{table[:-2]}"; did you mean "{table}"\\? Its tables: "'),
        ({"schema": "other"}, f'has the table "{table}" in the schema public: set schema = "public"'),
        ({"key_column": "texthash"}, 'key_column: public.* has no column "texthash"; did you mean "text_hash".*"vec"'),
        ({"vector_column": "n"}, r"vector_column.* has the type int4; expected vector"),
        ({"key_column": "n"}, r"key_column.* has the type int4; expected text"),
        ({"text_column": "c"}, r"text_column.* has the type char; expected text or varchar"),
        ({"vector_column": "raw"}, "has bytes; set value to their form"),
        ({"vector_column": "embedding", "value": "float32"}, "has text, which cannot have the form float32"),
        ({"value": "json"}, "tells how to read it; remove value"),
    ]:
        importer = PostgresImporter(url=database, **{**options, **changed})
        with pytest.raises(SourceError, match=message):
            importer.check()
        importer.close()


def test_names_are_never_part_of_the_syntax(database: str) -> None:
    hostile = 'x"; DROP TABLE y; --'
    quoted = hostile.replace('"', '""')
    run(database, f'CREATE TABLE "{quoted}" ("{quoted}k" text, "{quoted}v" real[])')
    run(database, f"""INSERT INTO "{quoted}" VALUES ('{digest("a")}', '{{1,2}}')""")
    found = read(database, ["a"], table=hostile, key_column=f"{hostile}k", vector_column=f"{hostile}v")
    assert list(found.texts) == ["a"]


def test_missing_options_are_errors_of_the_configuration(database: str) -> None:
    with pytest.raises(ConfigError, match=r"set key_column .* or text_column"):
        PostgresImporter(url=database, table="t")
    with pytest.raises(ConfigError, match="steps are for keys"):
        PostgresImporter(url=database, table="t", text_column="c", steps=["strip"])
    with pytest.raises(ConfigError, match="key and steps are for keys"):
        PostgresImporter(url=database, table="t", text_column="c", key='"{text}"')
    with pytest.raises(ConfigError, match="model is for keys and for model_column"):
        PostgresImporter(url=database, table="t", text_column="c", model="m")
    with pytest.raises(ConfigError, match="key, column"):
        PostgresImporter(url=database, table="t", key_column="c", key="nonsense(")


def test_the_name_of_the_source_has_every_option_that_matters_and_no_secret(database: str) -> None:
    options: dict[str, Any] = {"url": "postgresql://u:hunter2@h/d", "table": "t", "key_column": "k"}
    names = {
        PostgresImporter(**{**options, **changed}).source.name
        for changed in (
            {},
            {"schema": "s"},
            {"vector_column": "v"},
            {"text_column": "t"},
            {"model_column": "m", "model": "a"},
            {"model_column": "m", "model": "b"},
            {"key": 'md5("{text}")'},
            {"steps": ["strip"]},
            {"value": "float32"},
        )
    }
    assert len(names) == 9
    assert not any("hunter2" in name for name in names)


@needs("langchain_postgres")
def test_a_table_of_pgvectorstore_is_read(database: str) -> None:
    from langchain_postgres import PGEngine, PGVectorStore
    from sqlalchemy.ext.asyncio import create_async_engine

    from .stores.langchain_pgvector import make_embeddings

    name = f"store_{uuid4().hex}"

    async def fill() -> None:
        engine = create_async_engine(database.replace("postgresql://", "postgresql+psycopg://"))
        pool = PGEngine.from_engine(engine)
        await pool.ainit_vectorstore_table(name, VECTORS.shape[1])
        store = await PGVectorStore.create(pool, make_embeddings(VECTORS), name)
        await store.aadd_texts(TEXTS)
        await engine.dispose()

    asyncio.run(fill())
    importer = PostgresImporter(url=database, table=name, text_column="content")
    (part,) = importer.scan()
    assert as_dict(part) == EXPECTED
    assert as_dict(importer.lookup(TEXTS)) == EXPECTED
    importer.close()


def encode_array(row: np.ndarray[Any, Any]) -> bytes:
    """Return Postgres' binary form of an array of one axis."""
    kind = {4: 700, 8: 701}[row.itemsize]
    header = np.array([1, 0, kind, len(row), 1], ">i4").tobytes()
    swapped = row.astype(row.dtype.newbyteorder(">"))
    return header + b"".join(np.array(row.itemsize, ">i4").tobytes() + number.tobytes() for number in swapped[:, None])


@given(matrix=arrays(np.float32, (3, 4), elements=st.floats(width=32)))
def test_arrays_are_decoded_exactly_one_by_one_and_together(matrix: np.ndarray[Any, Any]) -> None:
    values = [encode_array(row) for row in matrix]
    decoder = BinaryDecoder("_float4")
    together = decoder.decode_all(values)
    assert together is not None
    assert together.tobytes() == matrix.tobytes() == b"".join(decoder(value).tobytes() for value in values)
    assert decoder.decode_all([*values, None]) is None
    assert decoder.decode_all([*values, values[0][:-8]]) is None
    assert decoder.decode_all([]) is None


def test_a_count_that_takes_long_is_given_up(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_postgres, "COUNT_SECONDS", 0.05)
    run(database, "CREATE VIEW slow AS SELECT 'a'::text AS content, '{1}'::real[] AS embedding FROM pg_sleep(60)")
    importer = PostgresImporter(url=database, table="slow", text_column="content")
    assert importer.count() is None
    importer.close()


def test_text_that_is_not_utf8_is_an_error_without_the_text(postgres_server: Any) -> None:
    with create_database(postgres_server.url, "ENCODING 'SQL_ASCII' TEMPLATE template0 LOCALE 'C'") as url:
        run(url, r"CREATE TABLE t AS SELECT E'private \xff'::text AS content, '{1}'::real[] AS embedding")
        importer = PostgresImporter(url=url, table="t", text_column="content")
        with pytest.raises(SourceError, match="not UTF-8") as caught:
            list(importer.scan())
        assert "private" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert not importer.lookup(["private"]).texts
        importer.close()
