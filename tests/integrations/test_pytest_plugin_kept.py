"""What a session that records never removes: vectors that another run, another session or another version needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from optional import needs

from .tested_project import SEARCH, Project

pytest_plugins = ["pytester"]
pytestmark = needs("pyarrow")


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    project = Project(pytester)
    project.write("tests/test_search.py", SEARCH)
    project.record()
    project.take_calls()
    return project


def make_test(text: str) -> str:
    """Return a file with one test, which needs the vector of a text."""
    return f"from library import make_cache\n\ndef test_query():\n    make_cache().embed({text!r})\n"


LEAVE_OUT = """
def pytest_collection_modifyitems(items):
    del items[0]
"""

LEAVE_WITHOUT_ERROR = """
import pytest

def pytest_runtest_teardown(item):
    pytest.exit("enough", returncode=0)
"""

EXPECTED_FAILURE = """
import pytest

@pytest.fixture(autouse=True)
def use_xfail(monkeypatch, request):
    if request.function.__name__ == "test_query":
        pytest.xfail("not today")
"""


@pytest.mark.parametrize(
    ("args", "conftest", "reason"),
    [
        (["-o", "python_functions=test_query"], "", "pytest had another configuration"),
        (["-c", "other.ini"], "", "pytest had another configuration"),
        ([], 'collect_ignore = ["test_search.py"]', "tests were left out"),
        ([], 'collect_ignore_glob = ["*search*"]', "tests were left out"),
        ([], LEAVE_OUT, "tests were deselected"),
        ([], LEAVE_WITHOUT_ERROR, "not all tests ran"),
        ([], EXPECTED_FAILURE, "not all tests passed"),
    ],
)
def test_the_texts_of_tests_that_did_not_run_to_their_end_are_kept(
    project: Project, args: list[str], conftest: str, reason: str
) -> None:
    project.write("other.ini", "[pytest]\ntestpaths = tests\npythonpath = .\npython_functions = test_query\n")
    project.write("tests/test_small.py", make_test("small"))
    project.write("tests/conftest.py", conftest)
    shown = project.record(*args)
    assert f" not needed in this run, and kept because {reason}" in shown
    assert len(project.read_bundle()) >= 4


def test_folders_in_which_pytest_never_looks_are_no_reason_to_keep_texts(project: Project) -> None:
    for folder in ("tests/build", "tests/.hidden", "tests/__pycache__"):
        project.write(f"{folder}/test_copy.py", "")
    project.write("tests/environment/pyvenv.cfg", "")
    project.write("tests/environment/bin/activate", "")
    project.write("tests/notes.py", "")
    project.write("tests/conftest.py", 'collect_ignore = ["notes.py"]')
    project.write("tests/test_search.py", SEARCH.replace('"one"', '"changed"'))
    assert "embedonce: recorded 4 texts in tests/embeddings (1 new, 1 removed)" in project.record()


def test_the_texts_of_a_bundle_that_other_projects_may_share_are_kept(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = project.path / "inner/pyproject.toml"
    project.write("inner/library.py", (project.path / "library.py").read_text())
    project.write("inner/tests/test_inner.py", make_test("inner"))
    project.write("inner/pyproject.toml", (project.path / "pyproject.toml").read_text())
    config.write_text(config.read_text() + '[tool.embedonce]\nbundle = "../tests/embeddings"\n')
    monkeypatch.chdir(config.parent)
    shown = project.record()
    assert "recorded 5 texts" in shown
    assert (
        "(1 new, 0 removed); 4 not needed in this run, and kept because the bundle is outside of this project" in shown
    )


@pytest.mark.parametrize("kind", ["newer", "damaged", "part"])
def test_a_bundle_that_cannot_be_read_is_not_replaced(project: Project, kind: str) -> None:
    manifest = project.bundle / "manifest.json"
    if kind == "newer":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 2}))
    elif kind == "damaged":
        manifest.write_text("<<<<<<< HEAD\n" + manifest.read_text())
    else:
        next(project.bundle.glob("*.arrow")).unlink()
    before = {file.name: file.read_bytes() for file in project.bundle.iterdir()}
    for mode, past in (("record", "recorded"), ("replay", "replayed")):
        done = project.run(f"--embedonce={mode}", "-k", "query")
        assert done.ret == pytest.ExitCode.USAGE_ERROR
        assert f"the vectors of the tests cannot be {past} " in done.stderr.str().replace(":", " ")
    assert {file.name: file.read_bytes() for file in project.bundle.iterdir()} == before
    assert project.take_calls() == []
    shutil.rmtree(project.bundle)
    assert "recorded 4 texts in tests/embeddings (4 new, 0 removed)" in project.record()


def test_what_another_session_adds_meanwhile_is_kept(project: Project) -> None:
    other = project.path.with_name(project.path.name + "-copy")
    shutil.copytree(project.path, other)
    (other / "tests/test_other.py").write_text(make_test("of the other session"))
    project.write(
        "tests/test_search.py",
        SEARCH
        + f"""
