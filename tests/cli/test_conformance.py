"""``embedonce conformance``: a plugin is found, tested and timed, and its faults are reported."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optional import needs
from servers import RedisServer

from embedonce.testing import BackendContract, NormalizerContract, ProviderContract

PLUGINS = """
from pathlib import Path

from embedonce import Capabilities, Limits, TextRefused, VectorSpace


class FileBackend:
    capabilities = Capabilities(scope="host", delete=True)

    def __init__(self, *, path: Path, password: str = "") -> None:
        print("made")
        if password == "wrong":
            raise PermissionError(f"refused: {password}")
        self.folder = path
        path.mkdir(parents=True, exist_ok=True)

    def get_many(self, keys, /):
        return {key: (self.folder / key).read_bytes() for key in keys if (self.folder / key).exists()}

    def set_many(self, items, ttl, /):
        for key, frame in items.items():
            new = self.folder / f"{key}~"
            new.write_bytes(frame)
            new.rename(self.folder / key)

    def delete_many(self, keys, /):
        for key in keys:
            (self.folder / key).unlink()

    def close(self):
        pass


STORE = {}


class SharedBackend:
    capabilities = Capabilities(scope="host")

    def __init__(self, *, prefix: str = "") -> None:
        self.prefix = prefix

    def get_many(self, keys, /):
        return {key: STORE[self.prefix + key] for key in keys if self.prefix + key in STORE}

    def set_many(self, items, ttl, /):
        STORE.update({self.prefix + key: frame for key, frame in items.items()})

    def close(self):
        pass


class LettersProvider:
    limits = Limits(max_batch=64)

    def __init__(self, *, first: int = 128) -> None:
        self.first = first

    def space(self, task, /):
        return VectorSpace(provider="letters", model="letters-1", dimensions=self.first + 1)

    def embed(self, texts, task, /):
        return [[len(text) + 1.0, *(float(text.count(chr(c))) for c in range(self.first))] for text in texts]

    def close(self):
        pass


def shout(text):
    return text.upper()


class EndingBackend(SharedBackend):
    def get_many(self, keys, /):
        if not keys:
            raise SystemExit(0)
        return super().get_many(keys)


class UndeclaredBackend(SharedBackend):
    capabilities = None


class FileImporter:
    def check(self):
        pass

    def lookup(self, texts, /):
        pass

    def close(self):
        pass


class Neither:
    pass
