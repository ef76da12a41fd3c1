"""The importer ``diskcache`` reads what diskcache has written, and runs no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import diskcache
import numpy as np
import pytest

from embedonce.contracts import FoundVectors, deadline
from embedonce.errors import ConfigError, SourceError, TierTimeout
from embedonce.testing import ImporterContract, Recipe
from embedonce_importers.diskcache import DiskcacheImporter

from .stores.diskcache import write

TEXTS = ["first", "", "Grüße 🎉", "a\nb", " first "]
VECTORS = np.random.default_rng(0).standard_normal((len(TEXTS), 8)).astype(np.float32)
EXPECTED = dict(zip(TEXTS, VECTORS.tolist(), strict=True))
PLAIN = '"{text}"'


class TestDiskcache(ImporterContract):
    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.paths: dict[object, Path] = {}

    def make(self, texts: Sequence[str], vectors: Any) -> DiskcacheImporter:
        path = self.folder / f"store {len(self.paths)}"
        write(path, texts, vectors)
        importer = DiskcacheImporter(path=path)
        self.paths[importer] = path
        return importer

    def can_hold(self, text: str) -> bool:
        return text.encode("utf-8", "replace").decode() == text

    def recipe(self, importer: Any) -> Recipe:
        return Recipe(DiskcacheImporter, {"path": str(self.paths[importer])})

    def missing(self) -> tuple[DiskcacheImporter, str]:
        return DiskcacheImporter(path=self.folder / "missing"), str(self.folder / "missing")

    def damage(self, importer: Any, text: str) -> None:
        store(self.paths[importer], {hashlib.sha256(text.encode()).hexdigest(): ("not", "a", "list")})

    def snapshot(self, importer: Any) -> object:
        return (self.paths[importer] / "cache.db").read_bytes()


def make(path: Path, **options: Any) -> DiskcacheImporter:
    return DiskcacheImporter(path=path, **options)


def listed(found: FoundVectors) -> dict[str, list[float]]:
    return {text: np.asarray(row, np.float32).tolist() for text, row in zip(found.texts, found.vectors, strict=True)}


def read(importer: DiskcacheImporter, texts: Sequence[str] = TEXTS) -> dict[str, list[float]]:
    found = importer.lookup(texts)
    assert not found.unreadable
    return listed(found)


def store(path: Path, values: dict[Any, Any], **settings: Any) -> None:
    with closing(diskcache.Cache(str(path), **settings)) as cache:
        for key, value in values.items():
            cache[key] = value


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_fanout", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"disk_min_file_size": 0}, {"disk_pickle_protocol": 2}], ids=["rows", "files", "protocol-2"]
)
def test_a_cache_is_read_from_rows_and_files(tmp_path: Path, is_fanout: bool, settings: dict[str, int]) -> None:
    options: dict[str, Any] = write(tmp_path, TEXTS, VECTORS, is_fanout=is_fanout, **settings)
    importer = make(**options)
    importer.check()
    assert read(importer, [*TEXTS, "not stored", "lone \udc80 surrogate"]) == EXPECTED
    importer.close()
    importer.close()
    assert list(tmp_path.rglob("*.val")) if "disk_min_file_size" in settings else True


def test_a_vector_above_32_kb_is_read_from_its_file(tmp_path: Path) -> None:
    vectors = np.random.default_rng(1).standard_normal((1, 8192)).astype(np.float32)
    write(tmp_path, ["text"], vectors)
    assert len(list(tmp_path.rglob("*.val"))) == 1
    assert read(make(tmp_path), ["text"]) == {"text": vectors[0].tolist()}


@pytest.mark.parametrize("size", [0, 2**15], ids=["files", "rows"])
def test_bytes_and_text_are_read_in_the_form_of_the_option(tmp_path: Path, size: int) -> None:
    store(tmp_path, {"text": json.dumps([1.5, 2])}, disk_min_file_size=size)
    assert read(make(tmp_path, key=PLAIN, value="json"), ["text"]) == {"text": [1.5, 2]}
    store(tmp_path, {"text": np.float32([1.5, 2]).tobytes()}, disk_min_file_size=size)
    assert read(make(tmp_path, key=PLAIN, value="float32"), ["text"]) == {"text": [1.5, 2]}
    assert make(tmp_path, key=PLAIN, value="json").lookup(["text"]).unreadable == {"not a JSON list of numbers": 1}


def test_keys_are_made_as_the_options_say(tmp_path: Path) -> None:
    store(tmp_path, {"v1:m:hello": [1.0]})
    importer = make(tmp_path, key='"v1:{model}:{text}"', model="m", steps=["strip", "lower"])
    assert read(importer, ["Hello ", "hello", "other"]) == {"Hello ": [1], "hello": [1]}
    with pytest.raises(ConfigError, match="key, column 1"):
        make(tmp_path, key="text")


def test_values_that_are_no_lists_of_floats_are_counted_and_not_run(tmp_path: Path) -> None:
    target = tmp_path / "made by a pickle"
    values = {
        "good": [1.0, 2],
        "number": 1.5,
        "none": None,
        "array": np.ones(3),
        "nested": [[1.0]],
        "harmful": Harmful(target),
        "harmful list": [Harmful(target)],
        "harmful file": [Harmful(target), "x" * 2**16],
        "large": [0.5] * 200_000,
    }
    store(tmp_path / "cache", values)
    found = make(tmp_path / "cache", key=PLAIN).lookup(list(values))
    assert listed(found) == {"good": [1, 2]}
    assert found.unreadable == {
        "a number in place of a vector": 1,
        "not a pickled list of floats": 6,
        "larger than 1 MiB": 1,
    }
    assert not target.exists()


def test_entries_that_have_expired_are_left_out(tmp_path: Path) -> None:
    with closing(diskcache.Cache(str(tmp_path))) as cache:
        cache.set("old", [1.0], expire=-1)
        cache.set("new", [2.0], expire=1000)
    assert read(make(tmp_path, key=PLAIN), ["old", "new"]) == {"new": [2]}


def test_files_outside_of_the_folder_are_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    names = [f"text {number}" for number in range(7)]
    store(folder, dict.fromkeys(names, json.dumps([1.0])), disk_min_file_size=0)
    (tmp_path / "secret").write_text("[9.0]")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "below").symlink_to(tmp_path)
    os.mkfifo(folder / "fifo")
    filenames = ["../secret", str(tmp_path / "secret"), "link", "below/secret", "..\\secret", "fifo", "missing/file"]
    with closing(sqlite3.connect(folder / "cache.db")) as connection, connection:
        for name, filename in zip(names, filenames, strict=True):
            connection.execute("UPDATE Cache SET filename = ? WHERE key = ?", (filename, name))
    found = make(folder, key=PLAIN, value="json").lookup(names)
    assert not found.texts
    assert found.unreadable == {
        "not a name of a folder": 3,
        "in something that is not a folder": 1,
        "a symbolic link": 1,
        "not a regular file": 1,
        "the file of the value is missing": 1,
    }


def test_check_says_what_is_wrong(tmp_path: Path) -> None:
    def check(path: Path) -> str:
        with pytest.raises(SourceError) as caught:
            make(path).check()
        return str(caught.value)

    assert "does not exist; check the path" in check(tmp_path / "missing")
    assert "has no cache.db, and no folder 000 of a FanoutCache" in check(tmp_path)
    store(tmp_path / "cache", {("a", "tuple"): [1.0]})
    assert "has no keys that are strings" in check(tmp_path / "cache")
    assert "is a file, not a folder; give the folder of the store" in check(tmp_path / "cache" / "cache.db")
    (tmp_path / "other").mkdir()
    with closing(sqlite3.connect(tmp_path / "other" / "cache.db")) as connection, connection:
        connection.execute("CREATE TABLE caches (key)")
    assert 'has no table "Cache"; did you mean "caches"?' in check(tmp_path / "other")
    (tmp_path / "fanout").mkdir()
    (tmp_path / "fanout" / "000").symlink_to(tmp_path / "cache")
    assert "000 is a symbolic link, not a folder" in check(tmp_path / "fanout")
    with closing(diskcache.Cache(str(tmp_path / "empty"))):
        pass
    make(tmp_path / "empty").check()


def test_a_cache_in_use_is_read_and_its_entries_stay(tmp_path: Path) -> None:
    with closing(diskcache.Cache(str(tmp_path))) as cache:
        cache["a"] = [1.0]
        importer = make(tmp_path, key=PLAIN)
        assert read(importer, ["a", "b"]) == {"a": [1]}
        cache["b"] = [2.0]
        assert read(importer, ["a", "b"]) == {"a": [1], "b": [2]}
        before = (tmp_path / "cache.db").read_bytes()
        importer.check()
        importer.close()
        assert (tmp_path / "cache.db").read_bytes() == before
        assert cache["a"] == [1.0]


def test_a_lookup_ends_at_its_deadline(tmp_path: Path) -> None:
    write(tmp_path, TEXTS, VECTORS)
    with pytest.raises(TierTimeout), deadline(0.0):
        make(tmp_path).lookup(TEXTS)


def test_the_source_names_the_folder_and_the_options(tmp_path: Path) -> None:
    name = make(tmp_path, key='"{model}{text}"', model="m").source.name
    assert name == f'diskcache: {tmp_path}, key "{{model}}{{text}}", model m, value=pickled-list'
