"""The pytest plugin: sessions that record and replay, run by pytest's own ``pytester``."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from optional import needs

from .tested_project import SEARCH, Project

pytest_plugins = ["pytester"]
pytestmark = needs("pyarrow")


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    return Project(pytester)


def test_a_recorded_session_replays_without_the_provider_and_gives_the_same_vectors(project: Project) -> None:
    project.write("tests/test_search.py", SEARCH)
    assert "embedonce: recorded 4 texts in tests/embeddings (4 new, 0 removed)" in project.record()
    assert project.take_calls() == ["four", "one", "three", "two", "two"]
    done = project.replay()
    done.assert_outcomes(passed=2)
    assert project.take_calls() == []
    assert "embedonce:" not in done.stdout.str()


def test_a_missing_text_fails_its_test_with_its_position_and_the_command_to_run(project: Project) -> None:
    tests = project.write("tests/test_search.py", SEARCH)
    project.record()
    tests.write_text(SEARCH.replace('"three"', '"a " + "new text"'))
    done = project.replay()
    done.assert_outcomes(passed=1, failed=1)
    shown = done.stdout.str()
    assert (
        "E           embedonce.errors.ReplayMiss: tests/test_search.py::test_documents: the text at position 2 of its "
        "call is not in the bundle tests/embeddings.\n"
        "E           The bundle has 4 other texts of the same vector space, so this text is new or has changed.\n"
        "E           Record what the tests need: pytest --embedonce=record tests/test_search.py::test_documents\n"
        "\n"
        "tests/test_search.py:6: ReplayMiss\n"
    ) in shown
    assert "= texts that are not recorded =" in shown
    assert "a new text" not in shown


def test_an_error_that_the_code_handles_fails_the_test_all_the_same(project: Project) -> None:
    project.write(
        "tests/test_handled.py",
        """
        import pytest
        from library import make_cache

        def search():
            try:
                return make_cache().embed("new")
            except Exception:
                return None

        def test_search():
            assert search() is None

        @pytest.mark.xfail(strict=False)
        def test_expected_failure():
            make_cache().embed("new")

        def test_wrapped():
            try:
                make_cache().embed("new")
            except LookupError:
                raise RuntimeError("the search does not work") from None
        """.replace("\n        ", "\n"),
    )
    done = project.replay()
    done.assert_outcomes(failed=3)
    shown = done.stdout.str()
    assert "The test went on, because the code under test has handled this error." in shown
    for name in ("test_search", "test_expected_failure", "test_wrapped"):
        assert f"\ntests/test_handled.py::{name}: the text at position 0 of its call is not in" in shown
    assert "There is no bundle in this folder yet." in shown
    assert project.take_calls() == []


def test_caches_of_conftest_files_and_of_session_fixtures_are_governed(project: Project) -> None:
    project.write(
        "tests/conftest.py",
        """
import pytest
from library import make_cache

AT_IMPORT = make_cache()
AT_IMPORT.embed("needed at import")

@pytest.fixture(scope="session")
def index():
    with make_cache() as cache:
        cache.embed("needed by the fixture")
        yield cache
""",
    )
    project.write(
        "tests/test_index.py",
        """
import asyncio
import threading
from conftest import AT_IMPORT

def test_index(index):
    index.for_namespace("other").embed("in a namespace")

def test_thread(index):
    thread = threading.Thread(target=index.embed, args=["in a thread"])
    thread.start()
    thread.join()

def test_async(index):
    asyncio.run(AT_IMPORT.aembed_batch(["in a task"]))

def test_stream(index):
    list(index.embed_iter(iter(["in", "a", "stream"]), batch=2))

def test_lookup(index):
    assert index.lookup(["in a thread"])
""",
    )
    assert "recorded 8 texts" in project.record("-p", "no:randomly", "tests", "--import-mode=prepend")
    calls = project.take_calls()
    assert len(calls) == 8
    project.replay("--import-mode=prepend").assert_outcomes(passed=5)
    assert project.take_calls() == []


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_hits_of_every_kind_are_recorded_with_costs_and_metadata_and_without_dates_of_expiry(
    project: Project, dtype: str
) -> None:
    project.write(
        "tests/test_tiers.py",
        f"""
from library import make_cache
from embedonce.testing import DictBackend
from embedonce_backends.memory import MemoryBackend
from embedonce import Tier
from embedonce.vectors import Cost

