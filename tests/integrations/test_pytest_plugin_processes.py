"""Sessions of the pytest plugin in processes of their own: pytest-xdist, a crash, and a session without it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from optional import needs

from embedonce.testing.servers.openai import OpenAIServer

TESTS = """
import os
import pytest
from embedonce import Cache
from embedonce_backends.memory import MemoryBackend

def embed(texts):
    if os.environ.get("PAID") == "no":
        raise AssertionError("the provider was called")
    return [[float(len(text)), 1.0] for text in texts]

cache = Cache(embed, [MemoryBackend()], space={"model": "lengths", "revision": "1"})

@pytest.mark.parametrize("number", range(6))
def test_number(number):
    cache.embed_batch(["shared", "x" * number])

async def test_async():
    await cache.aembed("in a task")
"""

CRASH = """
import os
import time

def test_crash():
    cache.embed("before the crash")
    if os.environ.get("CRASH") == "yes":
        os._exit(3)
"""

PLUGINS = ("embedonce_integrations.pytest", "no:cacheprovider", "pytest_asyncio.plugin", "xdist")
OPTIONS = [part for name in PLUGINS for part in ("-p", name)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\ntestpaths = ["tests"]\nasyncio_mode = "auto"\n'
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_numbers.py").write_text(TESTS)
    return tmp_path


def run(folder: Path, *args: str, **variables: str) -> str:
    """Run pytest and return its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-q", *args]
    done = subprocess.run(command, cwd=folder, env={**environment, **variables}, capture_output=True, text=True)
    return done.stdout + done.stderr


@needs("pyarrow")
def test_workers_record_into_one_bundle_and_replay_it(folder: Path) -> None:
    shown = run(folder, *OPTIONS, "-n2", "--embedonce=record")
    assert "embedonce: recorded 8 texts in tests/embeddings (8 new, 0 removed)" in shown
    assert "7 passed" in run(folder, *OPTIONS, "-n0", EMBEDONCE_MODE="replay", PAID="no")
    tests = folder / "tests/test_numbers.py"
    tests.write_text(TESTS.replace('"in a task"', '"changed"'))
    shown = run(folder, *OPTIONS, "-n2", "--dist=loadfile", "--embedonce=replay", PAID="no")
    assert "1 failed, 6 passed" in shown
    assert "\ntests/test_numbers.py::test_async: the text at position 0 of its call is not in the bundle" in shown
    shown = run(folder, *OPTIONS, "-n2", "--embedonce=record")
    assert "embedonce: recorded 8 texts in tests/embeddings (1 new, 1 removed)" in shown


FORK = """
import multiprocessing

def count_values(text):
    return cache.embed(text).size

def test_fork():
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(count_values, ["in", "forked", "processes"]) == [2, 2, 2]
"""


@needs("pyarrow")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
@pytest.mark.parametrize("workers", ["-n0", "-n1"])
def test_forked_processes_are_recorded(folder: Path, workers: str) -> None:
    (folder / "tests/test_numbers.py").write_text(TESTS[: TESTS.index("@pytest")] + FORK)
    assert "recorded 3 texts in tests/embeddings (3 new, 0 removed)" in run(
        folder, *OPTIONS, workers, "--embedonce=record"
    )
    assert "1 passed" in run(folder, *OPTIONS, workers, "--embedonce=replay", PAID="no")


@needs("pyarrow")
def test_what_a_worker_has_recorded_outlives_its_crash(folder: Path) -> None:
    (folder / "tests/test_numbers.py").write_text(TESTS + CRASH)
    shown = run(folder, *OPTIONS, "-n1", "--embedonce=record", CRASH="yes")
    assert re.search(r"1 failed, 7 passed|crashed", shown)
    assert "embedonce: recorded 8 texts in tests/embeddings (8 new, 0 removed)" in shown
    assert "and kept because" not in shown


UNUSED = """
import sys

def test_nothing_is_imported():
    ours = [name for name in sys.modules if name.partition(".")[0] in ("embedonce", "numpy")]
    assert ours == []
    assert sorted(name for name in sys.modules if name.startswith("embedonce_")) == {expected}
"""


def test_a_session_that_does_not_use_the_plugin_imports_nothing(tmp_path: Path) -> None:
    expected = ["embedonce_integrations", "embedonce_integrations.pytest"]
    (tmp_path / "test_unused.py").write_text(UNUSED.format(expected=expected))
    assert "1 passed" in run(tmp_path, "-p", "embedonce_integrations.pytest", "-p", "no:cacheprovider")


def test_the_plugin_can_be_switched_off(folder: Path) -> None:
    site = folder / "site"
    info = site / "embedonce_plugin-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: embedonce-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[pytest11]\nembedonce = embedonce_integrations.pytest\n")
    variables = {"PYTEST_PLUGINS": "", "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    assert "--embedonce" in run(folder, "-p", "embedonce", "--help", **variables)
    assert "--embedonce" not in run(folder, "-p", "no:embedonce", "--help", **variables)


API = """
[provider]
type = "openai"
model = "text-embedding-3-small"
base_url = "${API_URL:-http://127.0.0.1:9/v1}"
endpoint_name = "api"
max_retries = 0

[[tiers]]
type = "memory"

[[tiers]]
type = "disk"
path = "cache"
"""

ASKS = """
def test_api(embedonce_cache):
    assert embedonce_cache.embed_batch(["one", "two", "one"]).shape == (3, 16)
"""


@needs("pyarrow")
@needs("openai")
def test_what_an_api_was_paid_for_is_replayed_without_the_api_and_without_a_key(folder: Path) -> None:
    (folder / "embedonce.toml").write_text(API)
    (folder / "tests/test_numbers.py").write_text(ASKS)
    plugin = ("-p", "embedonce_integrations.pytest", "-p", "pytest_asyncio.plugin", "-p", "no:cacheprovider")
    with OpenAIServer() as server:
        paid = {"API_URL": server.base_url, "OPENAI_API_KEY": "a-key"}
        assert "recorded 2 texts in tests/embeddings (2 new, 0 removed)" in run(
            folder, *plugin, "--embedonce=record", **paid
        )
        assert server.texts == 2
        shutil.rmtree(folder / "cache")
        assert "has all 2 texts that the tests need" in run(folder, *plugin, "--embedonce=record", **paid)
        assert server.texts == 2, "what is recorded is not paid for again"
    shutil.rmtree(folder / "cache")
    assert "1 passed" in run(folder, *plugin, "--embedonce=replay")
    assert not (folder / "cache").exists(), "replay reads no disk tier"


def test_without_pyarrow_the_plugin_loads_and_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "hide_pyarrow.py").write_text("import sys\n\nsys.modules['pyarrow'] = None\n")
    (tmp_path / "test_one.py").write_text("def test_one(): pass\n")
    plugins = ("-p", "hide_pyarrow", "-p", "embedonce_integrations.pytest", "-p", "no:cacheprovider")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert "1 passed" in run(tmp_path, *plugins, PYTHONPATH=path)
    shown = run(tmp_path, *plugins, "--embedonce=replay", PYTHONPATH=path)
    assert "--embedonce cannot be used: " in shown
    assert "embedonce[bundle]" in shown
