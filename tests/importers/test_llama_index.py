"""Vectors are found in the JSON file of LlamaIndex's embeddings cache, which LlamaIndex has written."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optional import needs

from embedonce.contracts import FoundVectors, deadline
from embedonce.errors import SourceError
from embedonce.testing import ImporterContract, Recipe
from embedonce_importers.llama_index import LlamaIndexImporter

from .stores.llama_index import write

TEXTS = [
    "plain",
    "",
    " spaces ",
    "é ü 漢字 😀",
    'quo"te\\ \\u0041',
    "tab\tand\rreturn",
    "long " * 2000,
    "{[]}",
    "]",
    "a b",
]
WITH_BREAK = "two\nlines"
VECTORS = np.random.default_rng(1).standard_normal((len(TEXTS) + 1, 8)).astype(np.float32)

written = needs("llama_index.core")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write(tmp_path_factory.mktemp("llama-index"), [*TEXTS, WITH_BREAK], VECTORS)


def merge(parts: list[FoundVectors]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Return the vector of each text as float32, and the number of unreadable values by reason."""
    found: dict[str, np.ndarray] = {}
    unreadable: dict[str, int] = {}
    for part in parts:
        found |= {text: np.asarray(vector, np.float32) for text, vector in zip(part.texts, part.vectors, strict=True)}
        for reason, count in part.unreadable.items():
            unreadable[reason] = unreadable.get(reason, 0) + count
    return found, unreadable


def check_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for text, vector in expected.items():
        np.testing.assert_array_equal(found[text], vector)


def write_json(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


@written
def test_a_lookup_finds_the_vectors_that_llama_index_has_cached(options: dict[str, Any]) -> None:
    importer = LlamaIndexImporter(**options)
    importer.check()
    found, unreadable = merge([importer.lookup([*TEXTS, WITH_BREAK, "other", "plain ", "Plain"])])
    check_equal(found, dict(zip([*TEXTS, WITH_BREAK], VECTORS, strict=True)))
    assert not unreadable
    assert importer.count() == len(VECTORS)


@written
def test_a_scan_yields_all_vectors_that_llama_index_has_cached(options: dict[str, Any]) -> None:
    found, unreadable = merge(list(LlamaIndexImporter(**options).scan()))
    check_equal(found, dict(zip([*TEXTS, WITH_BREAK], VECTORS, strict=True)))
    assert not unreadable


@written
def test_a_text_with_a_line_break_is_left_out_unless_the_option_says_what_was_embedded(options: dict[str, Any]) -> None:
    path = options["path"]
    importer = LlamaIndexImporter(path=path)
    for parts in ([importer.lookup([WITH_BREAK])], list(importer.scan())):
        found, unreadable = merge(parts)
        assert WITH_BREAK not in found
        assert "two lines" not in found
        ((reason, count),) = unreadable.items()
        assert count == 1
        assert "line_breaks" in reason
    importer = LlamaIndexImporter(path=path, line_breaks="replaced")
    for parts in ([importer.lookup([WITH_BREAK, "two lines"])], list(importer.scan())):
        found, unreadable = merge(parts)
        assert WITH_BREAK not in found
        np.testing.assert_array_equal(found["two lines"], VECTORS[-1])
        assert not unreadable


@written
@needs("llama_index.embeddings.openai")
def test_openai_embedding_embeds_a_space_in_place_of_a_line_break(monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_index.embeddings.openai import base

    asked: list[str] = []

    class Client:
        class embeddings:
            @staticmethod
            def create(*, input: list[str], **_: Any) -> Any:
                asked.extend(input)

                class Row:
                    embedding = (1.0,)

                class Answer:
                    data = (Row(),) * len(input)

                return Answer

    model = base.OpenAIEmbedding(api_key="x")
    monkeypatch.setattr(model, "_get_client", Client)
    model.get_text_embedding_batch([WITH_BREAK])
    assert asked == ["two lines"]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write_json(tmp_path / "store.json", {"embeddings": {"a": {"u": [1.0, 2.0]}}})
    importer = LlamaIndexImporter(path=path)
    assert importer.lookup(["a", "b"]).texts == ["a"]
    write_json(path, {"embeddings": {"new": {"u": [0.5, 0.5]}, "b": {"u": [3.0, 4.0]}, "a": {"u": [5.0, 6.0]}}})
    found, _ = merge([importer.lookup(["a", "b"])])
    check_equal(found, {"a": np.array([5, 6], np.float32), "b": np.array([3, 4], np.float32)})


def test_a_file_that_changes_while_it_is_read_gives_no_vectors(tmp_path: Path) -> None:
    content = {f"text {number}": {"u": [1.0, 2.0]} for number in range(3000)}
    path = write_json(tmp_path / "store.json", {"embeddings": content})
    parts = LlamaIndexImporter(path=path).scan()
    next(iter(parts))
    write_json(path, {"embeddings": content | {"more": {"u": [1.0, 2.0]}}})
    with pytest.raises(SourceError, match="was changed while it was read"):
        list(parts)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [1.0],
        "x",
        {},
        {"u": []},
        {"u": [[1.0]]},
        {"u": [1.0, None]},
        {"u": [1.0, True]},
        {"u": ["1.0"]},
        {"u": [1.0], "v": [2.0]},
        {"u": {"v": [1.0]}},
        {"u": None},
        {"u": float("nan")},
        {"u": [float("nan")]},
        {"u": [10**400]},
        {"u": "]"},
        {"u": [1.0], "v": "]}"},
    ],
)
def test_a_value_that_is_no_vector_is_counted(value: Any, tmp_path: Path) -> None:
    path = write_json(tmp_path / "store.json", {"embeddings": {"good": {"u": [1.0]}, "bad": value, "last": {"u": [2]}}})
    importer = LlamaIndexImporter(path=path)
    importer.check()
    for parts in ([importer.lookup(["good", "bad", "last"])], list(importer.scan())):
        found, unreadable = merge(parts)
        check_equal(found, {"good": np.array([1], np.float32), "last": np.array([2], np.float32)})
        ((reason, count),) = unreadable.items()
        assert count == 1
        assert "bad" not in reason


