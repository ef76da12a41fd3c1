"""The importer ``chroma`` reads collections that Chroma has written, and leaves the folder as it is."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import optional
import patience
import pytest
from http_servers import Handler, HttpServer

from embedonce.errors import ConfigError, SourceError
from embedonce.testing import ImporterContract, Recipe
from embedonce_importers.chroma import ChromaImporter

from .stores.chroma import open_client, write, write_collection

pytestmark = optional.needs("chromadb")

TEXTS = ["first", "", "Grüße 🎉", "a\nb", " first ", "First"]
VECTORS = np.random.default_rng(0).standard_normal((len(TEXTS), 8)).astype(np.float32)


@contextmanager
def importing(**options: Any) -> Iterator[ChromaImporter]:
    importer = ChromaImporter(**options)
    try:
        yield importer
    finally:
        importer.close()


def read(**options: Any) -> tuple[list[str], list[list[float]], dict[str, int]]:
    with importing(**options) as importer:
        importer.check()
        parts = list(importer.scan())
    counts: dict[str, int] = {}
    for part in parts:
        counts |= {reason: counts.get(reason, 0) + number for reason, number in part.unreadable.items()}
    texts = [text for part in parts for text in part.texts]
    return texts, [row.tolist() for part in parts for row in np.asarray(part.vectors)], counts


def refuse(**options: Any) -> str:
    with importing(**options) as importer, pytest.raises(SourceError) as caught:
        importer.check()
    return str(caught.value)


def take_snapshot(folder: Path) -> object:
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}


class TestContract(ImporterContract):
    examples = 2
    scan_length = 2_500

    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = tmp_path
        self.copies = tmp_path / "copies"
        self.copies.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(self.copies))
        self.stores: dict[int, Path] = {}

    def make(self, texts: Sequence[str], vectors: Any) -> ChromaImporter:
        path = self.folder / str(len(self.stores))
        importer = ChromaImporter(**write(path, texts, vectors))  # type: ignore[arg-type]
        self.stores[id(importer)] = path
        return importer

    def recipe(self, importer: Any) -> Recipe:
        return Recipe(ChromaImporter, {"path": str(self.stores[id(importer)]), "collection": "passages"})

    def missing(self) -> tuple[ChromaImporter, str]:
        return ChromaImporter(path=self.folder / "missing"), str(self.folder / "missing")

    def snapshot(self, importer: Any) -> object:
        return take_snapshot(self.stores[id(importer)])


def test_a_copy_is_read_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(copies))
    store = tmp_path / "store"
    write(store, TEXTS, VECTORS)
    before = take_snapshot(store)
    with importing(path=store) as importer:
        importer.check()
        assert importer.count() == len(TEXTS)
        (copy,) = copies.iterdir()
        assert copy.stat().st_mode & 0o077 == 0
        assert importer.source.task == "document"
    assert not list(copies.iterdir())
    assert take_snapshot(store) == before
    assert read(path=store) == (TEXTS, VECTORS.tolist(), {})
    assert not list(copies.iterdir())


def test_the_folder_is_read_while_another_client_has_it_open(tmp_path: Path) -> None:
    write(tmp_path / "store", TEXTS, VECTORS)
    with open_client(tmp_path / "store") as client:
        assert read(path=tmp_path / "store")[:2] == (TEXTS, VECTORS.tolist())
        assert client.get_collection("passages", embedding_function=None).count() == len(TEXTS)


def test_vectors_in_the_index_and_in_the_log_are_read(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(2_600)]
    vectors = np.random.default_rng(1).standard_normal((len(texts), 8)).astype(np.float32)
    write(tmp_path / "store", texts, vectors)
    assert read(path=tmp_path / "store") == (texts, vectors.tolist(), {})


def test_a_store_that_changes_while_it_is_copied_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embedonce_importers import _store_copies

    write(tmp_path / "store", TEXTS, VECTORS)
    copy_files = _store_copies.StoreCopy._copy_files

    def copy_and_change(self: Any, copy: Path, files: Any) -> None:
        copy_files(self, copy, files)
        with closing(sqlite3.connect(tmp_path / "store/chroma.sqlite3")) as connection, connection:
            connection.execute("INSERT INTO acquire_write (lock_status) VALUES (1)")

    monkeypatch.setattr(_store_copies.StoreCopy, "_copy_files", copy_and_change)
    assert "being written to by another program" in refuse(path=tmp_path / "store")


def test_records_without_a_document_are_counted(tmp_path: Path) -> None:
    with open_client(tmp_path) as client:
        collection = client.create_collection("passages", embedding_function=None)
        collection.add(ids=["a", "b"], embeddings=[[1.0, 2.0], [3.0, 4.0]], documents=["x", "y"])
        collection.add(ids=["c"], embeddings=[[5.0, 6.0]], metadatas=[{"title": "no document"}])
    assert read(path=tmp_path) == (["x", "y"], [[1.0, 2.0], [3.0, 4.0]], {"record without a document": 1})


def test_nodes_of_llama_index_with_embedded_metadata_are_counted(tmp_path: Path) -> None:
    nodes = [
        {"metadata": {}},
        {"metadata": {"file": "a"}},
        {"metadata": {"a": 1}, "excluded_embed_metadata_keys": ["a"]},
    ]
    metadatas = [{"_node_content": json.dumps(node)} for node in nodes]
    write_collection(tmp_path, "passages", TEXTS[:3], VECTORS[:3], metadatas=metadatas)
    texts, rows, unreadable = read(path=tmp_path)
    assert (texts, rows) == ([TEXTS[0], TEXTS[2]], VECTORS[[0, 2]].tolist())
    assert list(unreadable.values()) == [1]


def test_a_cosine_collection_returns_the_vectors_as_they_were(tmp_path: Path) -> None:
    write_collection(tmp_path, "passages", TEXTS, VECTORS, space="cosine")
    texts, rows, _ = read(path=tmp_path)
    assert texts == TEXTS
    np.testing.assert_allclose(rows, VECTORS, rtol=1e-5)


def test_the_collection_is_chosen(tmp_path: Path) -> None:
    write_collection(tmp_path, "one", TEXTS[:1], VECTORS[:1])
    assert read(path=tmp_path)[0] == TEXTS[:1]
    write_collection(tmp_path, "two", TEXTS[1:], VECTORS[1:])
    assert "it has 'one', 'two'" in refuse(path=tmp_path)
    assert 'did you mean "two"?' in refuse(path=tmp_path, collection="tow")
    assert read(path=tmp_path, collection="two")[0] == TEXTS[1:]
    assert "tenant 'nobody'" in refuse(path=tmp_path, tenant="nobody")
    assert "database 'nothing'" in refuse(path=tmp_path, database="nothing")


def test_no_embedding_function_is_loaded(tmp_path: Path) -> None:
    write_collection(tmp_path, "passages", TEXTS, VECTORS)
    with closing(sqlite3.connect(tmp_path / "chroma.sqlite3")) as connection, connection:
        (stored,) = connection.execute("SELECT config_json_str FROM collections").fetchone()
        config = json.loads(stored)
        config["embedding_function"] = {"type": "known", "name": "openai", "config": {"api_key_env_var": "UNSET_KEY"}}
        connection.execute("UPDATE collections SET config_json_str = ?", [json.dumps(config)])
    assert read(path=tmp_path)[:2] == (TEXTS, VECTORS.tolist())


def test_other_folders_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refuse(path=tmp_path / "missing")
    assert "has no file chroma.sqlite3" in refuse(path=tmp_path)
    (tmp_path / "chroma.sqlite3").write_bytes(b"hello" * 1000)
    assert "chroma.sqlite3" in refuse(path=tmp_path)
    (tmp_path / "chroma.sqlite3").unlink()
    with closing(sqlite3.connect(tmp_path / "chroma.sqlite3")) as connection, connection:
        connection.execute("CREATE TABLE other (a)")
    refuse(path=tmp_path, collection="passages")
    assert "is a file, not a folder" in refuse(path=tmp_path / "chroma.sqlite3")


def test_links_in_the_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "store", TEXTS, VECTORS)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "store/link").symlink_to(tmp_path / "secret")
    assert "symbolic link" in refuse(path=tmp_path / "store")


@pytest.mark.parametrize("name", ["index_metadata.pickle", "length.bin"])
def test_a_damaged_index_gives_no_wrong_vector(tmp_path: Path, name: str) -> None:
    texts = [f"text {number}" for number in range(1_200)]
    vectors = np.random.default_rng(1).standard_normal((len(texts), 8)).astype(np.float32)
    write(tmp_path, texts, vectors)
    (file,) = tmp_path.rglob(name)
    file.write_bytes(file.read_bytes()[:10])
    expected = dict(zip(texts, vectors.tolist(), strict=True))
    with importing(path=tmp_path) as importer, suppress(SourceError):
        for part in importer.scan():
            for text, row in zip(part.texts, np.asarray(part.vectors), strict=True):
                assert row.tolist() == expected[text]


def test_a_pickle_in_the_folder_runs_no_code(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(1_200)]
    write(tmp_path, texts, np.ones((len(texts), 8), np.float32))
    (file,) = tmp_path.rglob("index_metadata.pickle")
    proof = tmp_path.with_name("proof")
    file.write_bytes(f"cos\nsystem\n(S'touch {proof}'\ntR.".encode())
    with importing(path=tmp_path) as importer, suppress(SourceError):
        list(importer.scan())
    assert not proof.exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "exactly one"),
        ({"path": Path("a"), "url": "http://localhost"}, "exactly one"),
        ({"path": Path("a"), "api_key": "key"}, "leave it out"),
        ({"url": "localhost:8000"}, "http://"),
        ({"url": "http://user:hunter2@localhost"}, "api_key"),
        ({"url": "http://localhost:8000/api"}, "no path"),
        ({"url": "http://localhost:port"}, "port"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        ChromaImporter(**options)
    assert "hunter2" not in str(caught.value)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("chroma")
    write_collection(folder, "passages", TEXTS, VECTORS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = Path(sys.executable).with_name("chroma")
    process = subprocess.Popen(
        [command, "run", "--path", folder, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        patience.wait_until(lambda: _can_connect(port))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _can_connect(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def test_a_collection_on_a_server_is_read(server: str) -> None:
    assert read(url=server) == (TEXTS, VECTORS.tolist(), {})
    assert read(url=server, collection="passages", api_key="ignored")[0] == TEXTS
    assert 'did you mean "passages"?' in refuse(url=server, collection="passage")
    with importing(url=server) as importer:
        assert importer.count() == len(TEXTS)
        assert importer.source.name == f"chroma {server}, default_tenant/default_database"


def test_the_key_is_sent_and_a_refusal_names_the_option() -> None:
    keys: list[str | None] = []

    class Refusing(Handler):
        def do_GET(self) -> None:
            keys.append(self.headers.get("X-Chroma-Token"))
            self.send_error(401)

    server = HttpServer(Refusing)
    try:
        message = refuse(url=server.url, api_key="hunter2hunter2")
    finally:
        server.close()
    assert keys == ["hunter2hunter2"]
    assert "api_key" in message
    assert "hunter2" not in message


def test_another_server_is_an_error() -> None:
    class Other(Handler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

    server = HttpServer(Other)
    try:
        assert "does not answer as a Chroma server" in refuse(url=server.url)
    finally:
        server.close()


def test_a_server_that_does_not_answer_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert url in refuse(url=url)
