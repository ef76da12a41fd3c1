"""The Haystack example does what its README says, with the real model, and a real Redis."""

from __future__ import annotations

import importlib.util
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

# Each process imports torch, which takes a busy machine a while.
pytestmark = pytest.mark.timeout(300)


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
def here(example: ModuleType, model: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Run the example in this process, which has the libraries loaded."""

    def run(*arguments: str) -> list[str]:
        example.main(["--documents", str(COUNT), "--model", model, *arguments])
        return capsys.readouterr().out.splitlines()

    return run


def elsewhere(model: str, *arguments: str) -> list[str]:
    """Run the example in a process of its own."""
    command = [sys.executable, EXAMPLE / "ingest.py", "--documents", str(COUNT), "--model", model, *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def unique(example: ModuleType) -> int:
    """How many texts the documents have: some say the same."""
    documents, _ = example.corpus(COUNT)
    assert len(documents) == COUNT
    return len({document.content for document in documents})


def told(line: str) -> tuple[int, str]:
    """Return how many texts went through the model, and where the rest came from."""
    found = re.fullmatch(r".{14} *(\d+) through the model, (.*), 0 without, \d+\.\d\d s", line)
    assert found, line
    return int(found[1]), found[2]


def test_a_restart_computes_what_has_changed_and_nothing_is_lost_in_retrieval(
    here: Callable[..., list[str]], model: str, unique: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INGEST_VECTORS", str(tmp_path / "vectors"))
    assert [told(line) for line in elsewhere(model)] == [(unique, "0 from the cache")]
    assert [told(line) for line in here("--change", "1")] == [(1, f"{COUNT - 1} from disk")]

    printed = here("--compare")
    assert [told(line) for line in printed[:5]] == [
        (0, f"{COUNT} from disk"),
        (COUNT, "0 from the cache"),  # as it is without us
        (0, f"{COUNT} from memory"),
        (0, f"{COUNT} from disk"),
        (0, f"{COUNT} from disk"),
    ]
    table = {line.split()[0]: line.split()[1:] for line in printed[7:]}
    assert table["float32"] == table[["no", "cache"][0]][1:]
    assert table["float32"][-1] == "yes"
    assert float(table["float16"][0]) == float(table["float32"][0])

    # A new version embeds everything, and leaves what was there to `purge`.
    monkeypatch.setenv("EMBEDONCE__KEY__VERSION", "v2")
    assert [told(line) for line in here()] == [(unique, "0 from the cache")]
    purge = [sys.executable, "-m", "embedonce", "purge", "--version", "v1", "--yes", "--config"]
    done = subprocess.run([*purge, EXAMPLE / "embedonce.toml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [told(line) for line in here()] == [(0, f"{COUNT} from disk")]
    monkeypatch.setenv("EMBEDONCE__KEY__VERSION", "v1")
    assert [told(line) for line in here()] == [(unique, "0 from the cache")]


def test_workers_share_what_is_in_redis(
    here: Callable[..., list[str]], model: str, unique: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RedisServer() as server:
        monkeypatch.setenv("REDIS_URL", server.url)
        monkeypatch.setenv("INGEST_TIMEOUT", "20s")
        config = ("--config", str(EXAMPLE / "redis.toml"))
        assert [told(line) for line in here(*config)] == [(unique, "0 from the cache")]
        ttls = remaining(server)
        assert len(ttls) == unique
        assert all(29 * DAY < ttl <= 30 * DAY for ttl in ttls)
        assert [told(line) for line in elsewhere(model, *config)] == [(0, f"{COUNT} from redis")]


def remaining(server: RedisServer) -> list[Any]:
    """Return the seconds that each vector has left."""
    import redis

    with redis.Redis.from_url(server.url) as client:
        names = [name for name in client.scan_iter("*") if b"card" not in name and b"lease" not in name]
        return [client.ttl(name) for name in names]
