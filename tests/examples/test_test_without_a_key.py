"""The example with the RAG test passes without a key and without a service, and says which text has changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import optional
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "test_without_a_key"

pytestmark = [optional.needs("pyarrow"), optional.needs("openai"), pytest.mark.timeout(300)]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the example, without what earlier runs have left."""
    folder = tmp_path / "project"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("*.cache", "__pycache__"))
    return folder


def run_pytest(project: Path) -> subprocess.CompletedProcess[str]:
    hidden = ("OPENAI_", "EMBEDDINGS_", "EMBEDONCE_", "PYTEST_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--embedonce=replay"],
        cwd=project,
        env=environment | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def test_the_tests_pass_without_a_key(project: Path) -> None:
    done = run_pytest(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout
    assert not (project / "embeddings.cache").exists(), "a replay uses no other tier than the bundle"


def test_a_changed_text_fails_and_the_message_names_its_position(project: Path) -> None:
    passages = project / "handbook" / "passages.py"
    changed = passages.read_text("utf-8").replace("within one hour", "within two hours")
    passages.write_text(changed, "utf-8")
    done = run_pytest(project)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "5 failed" in done.stdout
    shown = [line.removeprefix("E").strip() for line in done.stdout.splitlines() if line.startswith("E ")]
    test = "tests/test_rag.py::test_the_nearest_passage_answers_the_question[theft]"
    at = next(number for number, line in enumerate(shown) if test in line)
    assert shown[at : at + 3] == [
        f"embedonce.errors.ReplayMiss: {test}: the text at position 4 of its call is not in the bundle "
        "tests/embeddings.",
        "The bundle has 11 other texts of the same vector space, so this text is new or has changed.",
        f"Record what the tests need: pytest --embedonce=record '{test}'",
    ]
    reported = "\n".join(shown + done.stdout.partition("texts that are not recorded")[2].splitlines())
    assert "two hours" not in reported, "no message contains a text"
