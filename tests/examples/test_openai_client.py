"""The example with OpenAI's client behaves as its README says, against an API on loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from embedonce.testing import OpenAIServer

EXAMPLE = Path(__file__).parents[2] / "examples" / "openai_client"
QUESTION = "Which tea is oxidised in part?"

# Each process has slow imports.
pytestmark = pytest.mark.timeout(500)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


@pytest.fixture
def run(server: OpenAIServer, patient_disk: None, tmp_path: Path) -> Callable[[str], list[str]]:
    for name in ("embedonce.toml", "tea.txt"):
        shutil.copy(EXAMPLE / name, tmp_path)
    environment = {**os.environ, "OPENAI_API_KEY": "any", "OPENAI_BASE_URL": server.base_url}

    def run(question: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, EXAMPLE / "ask.py", "tea.txt", question, "--config", "embedonce.toml"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=140,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_only_new_texts_are_paid_for(server: OpenAIServer, run: Callable[[str], list[str]], tmp_path: Path) -> None:
    lines = (tmp_path / "tea.txt").read_text().splitlines()
    cost = sum(map(server.tokens_of, [*lines, QUESTION]))
    first = run(QUESTION)
    assert first[0] == f"6 vectors, {cost} tokens"
    assert first[-1] == "5 calls, 0 tokens"
    assert [request.body["input"] for request in server.requests] == [[*lines, QUESTION]]

    assert run(QUESTION) == ["6 vectors, 0 tokens", *first[1:]]
    assert len(server.requests) == 1

    run("When is tea bitter?")
    assert server.requests[-1].body["input"] == ["When is tea bitter?"]
    (tmp_path / "tea.txt").write_text("\n".join([lines[0], "Puerh is aged.", *lines[2:]]))
    run(QUESTION)
    assert server.requests[-1].body["input"] == ["Puerh is aged."]
    assert len(server.requests) == 3


def test_the_nearest_line_is_first(run: Callable[[str], list[str]], tmp_path: Path) -> None:
    # The vectors of the loopback server have no meaning, but each text is nearest to itself.
    line = (tmp_path / "tea.txt").read_text().splitlines()[2]
    assert run(line)[1] == f"1.000  {line}"
