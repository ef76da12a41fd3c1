"""The near-duplicates example finds most edited copies and few other texts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "near_duplicates.py"


@pytest.mark.timeout(500)  # it embeds and compares thousands of texts
def test_most_edited_copies_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("near_duplicates", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    scores = example.main()
    assert scores["nearest"] > 0.97
    assert scores["recall"] > 0.95
    assert scores["precision"] > 0.8
    printed = capsys.readouterr().out
    assert "threshold  precision  recall" in printed
    assert "near-duplicates in the library itself" in printed
