"""The Haystack example behaves as its README says, with the real model and a real Redis."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from servers import RedisServer

EXAMPLE = Path(__file__).parents[2] / "examples" / "haystack_ingestion"
COUNT = 16
DAY = 24 * 3600

# Each process imports torch, which takes a long time on a busy machine.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def model(minilm_path: Path) -> str:
    return str(minilm_path)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("haystack_ingestion", EXAMPLE / "ingest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_in_process(example: ModuleType, model: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Return a function that runs the example in this process, which has already loaded the libraries."""

    def run(*arguments: str) -> list[str]:
        example.main(["--documents", str(COUNT), "--model", model, *arguments])
        return capsys.readouterr().out.splitlines()

    return run


def run_in_subprocess(model: str, *arguments: str) -> list[str]:
    """Run the example in its own process."""
    command = [sys.executable, EXAMPLE / "ingest.py", "--documents", str(COUNT), "--model", model, *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def unique_texts(example: ModuleType) -> int:
    """Return the number of distinct texts in the documents."""
    documents, _ = example.make_corpus(COUNT)
    assert len(documents) == COUNT
    return len({document.content for document in documents})


def parse_counts(lines: list[str]) -> list[tuple[int, int]]:
    """Return, per line, how many texts went through the model, and how many documents' vectors were found."""
    found = [re.fullmatch(r".{14} *(\d+) through the model, (.*), 0 without, \d+\.\d\d s", line) for line in lines]
    assert all(found), lines
    return [(int(match[1]), sum(map(int, re.findall(r"\d+(?= from)", match[2])))) for match in found if match]


@pytest.mark.usefixtures("patient_disk")
def test_a_restart_computes_only_changes_and_retrieval_stays_the_same(
    run_in_process: Callable[..., list[str]],
    model: str,
    unique_texts: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("INGEST_VECTORS", str(tmp_path / "vectors"))
    assert parse_counts(run_in_subprocess(model)) == [(unique_texts, 0)]
    assert parse_counts(run_in_process("--change", "1")) == [(1, COUNT - 1)]

    printed = run_in_process("--compare")
    assert parse_counts(printed[:5]) == [
        (0, COUNT),
        (COUNT, 0),  # without a cache
        (0, COUNT),
        (0, COUNT),
        (0, COUNT),
    ]
    table = {line[:9].strip(): line[9:].split() for line in printed[7:]}
    assert table["float32"] == table["no cache"]
    assert table["float32"][-1] == "yes"
    assert table["float16"][:-1] == table["float32"][:-1], "the same documents are found, with other scores"

    # A new version embeds everything again. `purge` removes the old vectors.
    monkeypatch.setenv("EMBEDONCE__KEY__VERSION", "v2")
    assert parse_counts(run_in_process()) == [(unique_texts, 0)]
    purge = [sys.executable, "-m", "embedonce", "purge", "--version", "v1", "--yes", "--json", "--config"]
    done = subprocess.run([*purge, EXAMPLE / "embedonce.toml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The documents, the changed document, and the questions.
    assert json.loads(done.stdout)["removed"]["disk"] == unique_texts + 1 + COUNT
    assert parse_counts(run_in_process()) == [(0, COUNT)]


def test_workers_share_the_vectors_in_redis(
    run_in_process: Callable[..., list[str]], model: str, unique_texts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RedisServer() as server:
        monkeypatch.setenv("REDIS_URL", server.url)
        monkeypatch.setenv("INGEST_TIMEOUT", "60s")
        config = ("--config", str(EXAMPLE / "redis.toml"))
        assert parse_counts(run_in_process(*config)) == [(unique_texts, 0)]
        ttls = remaining_ttls(server)
        assert len(ttls) == unique_texts
        assert all(29 * DAY < ttl <= 30 * DAY for ttl in ttls)
        assert parse_counts(run_in_subprocess(model, *config)) == [(0, COUNT)]


def remaining_ttls(server: RedisServer) -> list[Any]:
    """Return the remaining TTL of each vector, in seconds."""
    import redis

    with redis.Redis.from_url(server.url) as client:
        names = [name for name in client.scan_iter("*") if b"card" not in name and b"lease" not in name]
        return [client.ttl(name) for name in names]