def test_hits():
    tiers = [Tier(MemoryBackend(), ttl=60), Tier(DictBackend(scope="network"), ttl=60, write="inline")]
    with make_cache(*tiers, dtype={dtype!r}) as cache:
        cache.put(["paid"], [[1.0] * 8], costs=[Cost(7, 0.5)], metadata=[{{"page": 3}}])
        assert cache.embed("paid").size == 8
        cache.fetch(["fresh"], fresh=True)
""",
    )
    assert "recorded 2 texts" in project.record()
    assert project.take_calls() == ["fresh"]
    entries = project.read_bundle()
    (paid,) = [entry for entry in entries.values() if entry.metadata]
    assert (paid.metadata, paid.tokens, paid.seconds) == ({"page": 3}, 7, 0.5)
    assert all(entry.expires is None and entry.dtype == dtype for entry in entries.values())
    project.replay().assert_outcomes(passed=1)
    assert project.take_calls() == []


def test_what_is_recorded_needs_the_provider_no_more_and_an_unchanged_bundle_is_not_written_again(
    project: Project,
) -> None:
    tests = project.write("tests/test_search.py", SEARCH)
    project.record()
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in project.bundle.iterdir()}
    project.take_calls()
    assert "embedonce: tests/embeddings has all 4 texts that the tests need" in project.record()
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in project.bundle.iterdir()} == before
    assert project.take_calls() == []
    tests.write_text(SEARCH.replace('"one"', '"changed"'))
    assert "embedonce: recorded 4 texts in tests/embeddings (1 new, 1 removed)" in project.record("tests")
    assert project.take_calls() == ["changed"]


@pytest.mark.parametrize(
    ("args", "change", "reason"),
    [
        (["-k", "query"], "", "tests were deselected"),
        (["tests/test_search.py::test_query"], "", "only some tests were named"),
        ([], "\ndef test_fails():\n    assert False\n", "not all tests passed"),
        ([], "\nimport pytest\ndef test_skipped():\n    pytest.skip('no')\n", "a test was skipped"),
    ],
)
def test_a_text_that_only_a_part_of_the_tests_did_not_need_is_kept(
    project: Project, args: list[str], change: str, reason: str
) -> None:
    tests = project.write("tests/test_search.py", SEARCH)
    project.record()
    tests.write_text(SEARCH.replace('"four"', '"changed"') + change)
    shown = project.record(*args)
    assert "embedonce: recorded 5 texts in tests/embeddings (1 new, 0 removed)" in shown
    assert f"not needed in this run, and kept because {reason}" in shown
    assert len(project.read_bundle()) == 5


def test_an_interrupted_session_writes_what_it_has_recorded(project: Project) -> None:
    project.write("tests/test_search.py", SEARCH + "\ndef test_interrupted():\n    raise KeyboardInterrupt\n")
    done = project.run("--embedonce=record", is_separate=True)
    assert done.ret == pytest.ExitCode.INTERRUPTED
    assert "recorded 4 texts" in done.stdout.str()


def test_a_marker_chooses_another_bundle_also_for_a_cache_of_the_session(project: Project) -> None:
    project.write(
        "tests/conftest.py",
        """
import pytest
from library import make_cache

@pytest.fixture(scope="session")
def cache():
    with make_cache() as cache:
        yield cache
""",
    )
    project.write(
        "tests/legal/test_contracts.py",
        """
import pytest
pytestmark = pytest.mark.embedonce(path="vectors")

@pytest.fixture(scope="module")
def clauses(cache):
    cache.embed("a clause")

class TestContracts:
    def test_contract(self, cache, clauses):
        cache.embed("a contract")

    @pytest.mark.embedonce(path="../other")
    def test_other(self, cache):
        cache.embed("other")
""",
    )
    project.write("tests/test_default.py", "def test_default(cache):\n    cache.embed('default')\n")
    shown = project.record()
    for line in ("1 text in tests/embeddings", "2 texts in tests/legal/vectors", "1 text in tests/other"):
        assert f"embedonce: recorded {line}" in shown
    project.take_calls()
    project.replay().assert_outcomes(passed=3)
    assert project.take_calls() == []


def test_the_mode_off_of_a_marker_leaves_the_caches_of_a_test_alone(project: Project) -> None:
    project.write(
        "tests/test_off.py",
        """
import pytest
from embedonce.errors import ReplayMiss
from library import make_cache

@pytest.mark.embedonce(mode="off")
def test_replay_mode():
    with make_cache(mode="replay") as cache, pytest.raises(ReplayMiss, match="a text is in no tier"):
        cache.embed("a")
    with make_cache() as cache:
        assert cache.fetch(["b"]).sources == ["provider"]
