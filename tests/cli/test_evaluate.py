"""``embedonce evaluate``: reading the files, measuring, and refusing invalid input."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optional import needs

import embedonce
from embedonce.cli.evaluate import DTYPES
from embedonce.cli.retrieval import ndcg, read_judgements, read_texts, recall
from embedonce.vectors import Entry, encode_frames, round_vectors
from embedonce_providers.ngram import NgramProvider

DOCUMENTS = [
    f"The {what} of {where} is {how}."
    for what in ("roof", "garden", "cellar", "door", "stove")
    for where in ("the old house", "a farm", "that castle")
    for how in ("red", "cold", "far away")
]
QUERIES = ["the old roof is red", "a cold cellar", "castle garden", "nothing that anybody asked for"]


@pytest.fixture
def files(folder: Path) -> Path:
    (folder / "embedonce.toml").write_text('[provider]\ntype = "ngram"\n\n[[tiers]]\ntype = "disk"\npath = "v"\n')
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(DOCUMENTS)])
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": text} for i, text in enumerate(QUERIES)])
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t2\nq0\td1\t1\nq1\td19\t1\nq2\td15\t0\n")
    return folder


def write_jsonl(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def rank_by_hand(k: int) -> dict[str, list[list[int]]]:
    """Return the documents that each dtype ranks first, computed with whole matrices and Python's sort."""
    found = {}
    with embedonce.Cache(NgramProvider()) as cache:
        documents, queries = cache.embed_batch(DOCUMENTS), cache.embed_batch(QUERIES, task="query")
    for dtype in DTYPES:
        rows, asked = (round_vectors(matrix, dtype).astype(np.float64) for matrix in (documents, queries))
        rows /= np.linalg.norm(rows, axis=1)[:, None]
        asked /= np.linalg.norm(asked, axis=1)[:, None]
        scores = (asked @ rows.T).astype(np.float32)
        found[dtype] = [sorted(range(len(rows)), key=lambda i, s=row: (-s[i], i))[:k] for row in scores]
    return found


def test_it_measures_against_judgements(command: Any, files: Path) -> None:
    done = command("evaluate", "corpus.jsonl", "queries.jsonl", "--qrels", "qrels.tsv", "-k", "3", "--json")
    assert done.code == 0, done.err
    assert "skipping 2 queries without a relevant document" in done.err
    report = done.json
    assert (report["documents"], report["queries"], report["k"], report["truth"]) == (45, 2, 3, "qrels")
    assert (report["dimensions"], report["computed"]) == (256, 47)
    found = rank_by_hand(3)
    for one in report["dtypes"]:
        mine = found[one["dtype"]]
        first = len({0, 1} & set(mine[0])) / 2
        assert one["recall"] == pytest.approx((first + (19 in mine[1])) / 2)
        gains = sum({0: 2.0, 1: 1.0}.get(i, 0.0) / math.log2(rank + 2) for rank, i in enumerate(mine[0]))
        best = 2.0 + 1.0 / math.log2(3)
        second = sum((i == 19) / math.log2(rank + 2) for rank, i in enumerate(mine[1]))
        assert one["ndcg"] == pytest.approx((gains / best + second) / 2)
        alike = [len(set(a) & set(b)) / 3 for a, b in zip(mine[:2], found["float32"][:2], strict=True)]
        assert one["same"] == pytest.approx(sum(alike) / 2)
        frame = encode_frames({"k": Entry(np.ones(256, np.float32), 0.0, None, None, one["dtype"])})["k"]
        assert one["bytes"] == len(frame)
        assert one["write_us"] > 0
        assert one["read_us"] > 0


def test_without_judgements_the_results_of_float32_are_relevant(command: Any, files: Path) -> None:
    done = command("evaluate", "corpus.jsonl", "queries.jsonl", "--json")
    report = done.json
    assert (report["queries"], report["truth"]) == (4, "float32")
    finest = report["dtypes"][0]
    assert (finest["recall"], finest["ndcg"], finest["same"]) == (1.0, 1.0, 1.0)
    assert all(one["recall"] == one["same"] for one in report["dtypes"])
    found = rank_by_hand(10)
    alike = [len(set(a) & set(b)) / 10 for a, b in zip(found["int8"], found["float32"], strict=True)]
    assert report["dtypes"][2]["same"] == pytest.approx(sum(alike) / 4)


def test_the_vectors_are_computed_once(command: Any, files: Path) -> None:
    assert command("evaluate", "corpus.jsonl", "queries.jsonl", "--json").json["computed"] == 49
    done = command("evaluate", "corpus.jsonl", "queries.jsonl")
    assert done.code == 0
    assert "0 computed" in done.out
    lines = [line.split() for line in done.out.splitlines()]
    assert [line[0] for line in lines if line and line[0] in DTYPES] == list(DTYPES)
    assert "45 documents, 4 queries, measured against the results of float32" in done.out


