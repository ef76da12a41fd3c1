"""Every importer in both modes: a store that the real package has written is imported at once, and on demand.

The provider is counted: apart from the texts of a verification, it is never called.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import optional
import pytest
from importers.redis_sources import make_database
from typer.testing import CliRunner

import embedonce
from embedonce import plugins
from embedonce.cli import app
from embedonce_providers.ngram import NgramProvider

TEXTS = [f"Passage {number}: Grüße & more.\nA second line, {'x' * number}" for number in range(60)]
NEW = "a text that no store has"
DIMENSIONS = 16


@dataclass(frozen=True)
class Case:
    """How to write a store, and how to import it. ``place`` is where the store is."""

    type: str
    place: str
    needs: str = "numpy"
    module: str = ""
    write: str = "write"
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)

    def write_store(self, place: Any, vectors: Any) -> dict[str, Any]:
        store = import_module(f"importers.stores.{self.module or self.type.replace('-', '_')}")
        options: dict[str, Any] = getattr(store, self.write)(place, TEXTS, vectors, **self.arguments)
        return {**options, **self.options}


CASES = [
    Case("langchain", "folder", "langchain_classic"),
    Case("langchain", "folder", "langchain_classic", arguments={"key_encoder": "sha1", "namespace": ""}),
    Case("langchain-redis", "redis", "langchain_community"),
    Case("langchain-pgvector", "postgres", "langchain_postgres"),
    Case("llama-index", "folder", "llama_index.core"),
    Case("llama-index-redis", "redis", "llama_index.core"),
    Case("llama-index-ingestion", "folder", "llama_index.core"),
    Case(
        "llama-index-ingestion", "redis", "llama_index.core", write="write_to_redis", arguments={"collection": "cache"}
    ),
    Case("redisvl", "redis", "redisvl"),
    Case("litellm-redis", "redis", "litellm"),
    Case("dify", "postgres", "psycopg"),
    Case("dify", "redis", "psycopg"),
    Case("chroma", "folder", "chromadb"),
    Case("qdrant", "qdrant", "qdrant_client"),
    Case("vdf", "folder", "pyarrow"),
    Case("table", "folder", "pyarrow"),
    Case("sqlite", "file"),
    Case("diskcache", "folder"),
    Case("postgres", "postgres", "psycopg"),
    Case("redis", "redis", "redis"),
]


def test_every_importer_has_a_case() -> None:
    assert {case.type for case in CASES} == set(plugins.installed_by_embedonce("embedonce.importers"))


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the provider was called with."""
    texts: list[str] = []
    embed = NgramProvider.embed

    def count(self: NgramProvider, some: Sequence[str], task: str) -> Any:
        texts.extend(some)
        return embed(self, some, task)

    monkeypatch.setattr(NgramProvider, "embed", count)
    return texts


@pytest.fixture
def vectors() -> Any:
    return NgramProvider(dimensions=DIMENSIONS).embed(TEXTS, "document")


@pytest.fixture(params=CASES, ids=lambda case: f"{case.type}-{case.place}")
def options(request: pytest.FixtureRequest, tmp_path: Path, vectors: Any) -> Iterator[tuple[Case, dict[str, Any]]]:
    """A case, and the options that import its store, which was written by the real package."""
    case: Case = request.param
    if not _is_available(case):
        pytest.skip(f"make quick does not install {case.needs}")
    with _open_place(case, request, tmp_path) as place:
        yield case, case.write_store(place, vectors)


def _is_available(case: Case) -> bool:
    if not optional.QUICK:
        return True
    return case.place in ("folder", "file") and importlib.util.find_spec(case.needs.partition(".")[0]) is not None


@contextmanager
def _open_place(case: Case, request: pytest.FixtureRequest, folder: Path) -> Iterator[Any]:
    if case.place == "folder":
        yield folder / "store"
    elif case.place == "file":
        yield folder / "store.db"
    elif case.place == "redis":
        yield make_database(request.getfixturevalue("redis_server"))
    elif case.place == "postgres":
        yield request.getfixturevalue("postgres_server").url
    else:
        from importers.stores.qdrant import serve

        with serve() as (url, _):
            yield url


def _write_config(folder: Path) -> Path:
    file = folder / "embedonce.toml"
    file.write_text(
        f'''
[provider]
type = "ngram"
dimensions = {DIMENSIONS}
[[tiers]]
type = "disk"
path = "{folder / "vectors"}"
'''
    )
    return file


def _run_import(case: Case, options: dict[str, Any], folder: Path, *more: str) -> Any:
    given = dict(options)
    location = given.pop("url", None) or given.pop("path")
    arguments = ["import", str(location), "--from", case.type, "--config", str(_write_config(folder)), "--json", *more]
    for name, value in given.items():
        arguments += ["--option", f"{name}={json.dumps(value) if isinstance(value, bool | list) else value}"]
    if not hasattr(plugins.importer(case.type), "scan"):
        texts = folder / "texts.jsonl"
        texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        arguments += ["--texts", str(texts), "--field", "text"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_store_is_imported_at_once(
    options: tuple[Case, dict[str, Any]], tmp_path: Path, vectors: Any, embedded: list[str]
) -> None:
    case, given = options
    summary = _run_import(case, given, tmp_path)
    assert (summary["imported"], summary["verified"]) == (len(TEXTS), 20)
    assert len(embedded) == 20
    again = _run_import(case, given, tmp_path, "--verify", "0")
    assert (again["imported"], again["already_there"]) == (0, len(TEXTS))
    with embedonce.open(tmp_path / "embedonce.toml") as cache:
        fetched = cache.fetch(TEXTS)
        assert set(fetched.sources) == {"disk"}
        assert np.array_equal(fetched.vectors, vectors)
    assert len(embedded) == 20


def test_a_store_is_imported_on_demand(
    options: tuple[Case, dict[str, Any]], tmp_path: Path, vectors: Any, embedded: list[str]
) -> None:
    case, given = options
    config = {
        "provider": {"type": "ngram", "dimensions": DIMENSIONS},
        "tiers": [{"type": "disk", "path": str(tmp_path / "vectors")}],
        "imports": [{"type": case.type, "timeout": 60, **{name: _to_toml(value) for name, value in given.items()}}],
    }
    with embedonce.open(config) as cache:
        assert cache.check_importers()[0].detail == ""
        name = cache.importers[0]
        fetched = cache.fetch([*TEXTS, NEW])
        assert fetched.sources.count(name) == len(fetched.imported) == len(TEXTS) - 20
        assert np.array_equal(fetched.vectors[:-1], vectors)
        assert len(embedded) == 21
        assert cache.stats().importers[name].verification == "verified"
    with embedonce.open(config) as cache:
        assert set(cache.fetch([*TEXTS, NEW]).sources) == {"disk"}
        cache.forget(TEXTS)
        assert cache.fetch(TEXTS).imported == set(range(len(TEXTS)))
    assert len(embedded) == 21


def _to_toml(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
