"""A hostile value, table or schema gives no vector, runs no code, and takes nothing from the other texts."""

from __future__ import annotations

import hashlib
import json
import pickle
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optional import needs

from embedonce.contracts import deadline
from embedonce.errors import SourceError, TierTimeout

from .hostile import STORES, make_importer, read
from .stores import langchain_redis, llama_index_redis, redis, redisvl

pytestmark = pytest.mark.timeout(60)

TEXTS = ["good", "bad"]
GOOD, BAD = VECTORS = np.array([[1.5, 2.5, 3.5], [7.5, 8.5, 9.5]], np.float32)
BAD_JSON = json.dumps(BAD.tolist()).encode()

JSON_BOMBS: dict[str, bytes] = {
    "deep": b"[" * 200_000,
    "deep-and-closed": b"[" * 50_000 + b"1" + b"]" * 50_000,
    "deep-objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "huge-integer": b"[" + b"9" * 100_000 + b"]",
    "integer-beyond-float": b"[1" + b"0" * 400 + b"]",
    "huge-exponent": b"[1e999, 1e999999999999999999]",
    "long-list": b"[" + b"1," * 1_000_000 + b"1]",
    "nan": b"[NaN, 1.0, 1.0]",
    "infinity": b"[-Infinity, Infinity, 1.0]",
    "null": b"[null, 1.0, 1.0]",
    "booleans": b"[true, false, true]",
    "strings": b'["7.5", "8.5", "9.5"]',
    "nested": b"[[7.5, 8.5, 9.5]]",
    "object": b'{"0": 7.5}',
    "number": b"7.5",
    "string": b'"[7.5]"',
    "empty-list": b"[]",
    "trailing-comma": b"[7.5, 8.5,]",
    "two-lists": b"[7.5] [8.5]",
    "truncated": BAD_JSON[:-3],
    "hexadecimal": b"[0x10]",
    "underscores": b"[1_000]",
    "leading-zero": b"[01, 02]",
    "leading-plus": b"[+1, 2]",
    "bare-point": b"[1., .5]",
    "not-utf-8": b'["\xff\xfe"]',
    "utf-16": BAD_JSON.decode().encode("utf-16"),
    "zero-byte": BAD_JSON + b"\0",
    "pickle": pickle.dumps(BAD.tolist()),
}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_only_good(importer: Any) -> dict[str, int]:
    """Check that the good text is found with its vector, and the bad one is not; return what was unreadable."""
    try:
        found, unreadable = read(importer, TEXTS)
    finally:
        importer.close()
    # The engine refuses a vector with another number of dimensions.
    assert [text for text, vector in found.items() if len(vector) == len(GOOD)] == ["good"]
    np.testing.assert_array_equal(found["good"], GOOD)
    assert not any("bad" in reason.split() or "good" in reason.split() for reason in unreadable)
    return unreadable


# --- values in JSON -------------------------------------------------------------------------------


def replace_in_files(folder: Path, value: bytes) -> None:
    files = [path for path in folder.rglob("*") if path.is_file() and BAD_JSON in path.read_bytes()]
    assert len(files) == 1
    files[0].write_bytes(files[0].read_bytes().replace(BAD_JSON, value))


def replace_in_sqlite(folder: Path, value: bytes) -> None:
    with closing(sqlite3.connect(folder / "vectors.db")) as database, database:
        database.execute("UPDATE embeddings SET vector = ? WHERE cache_key = ?", (value, digest("bad")))


def replace_in_diskcache(folder: Path, value: bytes) -> None:
    """Write bytes, which are read as JSON. The tests of pickles write pickles."""
    import diskcache

    with closing(diskcache.Cache(str(folder))) as cache:
        cache[digest("bad")] = value