def test_the_last_of_two_equal_keys_counts_as_for_llama_index(tmp_path: Path) -> None:
    path = write_json(tmp_path / "store.json", '{"embeddings": {"a": {"u": [1]}, "\\u0061": {"u": [2]}}}')
    importer = LlamaIndexImporter(path=path)
    for parts in ([importer.lookup(["a"])], list(importer.scan())):
        check_equal(merge(parts)[0], {"a": np.array([2], np.float32)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "ends too early"),
        ("[]", "missing at byte 0"),
        ("null", "missing at byte 0"),
        ("{}", "has no collection 'embeddings', because it is empty"),
        ({"data": {}, "vectors": {}}, "it has 'data', 'vectors': set collection to one of them"),
        ({"secret text": {}}, "set collection to one that it has"),
        ({"secret": [1.0]}, "a collection is missing at byte"),
        ({"embeddings": {"secret": [1.0, 2.0]}}, "something other than embeddings"),
        ('{"embeddings": {"secret": {"u": [1.0, 2', "ends too early"),
        ('{"embeddings": {"a": {"u": [1]}}} {"secret": 1}', "something after its end"),
        ('{"embeddings": {"a": {"u": [1]} "secret": 2}}', "not valid JSON at byte"),
        ("\0" * 100, "missing at byte 0"),
        ("SQLite format 3\0", "missing at byte 0"),
    ],
)
def test_a_file_of_another_kind_is_an_error_that_says_what_to_do(content: Any, message: str, tmp_path: Path) -> None:
    path = write_json(tmp_path / "store.json", content)
    importer = LlamaIndexImporter(path=path)

    def read() -> None:
        importer.check()
        list(importer.scan())

    with pytest.raises(SourceError, match=message) as caught:
        read()
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_folder_is_an_error_that_names_the_file_in_it(tmp_path: Path) -> None:
    write_json(tmp_path / "embeddings_cache.json", {})
    with pytest.raises(SourceError, match=r"is a folder; give the file in it .* such as .*embeddings_cache\.json"):
        LlamaIndexImporter(path=tmp_path).check()


def test_an_invalid_option_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='line_breaks must be "kept" or "replaced"'):
        LlamaIndexImporter(path=tmp_path, line_breaks="keep")  # type: ignore[arg-type]


def test_several_threads_look_up_at_once(tmp_path: Path) -> None:
    content = {f"text {number}": {"u": [float(number), 1.0]} for number in range(500)}
    importer = LlamaIndexImporter(path=write_json(tmp_path / "store.json", {"embeddings": content}))
    results: list[FoundVectors] = []
    threads = [threading.Thread(target=lambda: results.append(importer.lookup(list(content)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        check_equal(merge([result])[0], {text: np.array(value["u"], np.float32) for text, value in content.items()})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_looks_up_even_if_a_thread_of_the_parent_held_the_lock(tmp_path: Path) -> None:
    importer = LlamaIndexImporter(path=write_json(tmp_path / "store.json", {"embeddings": {"a": {"u": [1.0]}}}))
    with importer._lock:
        child = os.fork()
        if not child:
            os._exit(0 if importer.lookup(["a"]).texts == ["a"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_lookup_does_not_wait_longer_than_its_time_for_another_thread(tmp_path: Path) -> None:
    importer = LlamaIndexImporter(path=write_json(tmp_path / "store.json", {"embeddings": {"a": {"u": [1.0]}}}))
    with importer._lock, deadline(0.3), pytest.raises(SourceError, match="still being read"):
        importer.lookup(["a"])


@written
class TestContract(ImporterContract):
    examples = 10

    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.made = 0

    def make(self, texts: Sequence[str], vectors: np.ndarray) -> LlamaIndexImporter:
        self.made += 1
        options: dict[str, Any] = write(self.folder / str(self.made), list(texts), vectors)
        return LlamaIndexImporter(**options)

    def recipe(self, importer: LlamaIndexImporter) -> Recipe:
        return Recipe(LlamaIndexImporter, {"path": str(importer._store.path), "line_breaks": "kept"})

    def missing(self) -> tuple[LlamaIndexImporter, str]:
        return LlamaIndexImporter(path=self.folder / "missing"), str(self.folder / "missing")

    def damage(self, importer: LlamaIndexImporter, text: str) -> None:
        path = importer._store.path
        store = json.loads(path.read_bytes())
        store["embeddings"][text] = {"u": [1.0, "x"]}
        write_json(path, store)

    def snapshot(self, importer: LlamaIndexImporter) -> object:
        return {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}
