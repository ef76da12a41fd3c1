"""The LangChain example gives the same answers without a cache, with a cold one and with a warm one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

# Each of the two processes has slow imports.
pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("patient_disk")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "langchain"


def test_the_answers_are_the_same_and_the_costs_differ(tmp_path: Path) -> None:
    config = tmp_path / "embedonce.toml"
    config.write_text((EXAMPLE / "embedonce.toml").read_text())
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.md").write_text("Green tea is steamed.\n\nBlack tea is oxidised.\n\n\n\nGreen tea is steamed.")
    (folder / "b.md").write_text("Green tea is steamed.\n\nWhite tea is withered.")
    command = [sys.executable, EXAMPLE / "search.py", folder, "Which tea is withered?", "--config", config]
    for counts in ([6, 4, 0], [6, 0, 0]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=140)
        assert done.returncode == 0, done.stderr
        assert [int(n) for n in re.findall(r"(\d+) embedded", done.stdout)] == counts
        assert "\nthe same vectors and answers\n" in done.stdout
        assert "White tea is withered." in done.stdout.split("nearest to")[1].splitlines()[1]
