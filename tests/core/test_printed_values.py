"""What a debugger, a log or a failed assertion of pytest shows of many texts: a few lines, and no text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from embedonce import Cache, EraseIncomplete, Tier
from embedonce.errors import EmbedonceError
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.testing.faults import Fault, FaultyBackend
from embedonce_backends.memory import MemoryBackend

TEXTS = [f"private {number}" for number in range(1000)]


def collect_values() -> dict[str, Any]:
    events: list[Any] = []
    with Cache(CountingProvider(), [MemoryBackend()]) as cache:
        cache.subscribe(events.append)
        fetched = cache.fetch(TEXTS)
        values: dict[str, Any] = {"fetched": fetched, "stats": cache.stats()}
        values |= {type(event).__name__: event for event in events}
        values["explanation"] = cache.explain(TEXTS[0])
    return values


def collect_errors() -> dict[str, EmbedonceError]:
    errors: dict[str, EmbedonceError] = {}
    with Cache(CountingProvider(), [MemoryBackend()], mode="replay") as cache:
        with pytest.raises(EmbedonceError) as miss:
            cache.embed_batch(TEXTS)
        errors["replay miss"] = miss.value
        fetched = cache.fetch([*TEXTS, "private \ud800"])
        assert len(fetched.failed) == 1001
        errors["replay miss of fetch"] = fetched.failed[0]  # type: ignore[assignment]
        errors["text error"] = fetched.failed[1000]  # type: ignore[assignment]
    broken = FaultyBackend(DictBackend(scope="host"), [Fault("raise", on="delete")])
    with Cache(CountingProvider(), [Tier(broken, name="far")]) as cache:
        cache.embed_batch(TEXTS)
        with pytest.raises(EraseIncomplete) as incomplete:
            cache.forget(TEXTS)
        errors["forget"] = incomplete.value
    return errors


def test_values_of_a_thousand_texts_are_printed_shortly() -> None:
    values = collect_values()
    assert {"LookedUp", "Computed", "Stored"} <= values.keys()
    for name, value in values.items():
        for shown in (repr(value), str(value)):
            assert len(shown) < 2000, name
            assert "private" not in shown, name


def test_errors_about_a_thousand_texts_are_printed_shortly() -> None:
    for name, error in collect_errors().items():
        for shown in (repr(error), str(error), repr(error.args), repr(vars(error))):
            assert len(shown) < 1000, name
            assert "private" not in shown, name


FAILING = """
import sys
sys.path.insert(0, FOLDER)
from test_printed_values import collect_errors, collect_values

VALUES, OTHERS = ([*collect_values().values(), *collect_errors().values()] for _ in range(2))

def pytest_generate_tests(metafunc):
    metafunc.parametrize("place", range(len(VALUES)))

def test_identity(place):
    one, other = VALUES[place], OTHERS[place]
    assert one is other

def test_equality(place):
    assert VALUES[place] == "another value"
"""


@pytest.mark.slow
def test_a_failed_assertion_of_pytest_shows_no_text(tmp_path: Path) -> None:
    file = tmp_path / "test_failing.py"
    file.write_text(FAILING.replace("FOLDER", repr(str(Path(__file__).parent))))
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "-c", os.devnull, str(file)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1, run.stdout + run.stderr
    shown = [line for line in run.stdout.splitlines() if line.startswith("E ")]
    assert len(shown) >= 2 * (len(collect_values()) + len(collect_errors()))
    assert "private" not in run.stdout.replace(FAILING, "")
    assert max(map(len, shown)) < 3000
    assert len(run.stdout) < 200_000