REPLACED: dict[str, Callable[[Path, bytes], None]] = {
    "langchain": replace_in_files,
    "sqlite": replace_in_sqlite,
    "diskcache": replace_in_diskcache,
    "diskcache-files": replace_in_diskcache,
}
"""The stores in which a value that is not JSON leaves the others readable."""
DOCUMENTS = ("llama-index", "llama-index-ingestion", "json-lines")
"""The stores in which the value is a part of a document in JSON."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(STORES[name].library)) for name in REPLACED])
def test_a_hostile_value_in_json_is_counted_and_the_others_are_read(name: str, tmp_path: Path) -> None:
    store = STORES[name]
    for bomb, value in JSON_BOMBS.items():
        folder = tmp_path / bomb
        options = store.write(folder, TEXTS, VECTORS)
        REPLACED[name](folder, value)
        if store.importer == "diskcache":  # its default is the pickle of a list
            options["value"] = "json"
        unreadable = check_only_good(make_importer(store.importer, **options))
        # The engine does not use, and counts, a vector that has infinity.
        assert sum(unreadable.values()) == 1 or bomb in ("huge-exponent", "integer-beyond-float", "huge-integer")


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(STORES[name].library)) for name in DOCUMENTS])
def test_a_hostile_value_in_a_document_gives_no_vector(name: str, tmp_path: Path) -> None:
    store = STORES[name]
    options = store.write(tmp_path / "store", TEXTS, VECTORS)
    content = options["path"].read_bytes()
    assert content.count(BAD_JSON) == 1
    for value in JSON_BOMBS.values():
        options["path"].write_bytes(content.replace(BAD_JSON, value))
        with suppress(SourceError):  # the document may be no JSON any more
            check_only_good(make_importer(store.importer, **options))


REDIS: dict[str, tuple[Callable[..., dict[str, Any]], str]] = {
    "redis": (redis.write, "redis"),
    "langchain-redis": (langchain_redis.write, "langchain_community"),
    "llama-index-redis": (llama_index_redis.write, "llama_index.core"),
    "redisvl": (redisvl.write, "redisvl"),
}
each_redis_store = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(library)) for name, (_, library) in REDIS.items()]
)


@pytest.fixture
def database(redis_server: Any) -> Any:
    """An empty database of the shared server."""
    from redis import Redis

    url = f"{redis_server.url.removesuffix('/0').rstrip('/')}/9"
    with Redis.from_url(url) as client:
        client.flushdb()
        client.url = url  # type: ignore[attr-defined]
        yield client
        client.flushdb()


def replace_in_redis(client: Any, value: bytes) -> None:
    """Replace the list of the bad text, in whatever key or field it is."""
    count = 0
    for key in client.scan_iter():
        if client.type(key) == b"string":
            if BAD_JSON in (content := client.get(key)):
                client.set(key, content.replace(BAD_JSON, value))
                count += 1
        else:
            for field, content in client.hgetall(key).items():
                if BAD_JSON in content:
                    client.hset(key, field, content.replace(BAD_JSON, value))
                    count += 1
    assert count == 1


@needs("redis")
@each_redis_store
def test_hostile_values_in_redis_are_counted_and_the_others_are_read(name: str, database: Any) -> None:
    write, _ = REDIS[name]
    for value in JSON_BOMBS.values():
        database.flushdb()
        options = write(database.url, TEXTS, VECTORS)
        replace_in_redis(database, value)
        check_only_good(make_importer(name, **options))


@needs("redis")
@each_redis_store
@pytest.mark.parametrize("kind", ["list", "set", "zset", "stream", "string", "hash"])
def test_a_key_of_redis_of_another_type_gives_no_vector(name: str, kind: str, database: Any) -> None:
    make: dict[str, Callable[[bytes], object]] = {
        "list": lambda key: database.rpush(key, BAD_JSON),
        "set": lambda key: database.sadd(key, BAD_JSON),
        "zset": lambda key: database.zadd(key, {BAD_JSON: 1}),
        "stream": lambda key: database.xadd(key, {"embedding": BAD_JSON}),
        "string": lambda key: database.set(key, "x"),
        "hash": lambda key: database.hset(key, "x", "y"),
    }
    write, _ = REDIS[name]
    options = write(database.url, ["bad"], VECTORS[1:])
    for key in list(database.scan_iter()):
        database.delete(key)
        make[kind](key)
    importer = make_importer(name, **options)
    with suppress(SourceError):
        assert read(importer, TEXTS)[0] == {}
    importer.close()


# --- pickles --------------------------------------------------------------------------------------


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self._marker), "w"))


def make_pickles(marker: Path) -> dict[str, bytes]:
    shared: list[Any] = [1.0]
    for _ in range(60):
        shared = [shared, shared]
    loop: list[Any] = [1.0]
    loop.append(loop)
    path = str(marker).encode()
    return {
        **{f"bomb-{protocol}": pickle.dumps(Bomb(marker), protocol) for protocol in range(6)},
        **{f"bomb-in-list-{protocol}": pickle.dumps([1.0, Bomb(marker)], protocol) for protocol in range(6)},
        "global": b"c__builtin__\nopen\n(V" + path + b"\nVw\ntR.",
        "instance": b"(V" + path + b"\nVw\nibuiltins\nopen\n.",
        "after-a-list": pickle.dumps([7.5])[:-1] + b"c__builtin__\nopen\n(V" + path + b"\nVw\ntR.",
        "after-the-end": pickle.dumps([7.5]) + pickle.dumps(Bomb(marker)),
        "persistent": b"Pname\n.",
        "shared-lists": pickle.dumps(shared),
        "loop": pickle.dumps(loop),
        "deep": b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".",
        "huge-frame": b"\x80\x04\x95" + b"\xff" * 8 + b"]G" + bytes(8) + b"a.",
        "huge-integer": b"\x80\x04]\x8b" + (2**31 - 1).to_bytes(4, "little") + b"a.",
        "huge-memo": b"\x80\x02]r\xff\xff\xff\xffG" + bytes(8) + b"a.",
        "tuple": pickle.dumps((7.5, 8.5)),
        "dictionary": pickle.dumps({0: 7.5}),
        "numpy": pickle.dumps(BAD),
        "bytes": pickle.dumps(BAD.tobytes()),
        "booleans": pickle.dumps([True, False]),
        "none": pickle.dumps([None]),
        "truncated": pickle.dumps(BAD.tolist())[:-4],
        "empty": b"",
    }


def test_a_pickle_in_sqlite_is_never_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "vectors.db"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE vectors (text TEXT, embedding BLOB)")
        bad = [(f"bad {kind}", content) for kind, content in make_pickles(marker).items()]
        database.executemany("INSERT INTO vectors VALUES (?, ?)", [("good", pickle.dumps(GOOD.tolist())), *bad])
    check_only_good(
        make_importer("sqlite", path=path, table="vectors", text_column="text", value="pickled-list", key_column=None)
    )
    assert not marker.exists()


@pytest.mark.parametrize("is_in_file", [False, True])
def test_a_pickle_in_diskcache_is_never_unpickled(is_in_file: bool, tmp_path: Path) -> None:
    import diskcache

    marker = tmp_path / "marker"
    path = tmp_path / "cache"
    for content in make_pickles(marker).values():
        with closing(diskcache.Cache(str(path), disk_min_file_size=1 if is_in_file else 1 << 20)) as cache:
            cache[digest("good")] = GOOD.tolist()
            cache[digest("bad")] = BAD.tolist()
            ((name,),) = cache._sql("SELECT filename FROM Cache WHERE key = ?", (digest("bad"),)).fetchall()
            if is_in_file:
                Path(cache.directory, name).write_bytes(content)
            else:
                cache._sql("UPDATE Cache SET value = ? WHERE key = ?", (content, digest("bad")))
        check_only_good(make_importer("diskcache", path=path))
    assert not marker.exists()


@needs("redis")
def test_a_pickle_in_redis_is_never_unpickled(database: Any, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    database.set(digest("good"), pickle.dumps(GOOD.tolist()))
    for content in make_pickles(marker).values():
        database.set(digest("bad"), content)
        check_only_good(make_importer("redis", url=database.url, key='sha256("{text}")', value="pickled-list"))
    assert not marker.exists()


# --- schemas of SQLite ----------------------------------------------------------------------------

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
SCHEMAS = {
    "endless-view": f"CREATE VIEW vectors AS {ENDLESS} SELECT 'k' || i AS text, '[1]' AS embedding FROM n WHERE i < 0",
    "endless-text": f"CREATE VIEW vectors AS {ENDLESS} SELECT 'k' || i AS text, '[1]' AS embedding FROM n",
    "large-value": "CREATE VIEW vectors AS SELECT 'bad' AS text, zeroblob(1000000000) AS embedding",
    "large-text": "CREATE VIEW vectors AS SELECT hex(zeroblob(500000000)) AS text, '[1]' AS embedding",
    "extension": "CREATE VIEW vectors AS SELECT 'bad' AS text, load_extension('/tmp/x') AS embedding",
    "tokenizer": "CREATE VIEW vectors AS SELECT 'bad' AS text, fts3_tokenizer('simple', zeroblob(8)) AS embedding",
    "missing-function": "CREATE VIEW vectors AS SELECT 'bad' AS text, readfile('/etc/passwd') AS embedding",
    "view-of-itself": "CREATE VIEW vectors AS SELECT * FROM vectors",
    "numbers": "CREATE TABLE vectors (text, embedding); INSERT INTO vectors VALUES ('bad', 1), (2, '[1]'), (NULL, 2)",
    "generated": "CREATE TABLE vectors (text, embedding AS (zeroblob(length(text) * 100000000)))"
    "; INSERT INTO vectors VALUES ('bad')",
    "search": "CREATE VIRTUAL TABLE vectors USING fts5(text, embedding); INSERT INTO vectors VALUES ('bad', '[x]')",
    "case": "CREATE TABLE vectors (text COLLATE NOCASE, embedding); INSERT INTO vectors VALUES ('BAD', '[1]')",
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_hostile_schema_of_sqlite_gives_no_vector_and_ends_in_time(schema: str, tmp_path: Path) -> None:
    path = tmp_path / "vectors.db"
    with closing(sqlite3.connect(path)) as database:
        try:
            database.executescript(SCHEMAS[schema])
        except sqlite3.OperationalError as error:
            pytest.skip(f"this SQLite cannot make the schema: {error}")
    before = path.read_bytes()
    importer = make_importer("sqlite", path=path, table="vectors", text_column="text", key_column=None)
    for call in (importer.check, lambda: importer.lookup(TEXTS), lambda: list(importer.scan())):
        with suppress(SourceError, TierTimeout, sqlite3.Error), deadline(0.2):
            found = call()
            for part in found if isinstance(found, list) else [found] if found else []:
                assert not set(part.texts) & set(TEXTS)
    importer.close()
    assert path.read_bytes() == before


def test_triggers_of_sqlite_do_not_run(tmp_path: Path) -> None:
    path = tmp_path / "vectors.db"
    with closing(sqlite3.connect(path)) as database:
        database.executescript(
            """
            CREATE TABLE vectors (text, embedding);
            INSERT INTO vectors VALUES ('good', '[1.5, 2.5, 3.5]');
            CREATE TABLE log (text);
            CREATE TRIGGER t AFTER INSERT ON vectors BEGIN INSERT INTO log VALUES (NEW.text); END;
            """
        )
    before = path.read_bytes()
    check_only_good(make_importer("sqlite", path=path, table="vectors", text_column="text", key_column=None))
    assert path.read_bytes() == before


# --- Parquet --------------------------------------------------------------------------------------


def make_columns() -> dict[str, Any]:
    import pyarrow as pa

    return {
        "strings": pa.array(["[1.5]", "x"]),
        "lists-of-strings": pa.array([["1.5"], ["x"]]),
        "nested-lists": pa.array([[[1.5]], [[2.5]]]),
        "structs": pa.array([{"values": [1.5]}, None]),
        "booleans": pa.array([[True], [False]]),
        "nulls": pa.array([None, None]),
        "empty-lists": pa.array([[], []], pa.list_(pa.float32())),
        "lists-of-nulls": pa.array([[None, None], [None]], pa.list_(pa.float32())),
        "not-finite": pa.array([[float("nan")], [float("inf")]], pa.list_(pa.float32())),
        "numbers": pa.array([1.5, 2.5]),
        "bytes": pa.array([b"1234", b"5678"]),
        "times": pa.array([[1], [2]], pa.list_(pa.timestamp("s"))),
        "maps": pa.array([[("a", 1.5)], []], pa.map_(pa.string(), pa.float32())),
        "fixed-lists-of-nulls": pa.array([None, None], pa.list_(pa.float32(), 3)),
    }


@needs("pyarrow")
@pytest.mark.parametrize("options", [{}, {"text_column": "text", "vector_column": "vector"}], ids=["found", "named"])
def test_columns_of_parquet_that_have_no_vectors_give_none(options: dict[str, str], tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for kind, column in make_columns().items():
        path = tmp_path / f"{kind}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "vector": column}), path)
        importer = make_importer("table", path=path, **options)
        with suppress(SourceError):
            importer.check()
            assert read(importer, TEXTS)[0] == {}, kind
        importer.close()


@needs("pyarrow")
def test_texts_of_parquet_that_are_no_text_give_no_vector(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    vectors = pa.array(VECTORS.tolist(), pa.list_(pa.float32()))
    for kind, column in {
        "nulls": pa.array([None, None], pa.string()),
        "numbers": pa.array([1, 2]),
        "bytes": pa.array([b"\xff\xfe", b"bad"]),
        "lists": pa.array([["good"], ["bad"]]),
    }.items():
        path = tmp_path / f"{kind}.parquet"
        pyarrow.parquet.write_table(pa.table({"text": column, "vector": vectors}), path)
        importer = make_importer("table", path=path, text_column="text", vector_column="vector")
        with suppress(SourceError):
            assert "good" not in read(importer, TEXTS)[0], kind
        importer.close()
