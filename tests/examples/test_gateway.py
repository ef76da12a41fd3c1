"""The gateway example behaves as its README says, with a real Postgres."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from servers import PostgresServer, wait_until

import embedonce
from embedonce.config import load

FOLDER = Path(__file__).parents[2] / "examples" / "gateway"
CONFIG = FOLDER / "embedonce.toml"
TEXTS = [f"What may a gateway keep of customer {i}?" for i in range(20)]


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer("-c", "log_statement=all", "-c", "log_parameter_max_length=0") as server:
        yield server


@pytest.fixture(autouse=True)
def environment(postgres: PostgresServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give each test its own table and a longer timeout, for busy machines. Return the table's name."""
    table = request.node.name[-50:]  # Postgres allows 63 characters
    monkeypatch.setenv("GATEWAY_POSTGRES_URL", postgres.url)
    monkeypatch.setenv("GATEWAY_TABLE", table)
    monkeypatch.setenv("GATEWAY_TIMEOUT", "60s")
    monkeypatch.setenv("EMBEDONCE__CACHE__FLUSH_TIMEOUT", "60s")
    return table


def count_statements(server: PostgresServer) -> int:
    """Return the number of statements that the server has logged."""
    log = (server.folder / "log").read_text(errors="replace")
    return len(re.findall(r"LOG:  (?:execute [^:]*|statement):", log))


def test_the_script_prints_what_the_readme_says() -> None:
    done = subprocess.run([sys.executable, FOLDER / "gateway.py"], capture_output=True, text=True, check=False)
    print(done.stdout)  # shows the times if pytest runs with -s
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    shown = re.sub(r"\d+\.\d+ (ms|µs)", r"# \1", done.stdout)
    assert (
        shown
        == """\
first      from provider, # ms
again      from memory, # µs
restarted  from postgres, # ms
again      from memory: it was promoted
WARNING embedonce: provider 'ngram' is failing; using 'fallback:ngram', which has its own vector space
no model   from provider, in another space: 256 dimensions
           what is cached is still served: from memory
no store   from provider, # ms
no store   from provider, # ms
WARNING embedonce: tier 'postgres': reads are failing (OperationalError); skipping it until a probe succeeds
no store   from provider, # ms
no store   from provider, # ms
"""
    )


def test_the_layers_are_as_described() -> None:
    memory, postgres = load(CONFIG).tiers
    assert (memory.type, memory.options["max_entries"], memory.options["policy"]) == ("memory", 2048, "lru")
    assert (postgres.type, postgres.options["column"], postgres.write) == ("postgres", "vector", "background")
    assert not postgres.options["text_preview"]


def test_a_hit_after_a_restart_is_one_query_and_is_promoted(postgres: PostgresServer, environment: str) -> None:
    with embedonce.open(CONFIG) as cache:
        expected = cache.embed_batch(TEXTS)
    with embedonce.open(CONFIG) as cache:
        cache.lookup(["connects, and looks at the table"])
        for number, text in enumerate(TEXTS):
            before = count_statements(postgres)
            fetched = cache.fetch([text])
            assert fetched.sources == ["postgres"]
            assert (fetched.vectors[0] == expected[number]).all()
            assert count_statements(postgres) == before + 1
        before = count_statements(postgres)
        fetched = cache.fetch(TEXTS)
        assert fetched.sources == ["memory"] * len(TEXTS)
        assert (fetched.vectors == expected).all()
        assert count_statements(postgres) == before
        assert cache.stats().providers["ngram"].texts == 0
    with embedonce.open(CONFIG) as cache:
        cache.lookup(["connects, and looks at the table"])
        before = count_statements(postgres)
        assert cache.fetch(TEXTS).sources == ["postgres"] * len(TEXTS)
        assert count_statements(postgres) == before + 1, "a batch is one query too"


def test_vectors_are_in_a_pgvector_column_once_each(postgres: PostgresServer, environment: str) -> None:
    for _ in range(2):  # writing a second time changes nothing
        with embedonce.open(CONFIG) as cache:
            cache.embed_batch(TEXTS)
    statement = f"SELECT count(*), min(vector_dims(embedding)) FROM {environment} WHERE embedding IS NOT NULL"
    assert postgres.call(statement) == f"{len(TEXTS)}|384"


def test_no_text_is_stored_by_default(
    postgres: PostgresServer, environment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = f"SELECT count(*) FROM {environment} AS held WHERE held::text LIKE '%customer%'"
    with embedonce.open(CONFIG) as cache:
        cache.embed_batch(TEXTS)
    assert postgres.call(found) == "0"
    monkeypatch.setenv("GATEWAY_TEXT_PREVIEW", "true")
    long = "A customer of long standing. " * 20
    with embedonce.open(CONFIG) as cache:
        cache.embed(long)
    assert postgres.call(found) == "1"
    assert postgres.call(f"SELECT text_preview FROM {environment} WHERE text_preview IS NOT NULL") == long[:200]


def test_the_fallback_answers_in_its_own_space(environment: str) -> None:
    down = ConnectionError("the model is not reachable")
    with embedonce.open(CONFIG) as cache:
        cached = cache.embed_batch(TEXTS[:1])
        with patch.object(cache.provider, "embed", side_effect=down):
            fetched = cache.fetch(TEXTS[1:3])
            assert fetched.vectors.shape == (2, 256)
            assert fetched.space.dimensions == 256
            with pytest.raises(ConnectionError):
                cache.embed(TEXTS[1])
            assert (cache.embed_batch(TEXTS[:1]) == cached).all()
            # One answer never mixes spaces: the fallback computes again what is cached in the model's space.
            assert cache.fetch(TEXTS[:2]).vectors.shape == (2, 256)
        assert cache.fetch(TEXTS[1:3]).vectors.shape == (2, 384)


def test_without_postgres_texts_are_computed_and_a_warning_is_logged_once(
    environment: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with PostgresServer() as server:
        monkeypatch.setenv("GATEWAY_POSTGRES_URL", server.url)
        with embedonce.open(CONFIG) as cache:
            expected = cache.embed_batch(TEXTS)
            assert cache.flush()
            server.kill_all()  # a remaining session would go on answering for a moment
            for number in range(10):
                assert cache.fetch([f"new {number}"]).sources == ["provider"]
            assert (cache.embed_batch(TEXTS) == expected).all()
            warned = [record.getMessage() for record in caplog.records if "postgres" in record.getMessage()]
            assert len([message for message in warned if "reads are failing" in message]) == 1
            # Reads and writes fail separately: one line each, and one for the write that failed first.
            assert len(warned) <= 3
            assert not any("new" in message for message in warned)
            server.restart()
            number = iter(range(10_000))
            wait_until(lambda: "postgres" not in cache.lookup([f"is it back? {next(number)}"]).errors, "it is used")
        with embedonce.open(CONFIG) as cache:
            assert set(cache.fetch(TEXTS).sources) == {"postgres"}


def test_a_failed_write_is_a_warning(environment: str, caplog: pytest.LogCaptureFixture) -> None:
    with PostgresServer() as server, patch.dict(os.environ, GATEWAY_POSTGRES_URL=server.url):
        with embedonce.open(CONFIG) as cache:
            cache.embed(TEXTS[0])
        server.call("ALTER DATABASE postgres SET default_transaction_read_only = on")
        with embedonce.open(CONFIG) as cache:
            assert np.isfinite(cache.embed(TEXTS[1])).all()
    assert "write" in caplog.text
