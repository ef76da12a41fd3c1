"""A project with tests of its own, which the tests of the pytest plugin run."""

from __future__ import annotations

from pathlib import Path

import pytest
from optional import QUICK

from embedonce.vectors import Entry

if not QUICK:
    from embedonce_backends.bundle import BundleBackend

LIBRARY = '''
import hashlib
from pathlib import Path

import numpy as np
from embedonce import Cache
from embedonce_backends.memory import MemoryBackend

CALLS = Path(__file__).with_name("calls.txt")


def embed(texts):
    """A paid model: every text that it embeds is noted in a file."""
    with CALLS.open("a") as file:
        file.writelines(f"{text}\\n" for text in texts)
    return compute(texts)


def compute(texts):
    return [[float(byte) - 127.5 for byte in hashlib.sha256(text.encode()).digest()[:8]] for text in texts]


def make_cache(*tiers, model="small", **options):
    return Cache(embed, tiers or [MemoryBackend()], space={"model": model, "revision": "1"}, **options)
'''


class Project:
    """A project with tests, in a folder of its own."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.path = pytester.path
        self.write("library.py", LIBRARY)
        self.write("pyproject.toml", '[tool.pytest.ini_options]\ntestpaths = ["tests"]\npythonpath = ["."]\n')
        self.bundle = self.path / "tests/embeddings"

    def write(self, name: str, content: str) -> Path:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        return file

    def run(self, *args: str, is_separate: bool = False) -> pytest.RunResult:
        """Run pytest, in this process or in one of its own."""
        run = self.pytester.runpytest_subprocess if is_separate else self.pytester.runpytest_inprocess
        return run("-p", "embedonce_integrations.pytest", "-p", "no:cacheprovider", *args)

    def record(self, *args: str) -> str:
        return self.run("--embedonce=record", *args).stdout.str()

    def replay(self, *args: str) -> pytest.RunResult:
        return self.run("--embedonce=replay", *args)

    def take_calls(self) -> list[str]:
        """Return the texts that were embedded since the last call."""
        file = self.path / "calls.txt"
        calls = sorted(file.read_text().splitlines()) if file.exists() else []
        file.unlink(missing_ok=True)
        return calls

    def read_bundle(self, path: Path | None = None) -> dict[str, Entry]:
        backend = BundleBackend(path=path or self.bundle)
        try:
            keys = [key for key in backend.scan("eo1.") if not key.startswith("eo1.card.")]
            return dict(backend.get_many(keys))
        finally:
            backend.close()


SEARCH = """
from library import compute, make_cache

def test_documents():
    with make_cache() as cache:
        assert cache.embed_batch(["one", "two", "three"]).tolist() == compute(["one", "two", "three"])

def test_query():
    with make_cache() as cache:
        assert cache.fetch(["two", "four"], store=False).sources
"""
