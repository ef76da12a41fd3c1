"""The retrieval set of the standard library's docstrings is valid input for ``embedonce evaluate``."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embedonce.cli import app

EXAMPLE = Path(__file__).parents[2] / "examples" / "docstrings.py"


@pytest.mark.timeout(500)  # it embeds and compares thousands of texts
def test_it_makes_a_set_for_evaluate(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("docstrings", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(tmp_path)
    corpus, queries = (
        [json.loads(line)["text"] for line in (tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("corpus", "queries")
    )
    assert len(corpus) == len(queries) > 1000
    assert sum(query in document for query, document in zip(queries, corpus, strict=True)) < len(queries) / 100
    (tmp_path / "embedonce.toml").write_text('tiers = []\n\n[provider]\ntype = "ngram"\n')
    files = [str(tmp_path / name) for name in ("corpus.jsonl", "queries.jsonl")]
    options = ["--qrels", str(tmp_path / "qrels.tsv"), "--config", str(tmp_path / "embedonce.toml"), "--json"]
    done = CliRunner().invoke(app, ["evaluate", *files, *options])
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["queries"] == len(queries)
    recalls = [one["recall"] for one in report["dtypes"]]
    assert recalls[0] > 0.2, "shared words alone find some of the documents"
    assert max(recalls) - min(recalls) < 0.02
