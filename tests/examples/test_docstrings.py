"""The retrieval set of the standard library's docstrings: it is well formed, and can be measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent.parent / "examples/docstrings.py"


def test_it_makes_a_set_that_evaluate_takes(tmp_path: Path) -> None:
    made = subprocess.run([sys.executable, EXAMPLE, tmp_path], capture_output=True, text=True, timeout=100)
    assert made.returncode == 0, made.stderr
    corpus, queries = (
        [json.loads(line)["text"] for line in (tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("corpus", "queries")
    )
    assert len(corpus) == len(queries) > 1000
    assert sum(query in document for query, document in zip(queries, corpus, strict=True)) < len(queries) / 100
    (tmp_path / "embedonce.toml").write_text('tiers = []\n\n[provider]\ntype = "ngram"\n')
    files = [str(tmp_path / name) for name in ("corpus.jsonl", "queries.jsonl")]
    options = ["--qrels", tmp_path / "qrels.tsv", "--config", tmp_path / "embedonce.toml", "--json"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "embedonce", "evaluate", *files, *options],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["queries"] == len(queries)
    recalls = [one["recall"] for one in told["dtypes"]]
    assert recalls[0] > 0.2, "shared words alone find some"
    assert max(recalls) - min(recalls) < 0.02