def test_a_cache_that_rounds_is_measured_from_float32_vectors(command: Any, files: Path) -> None:
    config = files / "embedonce.toml"
    config.write_text('[cache]\ndtype = "int8"\n' + config.read_text())
    assert command("embed", "corpus.jsonl", "--out", "out.npy").code == 0
    done = command("evaluate", "corpus.jsonl", "queries.jsonl", "--json")
    assert "rounds vectors to int8" in done.err
    assert done.json["computed"] == 49
    assert done.json["dtypes"][2]["same"] == pytest.approx(
        np.mean(
            [
                len(set(a) & set(b)) / 10
                for a, b in zip(rank_by_hand(10)["int8"], rank_by_hand(10)["float32"], strict=True)
            ]
        )
    )


def test_texts_and_judgements_are_read_in_every_format(folder: Path) -> None:
    (folder / "plain.txt").write_text("\ufeffone\r\n\r\ntwo\n")
    assert read_texts(folder / "plain.txt").ids == ["1", "3"]
    assert read_texts(folder / "plain.txt").texts == ["one", "two"]
    write_jsonl(folder / "c.jsonl", [{"id": 7, "text": "b", "title": "A"}, {"text": "c", "title": ""}])
    corpus = read_texts(folder / "c.jsonl")
    assert (corpus.ids, corpus.texts) == (["7", "2"], ["A b", "c"])
    write_jsonl(
        folder / "r.jsonl", [{"query-id": "1", "corpus-id": 7}, {"query-id": 3, "corpus-id": "2", "score": 0.5}]
    )
    queries = read_texts(folder / "plain.txt")
    assert read_judgements(folder / "r.jsonl", queries, corpus) == {"1": {"7": 1.0}, "3": {"2": 0.5}}
    (folder / "r.tsv").write_text("1\t7\n3\t2\t-1\n")
    assert read_judgements(folder / "r.tsv", queries, corpus) == {"1": {"7": 1.0}}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", "{}\n", 'corpus.jsonl:1: "text" must be a string that is not blank'),
        ("corpus.jsonl", '{"text": "a"}\n[1]\n', "corpus.jsonl:2: not a JSON object"),
        ("corpus.jsonl", "", "corpus.jsonl: contains no texts"),
        ("corpus.jsonl", '{"_id": 1, "text": "a"}\n{"_id": "1", "text": "b"}\n', "two texts have the identifier '1'"),
        ("qrels.tsv", "q0\n", "qrels.tsv:1: expected a query, a document and a finite number"),
        ("qrels.tsv", "q0\td0\tnan\n", "qrels.tsv:1: expected a query, a document and a finite number"),
        ("qrels.tsv", "q9\td0\t1\n", "qrels.tsv:1: there is no query with the identifier 'q9'"),
        ("qrels.tsv", "q0\td0\t0\n", "no query has a relevant document"),
    ],
)
def test_an_invalid_file_is_refused_before_anything_is_computed(
    command: Any, files: Path, name: str, content: str, message: str
) -> None:
    (files / name).write_text(content)
    done = command("evaluate", "corpus.jsonl", "queries.jsonl", "--qrels", "qrels.tsv")
    assert done.code == 2
    assert message in done.err
    assert not (files / "v").exists(), "nothing was computed"


def test_bytes_that_are_not_utf8_are_refused(command: Any, files: Path) -> None:
    (files / "queries.jsonl").write_bytes(b'{"text": "\xff"}\n')
    done = command("evaluate", "corpus.jsonl", "queries.jsonl")
    assert (done.code, done.out) == (2, "")
    assert "queries.jsonl: not UTF-8 at byte 11" in done.err
    assert command("evaluate", "gone.jsonl", "queries.jsonl").code == 1


def test_a_text_that_the_provider_refuses(command: Any, files: Path) -> None:
    config = files / "embedonce.toml"
    config.write_text('[cache]\nmode = "replay"\n' + config.read_text())
    done = command("evaluate", "corpus.jsonl", "queries.jsonl")
    assert done.code == 1
    assert "45 documents could not be embedded; the first is 'd0': " in done.err
    assert "roof" not in done.err


@needs("matplotlib")
def test_a_plot(command: Any, files: Path) -> None:
    for name, begins in (("p.png", b"\x89PNG"), ("p.svg", b"<?xml"), ("p.pdf", b"%PDF")):
        done = command("evaluate", "corpus.jsonl", "queries.jsonl", "--plot", name)
        assert done.code == 0, done.err
        assert (files / name).read_bytes().startswith(begins)
    svg = (files / "p.svg").read_text()
    assert "float16" in svg


def test_a_plot_that_cannot_be_drawn(command: Any, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        "must end in one of .pdf, .png, .svg"
        in command("evaluate", "corpus.jsonl", "queries.jsonl", "--plot", "p.jpg").err
    )
    assert (
        "the folder x does not exist" in command("evaluate", "corpus.jsonl", "queries.jsonl", "--plot", "x/p.png").err
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    done = command("evaluate", "corpus.jsonl", "queries.jsonl", "--plot", "p.png")
    assert done.code == 2
    assert "pip install 'embedonce[plot]'" in done.err
    assert not (files / "v").exists()


def test_measures() -> None:
    gains = {"a": 3.0, "b": 1.0}
    assert recall(["x", "b"], gains) == 0.5
    assert ndcg(["a", "b"], gains) == pytest.approx(1.0)
    assert ndcg(["b", "a"], gains) == pytest.approx((1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)))
    assert ndcg(["x", "y"], gains) == 0.0
    assert ndcg(["a"], gains) == pytest.approx(1.0), "only one document fits"
