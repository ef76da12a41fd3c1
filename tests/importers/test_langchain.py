"""The importer ``langchain`` reads what CacheBackedEmbeddings has written to a LocalFileStore."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optional
import pytest

from embedonce.contracts import deadline
from embedonce.errors import ConfigError, SourceError, TierTimeout
from embedonce.testing import ImporterContract, Recipe
from embedonce_importers.langchain import LangChainImporter

from .stores.langchain import write

pytestmark = optional.needs("langchain_classic")

TEXTS = ["first", "", "Grüße 🎉", "a\nb\0", " first ", "x" * 5000]
VECTORS = np.random.default_rng(0).standard_normal((len(TEXTS), 8)).astype(np.float32)


class TestLangChain(ImporterContract):
    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.options: dict[object, dict[str, Any]] = {}

    def make(self, texts: Sequence[str], vectors: Any) -> LangChainImporter:
        options: dict[str, Any] = write(self.folder / f"store {len(self.options)}", texts, vectors)
        importer = LangChainImporter(**options)
        self.options[importer] = options
        return importer

    def can_hold(self, text: str) -> bool:
        return is_encodable(text)

    def recipe(self, importer: Any) -> Recipe:
        return Recipe(LangChainImporter, {**self.options[importer], "path": str(self.options[importer]["path"])})

    def missing(self) -> tuple[LangChainImporter, str]:
        return LangChainImporter(path=self.folder / "missing"), str(self.folder / "missing")

    def damage(self, importer: Any, text: str) -> None:
        options = self.options[importer]
        name = options["namespace"] + hashlib.sha256(text.encode()).hexdigest()
        (options["path"] / name).write_bytes(b"[1.0, ")

    def snapshot(self, importer: Any) -> object:
        return {file.name: file.read_bytes() for file in self.options[importer]["path"].iterdir()}


def is_encodable(text: str) -> bool:
    return text.encode("utf-8", "replace").decode() == text


def make(path: Path, **options: Any) -> LangChainImporter:
    return LangChainImporter(**write(path, TEXTS, VECTORS, **options))  # type: ignore[arg-type]


def read(importer: LangChainImporter, texts: list[str] = TEXTS) -> dict[str, list[float]]:
    found = importer.lookup(texts)
    assert not found.unreadable
    return {text: np.asarray(row, np.float32).tolist() for text, row in zip(found.texts, found.vectors, strict=True)}


EXPECTED = dict(zip(TEXTS, VECTORS.tolist(), strict=True))


@pytest.mark.parametrize("key_encoder", ["sha1", "sha256", "sha512", "blake2b"])
@pytest.mark.parametrize("namespace", ["", "text-embedding-3-small", "BAAI/bge-m3", "a/b/", "./a//b", "..a"])
def test_every_key_encoder_and_namespace_is_read(tmp_path: Path, key_encoder: str, namespace: str) -> None:
    importer = make(tmp_path, key_encoder=key_encoder, namespace=namespace)
    importer.check()
    assert read(importer, [*TEXTS, "not stored", "lone \udc80 surrogate"]) == EXPECTED
    importer.close()
    importer.close()


def test_other_namespaces_and_encoders_find_nothing(tmp_path: Path) -> None:
    make(tmp_path, namespace="one")
    for options in ({"namespace": "two"}, {"namespace": ""}, {"namespace": "on/e"}, {"key_encoder": "sha512"}):
        importer = LangChainImporter(path=tmp_path, **{"namespace": "one", "key_encoder": "sha256", **options})  # type: ignore[arg-type]
        assert read(importer) == {}


def test_a_query_cache_in_the_same_folder_is_mixing() -> None:
    def source_of(query_embedding_cache: bool | None) -> tuple[str | None, bool]:
        source = LangChainImporter(path=Path("x"), query_embedding_cache=query_embedding_cache).source
        return source.task, bool(source.mixing)

    assert source_of(None) == (None, True)
    assert source_of(True) == (None, True)
    assert source_of(False) == ("document", False)


def test_the_source_names_the_folder_and_the_options(tmp_path: Path) -> None:
    name = LangChainImporter(path=tmp_path, namespace="m", key_encoder="sha512").source.name
    assert name == f"langchain: {tmp_path}, namespace='m', key_encoder=sha512"


@pytest.mark.parametrize("namespace", ["../up", "a/../b", "/etc", "model:1", "a b", "ä", "a\n"])
def test_a_namespace_that_langchain_refuses_is_an_error(namespace: str) -> None:
    with pytest.raises(ConfigError, match="namespace must be one that a LocalFileStore accepts"):
        LangChainImporter(path=Path("x"), namespace=namespace)


def test_a_key_encoder_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ConfigError, match="key_encoder must be one of sha1"):
        LangChainImporter(path=Path("x"), key_encoder="md5")  # type: ignore[arg-type]


def test_check_says_what_is_wrong(tmp_path: Path) -> None:
    def check(path: Path, namespace: str, key_encoder: Any = "sha256") -> str:
        with pytest.raises(SourceError) as caught:
            LangChainImporter(path=path, namespace=namespace, key_encoder=key_encoder).check()
        return str(caught.value)

    store = tmp_path / "store"
    assert f"{store} does not exist" in check(store, "")
    make(store, namespace="BAAI/bge-m3")
    make(store, namespace="small", key_encoder="sha1")
    assert "set key_encoder to sha256" in check(store, "BAAI/bge-m3", "sha1")
    assert "set key_encoder to sha1" in check(store, "small")
    assert check(store, "large").endswith("It has files with these namespaces: 'BAAI/bge-m3', 'small'")
    assert "It has files with these namespaces" in check(store, "BAAI/other")
    assert "set path to the folder of the LocalFileStore" in check(store / "BAAI", "none/")
    (store / "link").symlink_to(store / "BAAI")
    assert "has something that is not a folder, such as a link" in check(store, "link/bge-m3")
    (tmp_path / "empty").mkdir()
    assert "has no file of LangChain with the namespace ''" in check(tmp_path / "empty", "")


def test_a_missing_folder_is_an_error_of_a_lookup(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist; check the path"):
        LangChainImporter(path=tmp_path / "missing").lookup(["a"])


def test_damaged_and_hostile_files_are_counted_and_have_no_vector(tmp_path: Path) -> None:
    importer = make(tmp_path / "store")
    files = sorted((tmp_path / "store").iterdir())
    secret = tmp_path / "secret"
    secret.write_text("[1.0, 2.0]")
    content = files[0].read_bytes()
    files[0].write_bytes(content[:-10])
    files[1].unlink()
    files[1].symlink_to(secret)
    files[2].unlink()
    os.mkfifo(files[2])
    files[3].write_bytes(b"[" + b"1.5," * 2**20 + b"1.5]")
    files[4].write_bytes(json.dumps({"vector": [1.0]}).encode())
    found = importer.lookup(TEXTS)
    assert len(found.texts) == 1
    assert np.asarray(found.vectors[0], np.float32).tolist() == EXPECTED[found.texts[0]]
    assert found.unreadable == {
        "truncated or invalid JSON": 1,
        "a symbolic link": 1,
        "not a regular file": 1,
        "larger than 1 MiB": 1,
        "not a JSON list of numbers": 1,
    }


def test_a_lookup_ends_at_its_deadline(tmp_path: Path) -> None:
    importer = make(tmp_path)
    with pytest.raises(TierTimeout), deadline(0.0):
        importer.lookup(TEXTS)


def test_nothing_in_the_folder_changes(tmp_path: Path) -> None:
    importer = make(tmp_path)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.iterdir()}
    importer.check()
    read(importer)
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.iterdir()} == before