import shutil
import subprocess
import sys

def test_at_the_same_time():
    command = [sys.executable, "-m", "pytest", "-p", "embedonce_integrations.pytest", "--embedonce=record"]
    subprocess.run(command, cwd={str(other)!r}, check=True)
    shutil.copytree({str(other / "tests/embeddings")!r}, {str(project.bundle)!r}, dirs_exist_ok=True)
    make_cache().embed("of this session")
""",
    )
    assert "(1 new, 0 removed)" in project.record()
    assert len(project.read_bundle()) == 6


def test_a_session_waits_until_another_one_has_written_the_bundle(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedonce_backends.bundle import BundleBackend

    project.write("tests/test_search.py", SEARCH.replace('"one"', '"changed"'))
    other = BundleBackend.create_writer(project.bundle, replace=True)
    monkeypatch.setattr("embedonce_integrations._pytest_store.time.sleep", lambda seconds: other.close())
    try:
        assert "recorded 4 texts in tests/embeddings (1 new, 1 removed)" in project.record()
    finally:
        other.close()


def test_a_session_that_needs_no_vector_leaves_no_folder(project: Project) -> None:
    shutil.rmtree(project.bundle)
    project.write("tests/test_search.py", "def test_nothing(): pass\n")
    config = project.path / "pyproject.toml"
    config.write_text(config.read_text() + '[tool.embedonce]\nbundle = "data/vectors"\n')
    assert "no test needed a vector, so nothing was recorded" in project.record()
    assert not (project.path / "data").exists()


def test_the_teardown_of_a_fixture_belongs_to_the_bundle_of_the_fixture(project: Project) -> None:
    project.write(
        "tests/conftest.py",
        """
import pytest
from library import make_cache

@pytest.fixture(scope="session")
def index():
    with make_cache() as cache:
        yield cache
        cache.embed("at the end of the session")
""",
    )
    project.write(
        "tests/test_search.py",
        """
import pytest

def test_first(index): index.embed("first")

@pytest.mark.embedonce(path="other")
def test_last(index): index.embed("last")
""",
    )
    shown = project.record()
    assert "recorded 2 texts in tests/embeddings (2 new, 4 removed)" in shown
    assert "recorded 1 text in tests/other (1 new, 0 removed)" in shown
    file = Path("tests/test_search.py")
    project.replay(f"{file}::test_last", f"{file}::test_first").assert_outcomes(passed=2)


def test_tracebacks_of_missing_texts_end_in_the_project_also_in_errors_that_follow(project: Project) -> None:
    project.write(
        "tests/test_search.py",
        """
import library
import framework

def search(*parts):
    try:
        return framework.embed(library.make_cache(), parts)
    except LookupError as error:
        raise RuntimeError("the search does not work") from error

def test_search():
    search("a", "new", "text")
""",
    )
    module = project.path.with_name(project.path.name + "-framework") / "framework.py"
    module.parent.mkdir()
    module.write_text("def embed(cache, parts):\n    return send(cache, [' '.join(parts)])\n\n")
    with module.open("a") as file:
        file.write("def send(cache, texts):\n    return cache.embed_batch(texts)\n")
    project.pytester.syspathinsert(module.parent)
    done = project.replay("--tb=long")
    done.assert_outcomes(failed=1)
    assert "the text at position 0 of its call" in done.stdout.str()
    assert "a new text" not in done.stdout.str()
    assert "_engine" not in done.stdout.str()
