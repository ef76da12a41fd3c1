"""The importer ``sqlite`` reads tables that other programs have written, and changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedonce.contracts import FoundVectors, deadline
from embedonce.errors import ConfigError, SourceError, TierTimeout
from embedonce.testing import ImporterContract, Recipe
from embedonce_importers import _sqlite
from embedonce_importers.sqlite import PAGE, SqliteImporter

from .stores.sqlite import write

TEXTS = ["first", "", "Grüße 🎉", "a\nb", " first ", "First"]
VECTORS = np.random.default_rng(0).standard_normal((len(TEXTS), 8)).astype(np.float32)
EXPECTED = dict(zip(TEXTS, VECTORS.tolist(), strict=True))


class OfTables(ImporterContract):
    """Standard tests of tables in ``self.folder``, one database per table."""

    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.options: dict[object, dict[str, Any]] = {}

    def write(self, path: Path, texts: Sequence[str], vectors: Any) -> dict[str, Any]:
        raise NotImplementedError

    def make(self, texts: Sequence[str], vectors: Any) -> SqliteImporter:
        options = self.write(self.folder / f"{len(self.options)}.db", texts, vectors)
        importer = SqliteImporter(**options)
        self.options[importer] = options
        return importer

    def can_hold(self, text: str) -> bool:
        return text.encode("utf-8", "replace").decode() == text

    def recipe(self, importer: Any) -> Recipe:
        return Recipe(SqliteImporter, {**self.options[importer], "path": str(self.options[importer]["path"])})

    def missing(self) -> tuple[SqliteImporter, str]:
        path = self.folder / "missing.db"
        return SqliteImporter(path=path, table="t", text_column="text"), str(path)

    def snapshot(self, importer: Any) -> object:
        return self.options[importer]["path"].read_bytes()

    @contextmanager
    def stall(self, importer: Any) -> Iterator[None]:
        with closing(sqlite3.connect(self.options[importer]["path"], isolation_level=None)) as writer:
            writer.execute("BEGIN EXCLUSIVE")
            yield


class TestKeys(OfTables):
    def write(self, path: Path, texts: Sequence[str], vectors: Any) -> dict[str, Any]:
        return write(path, texts, vectors)

    def damage(self, importer: Any, text: str) -> None:
        key = hashlib.sha256(text.encode()).hexdigest()
        run(self.options[importer]["path"], f"UPDATE embeddings SET vector = '[1, ' WHERE cache_key = '{key}'")


class TestTexts(OfTables):
    def write(self, path: Path, texts: Sequence[str], vectors: Any) -> dict[str, Any]:
        rows = [(text, row.tobytes()) for text, row in zip(texts, vectors, strict=True)]
        run(path, "CREATE TABLE t (text PRIMARY KEY, embedding)", rows=("INSERT INTO t VALUES (?, ?)", rows))
        return {"path": path, "table": "t", "text_column": "text", "value": "float32"}

    def damage(self, importer: Any, text: str) -> None:
        run(self.options[importer]["path"], rows=("UPDATE t SET embedding = x'00' WHERE text = ?", [(text,)]))


def run(path: Path, *statements: str, rows: tuple[str, Iterable[Sequence[Any]]] | None = None) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)
        if rows is not None:
            connection.executemany(*rows)


def listed(found: FoundVectors) -> dict[str, list[float]]:
    assert len(set(found.texts)) == len(found.texts)
    return {text: np.asarray(row, np.float32).tolist() for text, row in zip(found.texts, found.vectors, strict=True)}


def read(importer: Any, texts: Sequence[str] = TEXTS) -> dict[str, list[float]]:
    found = importer.lookup(texts)
    assert not found.unreadable
    return listed(found)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "a ?#% database.db"


def make(path: Path, **options: Any) -> Any:
    return SqliteImporter(path=path, **options)


def test_keys_are_looked_up(database: Path) -> None:
    importer = make(**write(database, TEXTS, VECTORS))
    importer.check()
    assert read(importer, [*TEXTS, "not stored", "lone \udc80 surrogate", "nul \0"]) == EXPECTED
    assert not hasattr(importer, "scan")
    importer.close()
    importer.close()


@pytest.mark.parametrize("declared", ["TEXT PRIMARY KEY", "STRING", "INTEGER", "TEXT COLLATE NOCASE", ""])
def test_texts_are_looked_up_and_scanned_in_columns_of_any_type(database: Path, declared: str) -> None:
    texts = [*TEXTS, "1", "1.0", "01", "1e3"]
    if declared in ("STRING", "INTEGER"):
        texts = TEXTS  # SQLite would change the others
    vectors = np.arange(len(texts) * 4, dtype=np.float32).reshape(-1, 4) + 1
    rows = [(text, row.tobytes()) for text, row in zip(texts, vectors, strict=True)]
    run(database, f"CREATE TABLE c (text {declared}, embedding)", rows=("INSERT INTO c VALUES (?, ?)", rows))
    importer = make(database, table="C", text_column="Text", value="float32")
    importer.check()
    expected = dict(zip(texts, vectors.tolist(), strict=True))
    assert read(importer, ["1000.0", *texts, "FIRST"]) == expected
    assert importer.count() == len(texts)
    (part,) = importer.scan()
    assert listed(part) == expected
    assert not part.unreadable


def test_numbers_in_place_of_keys_are_not_taken_for_them(database: Path) -> None:
    rows = [("1", "[1]"), ("01", "[2]"), ("1.0", "[3]")]
    run(database, "CREATE TABLE t (k INTEGER, embedding)", rows=("INSERT INTO t VALUES (?, ?)", rows))
    assert read(make(database, table="t", key_column="k", key='"{text}"'), ["1", "01", "1.0"]) == {}


def test_rows_of_one_model_are_read(database: Path) -> None:
    rows = [("text", "a", "[1]"), ("text", "b", "[2]"), ("other", "b", "[3]")]
    run(database, "CREATE TABLE t (text, model, embedding)", rows=("INSERT INTO t VALUES (?, ?, ?)", rows))
    importer = make(database, table="t", text_column="text", model_column="model", model="b")
    assert read(importer, ["text", "other"]) == {"text": [2], "other": [3]}
    assert importer.count() == 2
    assert [listed(part) for part in importer.scan()] == [{"text": [2], "other": [3]}]


def test_a_key_with_different_vectors_has_none(database: Path) -> None:
    rows = [("a", "[1, 0]"), ("a", "[0, 1]"), ("b", "[1, 2]"), ("b", "[1.0, 2.0]")]
    run(database, "CREATE TABLE t (text, embedding)", rows=("INSERT INTO t VALUES (?, ?)", rows))
    found = make(database, table="t", text_column="text").lookup(["a", "b"])
    assert listed(found) == {"b": [1, 2]}
    assert sum(found.unreadable.values()) == 1


def test_a_text_that_does_not_have_the_key_of_its_row_is_a_preview(database: Path) -> None:
    def key(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    rows = [(key("a long text"), "a long", "[1]"), (key("short"), "short", "[2]"), (key("x"), None, "[3]")]
    run(database, "CREATE TABLE t (k, preview, embedding)", rows=("INSERT INTO t VALUES (?, ?, ?)", rows))
    importer = make(database, table="t", key_column="k", text_column="preview")
    reason = "the text of the row does not have the key of the row, so it is not the whole text"
    found = importer.lookup(["a long text", "short", "a long"])
    assert listed(found) == {"short": [2]}
    assert found.unreadable == {reason: 1}
    (part,) = importer.scan()
    assert listed(part) == {"short": [2]}
    assert part.unreadable == {reason: 1, "the text of the row is not text in UTF-8": 1}


def test_with_steps_texts_share_a_key_unless_the_text_is_stored(database: Path) -> None:
    run(database, "CREATE TABLE t (k, text, embedding)", "INSERT INTO t VALUES ('hello', 'Hello', '[1]')")
    options = {"table": "t", "key_column": "k", "key": '"{text}"', "steps": ["strip", "lower"]}
    assert read(make(database, **options), ["Hello", " hello", "other"]) == {"Hello": [1], " hello": [1]}
    assert read(make(database, **options, text_column="text"), ["Hello", " hello"]) == {"Hello": [1]}


def test_values_that_cannot_be_read_are_counted(database: Path) -> None:
    values = [None, 1, 1.5, "[1", "[null]", b"\xff", "[" + "1," * 2**20 + "1]", "x" * 5 * 2**20, "[1.5]"]
    rows = [(f"text {number}", value) for number, value in enumerate(values)]
    run(database, "CREATE TABLE t (text, embedding)", rows=("INSERT INTO t VALUES (?, ?)", rows))
    importer = make(database, table="t", text_column="text")
    expected = {
        "no vector": 1,
        "a number in place of a vector": 2,
        "truncated or invalid JSON": 1,
        "not a JSON list of numbers": 2,
        "larger than 1 MiB": 1,
        "a row larger than 4 MiB": 1,
    }
    found = importer.lookup([text for text, _ in rows])
    assert listed(found) == {"text 8": [1.5]}
    assert found.unreadable == expected
    parts = list(importer.scan())
    assert [listed(part) for part in parts if part.texts] == [{"text 8": [1.5]}]
    counted: dict[str, int] = {}
    for part in parts:
        for reason, number in part.unreadable.items():
            counted[reason] = counted.get(reason, 0) + number
    assert counted == expected


def test_a_scan_reads_parts_in_one_order_and_holds_no_lock_between_them(database: Path) -> None:
    rows = [(number * 3 - 5000, f"text {number}", f"[{number + 1}]") for number in range(2 * PAGE + 10)]
    columns = "(id INTEGER PRIMARY KEY, text UNIQUE, embedding)"
    run(database, f"CREATE TABLE t {columns}", rows=("INSERT INTO t VALUES (?, ?, ?)", rows))
    importer = make(database, table="t", text_column="text")
    texts = [text for part in importer.scan() for text in part.texts]
    assert texts == [text for _, text, _ in rows]
    parts = importer.scan()
    assert len(next(parts).texts) == PAGE
    run(database, "INSERT INTO t VALUES (100000, 'new', '[1]')")
    assert [text for part in parts for text in part.texts] == [*texts[PAGE:], "new"]


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE VIEW v AS SELECT 'a' AS text, '[1]' AS embedding",
        "CREATE TABLE v (text PRIMARY KEY, embedding) WITHOUT ROWID",
        "CREATE TABLE v (text, embedding, rowid, oid, _rowid_)",
    ],
)
def test_a_table_without_row_numbers_is_looked_up_but_not_scanned(database: Path, statement: str) -> None:
    run(database, statement)
    if "VIEW" not in statement:
        run(database, "INSERT INTO v (text, embedding) VALUES ('a', '[1]')")
    importer = make(database, table="v", text_column="text")
    assert read(importer, ["a"]) == {"a": [1]}
    with pytest.raises(SourceError, match="is a view or has no row numbers"):
        next(importer.scan())


def test_a_column_called_rowid_is_not_taken_for_the_number_of_the_row(database: Path) -> None:
    rows = [("a", "[1]", "x"), ("b", "[2]", "x")]
    run(database, "CREATE TABLE t (text, embedding, rowid)", rows=("INSERT INTO t VALUES (?, ?, ?)", rows))
    assert [listed(part) for part in make(database, table="t", text_column="text").scan()] == [{"a": [1], "b": [2]}]


def test_names_are_quoted(database: Path) -> None:
    table, text, vector = 'a "table"; DROP TABLE x; --', "select", "it's"
    run(database, f'CREATE TABLE "{table.replace(chr(34), chr(34) * 2)}" ("{text}", "{vector}")')
    importer = make(database, table=table, text_column=text, vector_column=vector)
    importer.check()
    assert read(importer) == {}


def test_a_wrong_table_or_column_is_an_error_with_a_suggestion(database: Path) -> None:
    run(database, "CREATE TABLE embeddings (cache_key, vector)", "CREATE TABLE other (x)")

    def check(**options: Any) -> str:
        messages = []
        for call in (SqliteImporter.check, lambda importer: importer.lookup(["a"])):
            with pytest.raises(SourceError) as caught:
                call(make(database, **{"table": "embeddings", "key_column": "cache_key", **options}))
            messages.append(str(caught.value))
        assert len(set(messages)) == 1
        return messages[0]

    assert 'has no table "embedding"; did you mean "embeddings"?' in check(table="embedding")
    assert 'Its tables: "embeddings", "other"' in check(table="zzz")
    message = check(vector_column="vectors")
    assert 'table "embeddings" of' in message
    assert 'has no column "vectors"; did you mean "vector"? Its columns: "cache_key", "vector"' in message
    assert 'no column "model"' in check(vector_column="vector", model_column="model", model="m")


def test_a_table_that_disappears_is_an_error_of_the_next_check(database: Path) -> None:
    importer = make(**write(database, TEXTS, VECTORS))
    importer.check()
    run(database, "DROP TABLE embeddings")
    with pytest.raises(SourceError, match="has no table"):
        importer.check()
    importer.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "set key_column to the column with the keys, or text_column"),
        ({"text_column": "t", "model_column": "m"}, "model_column needs the option model"),
        ({"text_column": "t", "steps": ["lower"]}, "key and steps are for keys"),
        ({"text_column": "t", "key": '"{text}"'}, "key and steps are for keys"),
        ({"text_column": "t", "model": "m"}, "model is for keys and for model_column"),
        ({"key_column": "k", "key": "sha256"}, "key, column 7: expected"),
        ({"key_column": "k", "model": "m"}, "key does not use {model}"),
    ],
)
def test_invalid_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(Path("x"), table="t", **options)
    assert message in str(caught.value)


def test_the_source_names_the_file_and_the_options(database: Path) -> None:
    name = make(database, table="t", key_column="k", key='"{model}{text}"', model="m", steps=["strip"]).source.name
    assert name == (
        f"sqlite: {database}, table=t, key_column=k, vector_column=embedding, "
        'key "{model}{text}", model m, steps strip, value=json'
    )


def test_what_is_not_a_database_is_an_error(tmp_path: Path) -> None:
    def check(name: str) -> str:
        with pytest.raises(SourceError) as caught:
            make(tmp_path / name, table="t", text_column="x").check()
        return str(caught.value)

    assert "does not exist; check the path" in check("missing.db")
    assert not (tmp_path / "missing.db").exists()
    (tmp_path / "folder").mkdir()
    assert "is a folder, not a file" in check("folder")
    (tmp_path / "other").write_bytes(b"not a database, but long enough to be read as one" * 100)
    assert "is not an SQLite database" in check("other")
    os.mkfifo(tmp_path / "fifo")
    assert "is a named pipe" in check("fifo")
    write(tmp_path / "real.db", TEXTS, VECTORS)
    (tmp_path / "link.db").symlink_to(tmp_path / "real.db")
    assert "is a symbolic link, not a file" in check("link.db")
    (tmp_path / "empty.db").write_bytes(b"")
    assert 'has no table "t"; it has no tables' in check("empty.db")
    content = bytearray((tmp_path / "real.db").read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    (tmp_path / "damaged.db").write_bytes(content)
    with pytest.raises(SourceError, match="is damaged; check it with"):
        make(tmp_path / "damaged.db", table="embeddings", key_column="cache_key", vector_column="vector").lookup(["a"])


def test_a_database_that_another_connection_writes_is_read(database: Path) -> None:
    options = write(database, TEXTS[:1], VECTORS[:1])
    importer = make(**options)
    with closing(sqlite3.connect(database, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        assert read(importer) == {TEXTS[0]: VECTORS[0].tolist()}
        row = (hashlib.sha256(TEXTS[1].encode()).hexdigest(), json.dumps(VECTORS[1].tolist()))
        writer.execute("INSERT INTO embeddings VALUES (?, ?)", row)
        assert set(read(importer)) == {*TEXTS[:2]}
        writer.execute("BEGIN IMMEDIATE")
        assert set(read(importer)) == {*TEXTS[:2]}
        writer.execute("ROLLBACK")
        writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    importer.close()


def test_a_locked_database_is_an_error_within_the_time_that_is_left(database: Path) -> None:
    importer = make(**write(database, TEXTS, VECTORS))
    with closing(sqlite3.connect(database, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(SourceError, match="locked by another program"), deadline(0.05):
            importer.lookup(TEXTS)
        writer.execute("ROLLBACK")
    assert read(importer) == EXPECTED
    importer.close()


def test_a_lock_is_not_waited_for_longer_than_a_user_who_presses_ctrl_c(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sqlite, "LOCK_TIMEOUT", 0.05)
    importer = make(**write(database, TEXTS, VECTORS))
    with closing(sqlite3.connect(database, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(SourceError, match="try again"), deadline(300.0):
            importer.lookup(TEXTS)
        writer.execute("ROLLBACK")
    importer.close()


class Stopped(KeyboardInterrupt):
    """What the handler of a signal raises."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no timers that send signals")