""",
    )
    assert "no test needed a vector, so nothing was recorded" in project.record()
    assert not (project.bundle / "manifest.json").exists()
    project.take_calls()
    project.replay().assert_outcomes(passed=1)
    assert project.take_calls() == ["b"]


def test_a_wrong_marker_is_an_error_of_its_test(project: Project) -> None:
    project.write(
        "tests/test_wrong.py",
        """
import pytest

@pytest.mark.embedonce("folder")
def test_positional(): pass

@pytest.mark.embedonce(mode="replay")
def test_mode(): pass
""",
    )
    done = project.replay()
    done.assert_outcomes(errors=2)
    done.stdout.fnmatch_lines(["the marker embedonce takes path=*, or mode=*; got mode='replay'"])


def test_the_environment_sets_the_mode_and_the_option_wins(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write("tests/test_search.py", SEARCH)
    monkeypatch.setenv("EMBEDONCE_MODE", "record")
    assert "recorded 4 texts" in project.run().stdout.str()
    monkeypatch.setenv("EMBEDONCE_MODE", "replay")
    project.take_calls()
    project.run().assert_outcomes(passed=2)
    assert project.take_calls() == []
    project.run("--embedonce=off").assert_outcomes(passed=2)
    assert len(project.take_calls()) == 5


@pytest.mark.parametrize("place", ["option", "variable"])
def test_a_wrong_mode_is_an_error_that_lists_the_modes(
    project: Project, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if place == "variable":
        monkeypatch.setenv("EMBEDONCE_MODE", "rec")
    done = project.run(*(["--embedonce=rec"] if place == "option" else []))
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert re.search("'?record'?, '?replay'? ?(or|,)? '?off'?", done.stderr.str())


def test_the_configuration_of_the_root_names_the_bundle(project: Project) -> None:
    project.write("tests/test_search.py", SEARCH)
    config = project.path / "pyproject.toml"
    config.write_text(config.read_text() + '[tool.embedonce]\nbundle = "data/vectors"\n')
    assert "recorded 4 texts in data/vectors" in project.record()
    config.write_text(config.read_text().replace('"data/vectors"', "7"))
    done = project.replay()
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert "bundle = 7 in [tool.embedonce]" in done.stderr.str()


def test_a_pyproject_may_name_the_bundle_beside_another_configuration(project: Project) -> None:
    config = project.path / "pyproject.toml"
    config.write_text(config.read_text() + '[tool.embedonce]\nbundle = "data/vectors"\n')
    project.write("embedonce.toml", '[provider]\ntype = "ngram"\n\n[[tiers]]\ntype = "memory"\n')
    project.write(
        "tests/test_open.py",
        """
import embedonce

def test_fixture(embedonce_cache):
    embedonce_cache.embed("a text")

def test_open():
    with embedonce.open() as cache:
        cache.embed("another text")
""",
    )
    assert "recorded 2 texts in data/vectors" in project.record()
    project.replay().assert_outcomes(passed=2)


def test_a_folder_with_other_files_is_refused_before_anything_is_paid_for(project: Project) -> None:
    project.write("tests/test_search.py", SEARCH)
    project.write("tests/embeddings/test_other.py", "")
    done = project.run("--embedonce=record")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert "the vectors of the tests cannot be recorded in tests/embeddings" in done.stderr.str()
    assert project.take_calls() == []


def test_a_damaged_row_fails_in_replay_and_is_recorded_anew(project: Project) -> None:
    project.write("tests/test_search.py", SEARCH)
    project.record()
    project.take_calls()
    (part,) = project.bundle.glob("*.arrow")
    content = part.read_bytes()
    vector = np.asarray(next(iter(project.read_bundle().values())).vector, "<f4").tobytes()
    part.write_bytes(content.replace(vector, vector[::-1]))
    done = project.replay()
    assert "The bundle has this text, but its row is damaged" in done.stdout.str()
    assert "recorded 4 texts in tests/embeddings (1 new, 0 removed)" in project.record()
    assert len(set(project.take_calls())) == 1
    project.replay().assert_outcomes(passed=2)


def test_another_model_and_a_finer_precision_are_named_in_the_message(project: Project) -> None:
    tests = project.write("tests/test_search.py", SEARCH)
    tests.write_text(SEARCH.replace("make_cache()", 'make_cache(dtype="int8")'))
    project.record()
    tests.write_text(SEARCH)
    assert "has the vector of this text as int8 with 8 dimensions" in project.replay().stdout.str()
    tests.write_text(SEARCH.replace("make_cache()", 'make_cache(model="large")'))
    shown = project.replay().stdout.str()
    assert "The test needs vectors of" in shown
    assert re.search("large .*The bundle has vectors of .*small", shown)


def test_an_encrypted_cache_is_recorded_encrypted(project: Project) -> None:
    pytest.importorskip("cryptography")
    project.write(
        "tests/test_secret.py",
        """
