"""The AutoGen example behaves as its README says, against an API on loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from embedonce.testing import OpenAIServer

EXAMPLE = Path(__file__).parents[2] / "examples" / "autogen"
QUESTION = "When do I need a doctor's note?"

# Each process has slow imports.
pytestmark = pytest.mark.timeout(500)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(dimensions=64) as server:
        yield server


@pytest.fixture
def run(server: OpenAIServer, patient_disk: None, tmp_path: Path) -> Callable[..., list[str]]:
    for name in ("embedonce.toml", "handbook"):
        source = EXAMPLE / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    environment = {**os.environ, "OPENAI_API_KEY": "any", "OPENAI_BASE_URL": server.base_url}

    def run(question: str = QUESTION) -> list[str]:
        arguments = ["--config", tmp_path / "embedonce.toml", "--handbook", tmp_path / "handbook"]
        done = subprocess.run(
            [sys.executable, EXAMPLE / "workflow.py", question, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=140,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_chunks_are_paid_for_once(server: OpenAIServer, run: Callable[..., list[str]], tmp_path: Path) -> None:
    first = run()
    assert first[:6] == [
        *(f"miss  leave.md {number}" for number in range(3)),
        *(f"miss  travel.md {number}" for number in range(3)),
    ]
    sent = [request.body["input"] for request in server.requests]
    assert [len(texts) for texts in sent] == [5, 1], "one call with all distinct chunks, then the question"

    assert [line[:4] for line in run()[:6]] == ["hit "] * 6
    assert server.texts == 6

    travel = tmp_path / "handbook" / "travel.md"
    written = travel.read_text()
    travel.write_text(written.replace("Receipts are", "  Receipts are").replace("hours.\n", "hours\n"))
    again = run()[3:6]
    assert again == ["miss  travel.md 0", "hit   travel.md 1", "hit   travel.md 2"]
    assert server.texts == 7


def test_the_nearest_chunks_reach_the_agent_with_their_metadata(run: Callable[..., list[str]]) -> None:
    # The vectors of the loopback server have no meaning, but each text is nearest to itself.
    paragraph = "Receipts are handed in within thirty days. Without a receipt nothing is paid back."
    printed = run(paragraph)
    place = printed.index("Relevant memory content:")
    assert printed[place + 1] == f"1. {paragraph} (source: travel.md, chunk: 1, model: text-embedding-3-small)"
    assert printed[place + 2].startswith("2. ")
    assert printed[-1].startswith("(no chat model")
