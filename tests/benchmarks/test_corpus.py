"""The corpus generator writes the passages that it counts, and the same ones in every run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CORPUS = Path(__file__).parents[2] / "benchmarks" / "corpus.py"


def make_corpus(out: Path) -> Any:
    command = [
        sys.executable,
        str(CORPUS),
        "--out",
        str(out),
        "--passages",
        "1500",
        "--per-file",
        "100",
        "--python-only",
    ]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


def read_files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.*")}


def test_the_passages_match_the_counts_and_are_the_same_in_every_run(tmp_path: Path) -> None:
    counts = make_corpus(tmp_path / "one")
    files = read_files(tmp_path / "one")
    passages = [passage for text in files.values() for passage in text.strip().split("\n\n")]
    assert counts["passages"] == len(passages) == 1500
    assert counts["distinct"] == len(set(passages))
    assert counts["files"] == len(files)
    assert counts["bytes"] == sum(len(text.encode()) for text in files.values())
    assert all(passage == passage.strip() and 20 <= len(passage) <= 2000 for passage in passages)
    make_corpus(tmp_path / "two")
    assert read_files(tmp_path / "two") == files


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(subprocess.CalledProcessError):
        make_corpus(tmp_path)
    assert read_files(tmp_path) == {"mine.txt": "mine"}