from embedonce import KeyPolicy, Tier
from embedonce.encryption import Encryption
from embedonce.testing import DictBackend
from library import make_cache

def test_secret():
    tier = Tier(DictBackend(scope="host"), encryption=Encryption(bytes(range(32))))
    with make_cache(tier, key=KeyPolicy(secret="a secret of the team")) as cache:
        cache.embed_batch(["one", "two"])
""",
    )
    assert "recorded 2 texts" in project.record()
    assert all(isinstance(value, bytes) for value in project.read_bundle().values())
    assert "small" not in (project.bundle / "manifest.json").read_text()
    project.take_calls()
    assert "has all 2 texts" in project.record()
    project.replay().assert_outcomes(passed=1)
    assert project.take_calls() == []


def test_a_fallback_is_replayed_in_its_own_space(project: Project) -> None:
    project.write(
        "tests/test_fallback.py",
        """
import pytest
from embedonce.testing import CountingProvider, FaultyProvider, ProviderFault
from embedonce import Cache

def test_fallback():
    first = FaultyProvider(CountingProvider(dimensions=8), [ProviderFault("raise")])
    with Cache(first, fallback=CountingProvider(dimensions=8, model="second")) as cache:
        found = cache.fetch(["one"])
        assert found.vectors.shape == (1, 8)
        assert found.space.model == "second"
""",
    )
    project.record()
    project.replay().assert_outcomes(passed=1)


def test_replay_reads_no_tier_that_outlives_the_process(project: Project) -> None:
    project.write(
        "tests/test_tiers.py",
        """
from embedonce.testing import DictBackend
from library import make_cache

def test_tiers():
    with make_cache(DictBackend(scope="network"), mode="read-through") as cache:
        assert cache.tiers == ("bundle",)
        cache.put(["new"], [[1.0] * 8])
        cache.embed("new")
""",
    )
    done = project.replay()
    done.assert_outcomes(failed=1)
    assert "the text at position 0 of its call is not in the bundle" in done.stdout.str()


def test_forget_and_purge_work_in_both_modes(project: Project) -> None:
    project.write(
        "tests/test_forget.py",
        """
from library import make_cache

def test_forget():
    with make_cache() as cache:
        cache.embed("one")
        cache.forget(["one"])
        cache.embed("one")
        cache.purge(model="small")
        assert cache.check()
""",
    )
    assert "1 passed" in project.record()
    project.replay().assert_outcomes(passed=1)


def test_the_fixture_opens_the_configuration_of_the_root(project: Project) -> None:
    project.write(
        "embedonce.toml",
        '[provider]\ntype = "ngram"\ndimensions = 32\n\n[[tiers]]\ntype = "disk"\npath = "cache"\n',
    )
    project.write(
        "tests/test_fixture.py",
        """
import pytest
caches = []

def test_cache(embedonce_cache):
    caches.append(embedonce_cache)
    assert embedonce_cache.embed("one").shape == (32,)

def test_closed():
    assert caches[0].closed
""",
    )
    assert "recorded 1 text in" in project.record()
    project.replay().assert_outcomes(passed=2)
    project.run().assert_outcomes(passed=2)


def test_two_models_in_one_space_are_reported(project: Project) -> None:
    project.write(
        "tests/test_fakes.py",
        """
import pytest
from embedonce import Cache

@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_fake(sign):
    Cache(lambda texts: [[sign, 2.0]] * len(texts), space={"model": "fake", "revision": "1"}).embed("one")
""",
    )
    shown = project.record()
    assert (
        "embedonce: tests/test_fakes.py::test_fake[-1.0] got other vectors for 1 text than the recorded ones" in shown
    )


def test_the_plugin_names_its_option_marker_and_fixture(project: Project) -> None:
    assert "--embedonce={record,replay,off}" in project.run("--help").stdout.str()
    assert "@pytest.mark.embedonce(*, path=None, mode=None)" in project.run("--markers").stdout.str()
    assert "embedonce_cache" in project.run("--fixtures").stdout.str()


def test_the_plugin_is_an_entry_point_of_pytest() -> None:
    root = Path(__file__).parents[2]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
    assert declared["pytest11"] == {"embedonce": "embedonce_integrations.pytest"}
