"""The top-k example finds the same as an exact search, through the index."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "postgres_top_k.py"


def test_the_index_finds_the_nearest(
    postgres_server: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("postgres_top_k", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    texts = example.read_docstrings()  # read the standard library only once, because it takes the longest
    monkeypatch.setattr(example, "read_docstrings", lambda: dict(texts))
    for _ in range(2):  # the example can be run repeatedly
        scores = example.main(postgres_server.url)
        assert scores["recall"] > 0.8
        assert scores["indexed"] == len(example.QUERIES)
    assert "datetime" in capsys.readouterr().out