"""


@pytest.fixture
def module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Write a module of plugins into this folder; return its name."""
    (folder / "mypackage.py").write_text(PLUGINS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "mypackage"
    sys.modules.pop("mypackage", None)


@pytest.mark.slow
def test_a_backend_without_a_test_file(command: Any, module: str, folder: Path) -> None:
    done = command(
        "conformance", f"{module}:FileBackend", "--option", "path=./x", "--rounds", "3", "--examples", "2", "--json"
    )
    report = done.json
    assert done.code == 1, "it fails with two threads, for the deletion of a missing key, and after close"
    outcomes = {one["test"]: one for one in report["tests"]}
    assert set(outcomes) == set(BackendContract.standard_tests)
    failed = outcomes["test_delete_of_what_is_not_there_is_no_error"]
    assert failed["outcome"] == "failed"
    assert failed["detail"].startswith("FileNotFoundError: ")
    assert failed["detail"].endswith(")")
    assert re.search(r"\((pathlib|_local)\.py:", failed["detail"])
    assert outcomes["test_use_after_close_raises"]["outcome"] == "failed"
    for name in ("test_a_miss_is_absent", "test_other_processes_use_the_store", "test_a_forked_child_uses_the_store"):
        assert outcomes[name]["outcome"] == "passed", outcomes[name]
    assert outcomes["test_an_entry_goes_when_its_ttl_ends"]["detail"] == 'requires the capability "ttl"'
    assert (report["kind"], report["failed"] + report["passed"] + report["skipped"]) == ("backend", len(outcomes))
    timed = {(one["operation"], one["batch"]) for one in report["timings"]}
    assert timed == {(name, n) for n in (1, 256) for name in (
        "set_many", "get_many, all hits", "get_many, all misses", "delete_many")}  # fmt: skip
    assert all(0 < one["p50"] <= one["p99"] and 1 <= one["calls"] <= 3 for one in report["timings"])
    assert "made" in done.err
    assert not (folder / "x").exists(), "the stores of the tests are removed"


def test_the_report_for_people(command: Any, module: str) -> None:
    names = ("a_miss_is_absent", "delete_of_what_is_not_there_is_no_error", "count_agrees_with_what_is_there")
    done = command("conformance", f"{module}:FileBackend", *(part for n in names for part in ("--test", f"test_{n}")))
    assert done.code == 1
    assert [line for line in done.out.splitlines() if "No such file" not in line] == [
        "passed   test_a_miss_is_absent",
        "failed   test_delete_of_what_is_not_there_is_no_error",
        'skipped  test_count_agrees_with_what_is_there  requires the capability "count"',
        "",
        "mypackage:FileBackend, a backend: 1 passed, 1 skipped, 1 failed",
    ]
    assert done.err.splitlines()[-1] == "error: 1 test failed"
    done = command("conformance", f"{module}:LettersProvider", "--rounds", "2")
    rows = [line.split() for line in done.out.splitlines()]
    assert ["operation", "batch", "calls", "p50", "ms", "p99", "ms"] in rows
    assert ["embed", "1", "2"] in [row[:3] for row in rows]


def test_one_test_can_be_chosen(command: Any, module: str) -> None:
    done = command("conformance", f"{module}:FileBackend", "--test", "test_a_miss_is_absent")
    assert (done.code, done.out.splitlines()[0]) == (0, "passed   test_a_miss_is_absent")
    assert "p50" not in done.out
    assert command("conformance", f"{module}:FileBackend", "--test", "test_a_mis").code == 2


def test_a_backend_that_ends_the_program_has_failed(command: Any, module: str) -> None:
    arguments = ["--option", "prefix={new}", "--test", "test_empty_calls_do_nothing", "--json"]
    ran = command("conformance", f"{module}:EndingBackend", *arguments)
    assert ran.code == 1
    (test,) = ran.json["tests"]
    assert test["outcome"] == "failed"
    assert "SystemExit" in test["detail"]


def test_a_provider(command: Any, module: str) -> None:
    report = command("conformance", f"{module}:LettersProvider", "-o", "first=64", "--rounds", "2", "--json").json
    outcomes = {one["test"]: one["outcome"] for one in report["tests"]}
    assert set(outcomes) == set(ProviderContract.standard_tests)
    assert outcomes["test_another_process_makes_the_same_vectors"] == "passed"
    assert (report["kind"], report["failed"]) == ("provider", 0)
    assert [(one["operation"], one["batch"]) for one in report["timings"]] == [("embed", 1), ("embed", 32)]


def test_a_normalisation_step(command: Any, module: str) -> None:
    done = command("conformance", f"{module}:shout", "--json")
    assert {one["test"] for one in done.json["tests"]} == set(NormalizerContract.standard_tests)
    assert done.json["kind"] == "normalizer"
    assert command("conformance", "casefold").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ngram", "embedonce:ngram"])
def test_a_plugin_by_name(command: Any, folder: Path, name: str) -> None:
    done = command("conformance", name, "-o", "dimensions=64", "--rounds", "2")
    assert done.code == 0, done.out
    assert f"{name}, a provider: " in done.out


def test_the_memory_tier_has_no_path(command: Any, folder: Path) -> None:
    assert command("conformance", "memory", "--test", "test_it_behaves_as_a_dict").code == 0


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["nothing_of_that_name:X"], "there is no module nothing_of_that_name, neither installed nor in this folder"),
        (["mypackage:FileBackand"], "mypackage has no FileBackand; did you mean FileBackend?"),
        (["mypackage:Neither"], "is neither a backend (get_many, set_many) nor a provider (embed or aembed)"),
        (["mypackage:Neither"], "nor an importer (lookup or scan)"),
        (["mypackage:FileImporter"], "this is an importer, and its tests must write the stores that it reads"),
        (["langchain"], "write a test file with embedonce.testing.ImporterContract (see docs/testing.md)"),
        (["mypackage:STORE"], "mypackage:STORE is neither a class nor a function"),
        (["dsik"], 'no plugin "dsik" is installed; did you mean "disk"?'),
        (["mypackage:FileBackend", "-o", "paht=x"], 'unknown option "paht"; did you mean path?'),
        (["mypackage:FileBackend", "-o", "path"], "an option must be written as name=value"),
        (["mypackage:FileBackend", "-o", "path=a", "-o", "path=b"], "option path is set twice"),
        (["mypackage:LettersProvider", "-o", "first=many"], "option first must be a whole number"),
        (["mypackage:SharedBackend"], "write {new} into an option that separates stores"),
        (["mypackage:SharedBackend", "-o", "prefix={server}"], "give the server's address with --server HOST:PORT"),
        (["mypackage:SharedBackend", "-o", "prefix={new}", "--server", "x:1"], "--server has no effect"),
        (["mypackage:SharedBackend", "-o", "prefix={server}", "--server", "x"], "--server must be HOST:PORT"),
        (["mypackage:UndeclaredBackend"], "a backend must declare its capabilities: capabilities = Capabilities(...)"),
        (
            ["mypackage:FileBackend", "-o", "password=wrong"],
            "hidden because it contains the value of a secret option",
        ),
    ],
)
def test_an_invalid_plugin_or_option_is_refused(command: Any, module: str, arguments: list[str], wanted: str) -> None:
    done = command("conformance", *arguments)
    assert done.code == 2
    assert wanted in done.err
    assert "Traceback" not in done.err


def test_new_in_an_option_separates_the_stores(command: Any, module: str) -> None:
    test = ["--test", "test_two_clients_see_one_store", "--test", "test_any_value_comes_back_exactly"]
    assert command("conformance", f"{module}:SharedBackend", "-o", "prefix={new}", *test).code == 0


@needs("redis")
def test_a_server_is_tested_through_a_proxy(command: Any, folder: Path, redis_server: RedisServer) -> None:
    address = redis_server.url.removeprefix("redis://").partition("/")[0]
    network = [name for name in BackendContract.standard_tests if "server" in name or "reply_that" in name]
    chosen = [part for name in network for part in ("--test", name)]
    options = ["-o", "url=redis://{server}/0", "-o", "prefix={new}", "--server", address]
    done = command("conformance", "redis", *options, *chosen)
    assert done.code == 0, done.out
    assert len(network) == done.out.count("passed   test_") == 2


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
@pytest.mark.slow
def test_ctrl_c_ends_it_and_removes_its_stores(process: Any, folder: Path) -> None:
    running = process("conformance", "disk", "--option", "path=./x")
    assert running.stdout.readline().startswith("passed   test_")
    running.send_signal(signal.SIGINT)
    out, err = running.communicate()
    assert (running.returncode, err.splitlines()[-1]) == (130, "interrupted")
    assert "failed" not in out
    assert not (folder / "x").exists()
