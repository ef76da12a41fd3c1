"""The top-k example finds what exact search finds, by the index."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "postgres_top_k.py"


def test_the_nearest_are_found_by_the_index(
    postgres_server: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("postgres_top_k", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    texts = example.read_docstrings()  # reading all of the standard library takes longest: once will do
    monkeypatch.setattr(example, "read_docstrings", lambda: dict(texts))
    for _ in range(2):  # it can be run again
        scores = example.main(postgres_server.url)
        assert scores["recall"] > 0.8
        assert scores["indexed"] == len(example.QUERIES)
    assert "datetime" in capsys.readouterr().out