def test_a_signal_ends_a_long_query_with_its_own_exception(database: Path) -> None:
    def stop(*_: object) -> None:
        raise Stopped

    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
    run(database, f"CREATE VIEW v AS {endless} SELECT i || '' AS text, 1 AS embedding FROM n")
    importer = make(database, table="v", text_column="text")

    def look_up_until_the_alarm() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        importer.lookup(["b"])

    previous = signal.signal(signal.SIGALRM, stop)
    try:
        for limit in (nullcontext(), deadline(300.0)):
            with pytest.raises(Stopped), limit:
                look_up_until_the_alarm()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    importer.close()


def test_a_query_ends_at_the_deadline(database: Path) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
    endless += "SELECT i || '' AS text, 1 AS embedding FROM n"
    run(database, f"CREATE VIEW v AS {endless}")
    importer = make(database, table="v", text_column="text")
    with pytest.raises(TierTimeout, match="did not end in time"), deadline(0.2):
        importer.lookup(["b"])
    with pytest.raises(TierTimeout), deadline(0.0):
        importer.lookup(["b"])
    importer.close()


def test_a_closed_log_in_a_folder_that_cannot_be_written_is_read(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere, so the refusal of SQLite is imitated."""
    options = write(database, TEXTS, VECTORS)
    run(database, "PRAGMA journal_mode = WAL")
    opened: list[str] = []
    connect = _sqlite.ReadOnlyDatabase._open_with

    def refuse_locks(self: _sqlite.ReadOnlyDatabase, mode: str) -> Any:
        opened.append(mode)
        if "immutable" not in mode:
            error = sqlite3.OperationalError("unable to open database file")
            error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
            raise error
        return connect(self, mode)

    monkeypatch.setattr(_sqlite.ReadOnlyDatabase, "_open_with", refuse_locks)
    with pytest.raises(SourceError, match="SQLite cannot open"):  # the folder can be written: the cause is another
        make(**options).check()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    importer = make(**options)
    assert read(importer) == EXPECTED
    assert opened[-2:] == ["mode=ro", "mode=ro&immutable=1"]
    row = (hashlib.sha256(b"new").hexdigest(), "[1, 2]")
    run(database, rows=("INSERT INTO embeddings VALUES (?, ?)", [row]))
    assert read(importer, ["new"]) == {"new": [1, 2]}  # a later call sees what was written in between
    importer.close()
    database.with_name(f"{database.name}-wal").write_bytes(b"x")
    with pytest.raises(SourceError, match="SQLite cannot open"):
        make(**options).check()


def test_a_hostile_schema_does_nothing(database: Path, tmp_path: Path) -> None:
    target = tmp_path / "attached.db"
    run(database, "CREATE TABLE t (text, embedding)", "INSERT INTO t VALUES ('a', '[1]')")
    run(database, "CREATE VIEW v AS SELECT text, load_extension('x') AS embedding FROM t")
    with pytest.raises(sqlite3.OperationalError):
        make(database, table="v", text_column="text").lookup(["a"])
    importer = make(database, table="t", text_column="text")
    with importer._database.connect() as connection:
        for statement in (f"ATTACH '{target}' AS other", "DELETE FROM t", "CREATE TABLE u (x)"):
            with pytest.raises(sqlite3.OperationalError):
                connection.execute(statement)
    importer.close()
    assert not target.exists()


def test_nothing_is_written(database: Path) -> None:
    importer = make(**write(database, TEXTS, VECTORS))
    before = database.read_bytes(), database.stat().st_mtime_ns
    importer.check()
    assert read(importer) == EXPECTED
    importer.close()
    assert (database.read_bytes(), database.stat().st_mtime_ns) == before
    assert [file.name for file in database.parent.iterdir()] == [database.name]


def test_threads_share_connections(database: Path) -> None:
    importer = make(**write(database, TEXTS, VECTORS))
    results: list[dict[str, list[float]]] = []
    threads = [threading.Thread(target=lambda: results.append(read(importer))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [EXPECTED] * 8
    importer.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_opens_its_own_connection(database: Path) -> None:
    importer = make(**write(database, TEXTS, VECTORS))
    assert read(importer) == EXPECTED
    (inherited,) = importer._database._idle
    child = os.fork()
    if child == 0:
        try:
            is_right = read(importer) == EXPECTED and importer._database._idle[0] is not inherited
        except BaseException:
            is_right = False
        os._exit(0 if is_right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    importer.close()
