"""``embedonce evaluate``: what storing vectors in fewer bits costs in retrieval, and what it saves."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import ConfigOption, JsonOption
from .output import Failed, count, emit, say, show, table
from .retrieval import Evaluation, Gains, Measured, Texts, ndcg, read_judgements, read_texts, recall

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from embedonce.cache import Cache
    from embedonce.vectors import Dtype

EPILOG = """
Examples:

embedonce evaluate corpus.jsonl queries.jsonl --qrels qrels.tsv

embedonce evaluate corpus.jsonl queries.jsonl -k 20 --plot precision.png

The files are those of a BEIR data set, or texts with one document and one query a line. Without --qrels the truth is
what float32 finds. The vectors are computed once, as float32, and stored in the tiers as by any other run.
"""

DTYPES: tuple[Dtype, ...] = ("float32", "float16", "int8")
CHUNK = 256
"""Entries that are written and read at a time, as a tier does."""
REPEATS = 5
"""Of which the quickest counts: what else the machine does only ever makes one slower."""


def evaluate(
    corpus: Annotated[
        Path, typer.Argument(metavar="CORPUS", help="The documents: .jsonl, or one a line.", show_default=False)
    ],
    queries: Annotated[
        Path, typer.Argument(metavar="QUERIES", help="The queries: .jsonl, or one a line.", show_default=False)
    ],
    qrels: Annotated[
        Path | None,
        typer.Option("--qrels", metavar="FILE", help="What is relevant: .jsonl, or tab-separated as BEIR has it."),
    ] = None,
    k: Annotated[int, typer.Option("-k", metavar="N", min=1, help="Look at the first N documents of each query.")] = 10,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the table: .png, .svg or .pdf.")
    ] = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Compare float32, float16 and int8 on a retrieval set: recall, nDCG, bytes and time."""
    if plot is not None:
        from .plot import check_plot

        check_plot(plot)
    documents, asked = read_texts(corpus), read_texts(queries)
    judged = None if qrels is None else read_judgements(qrels, asked, documents)
    if judged is not None:
        asked = _only(asked, judged)
    evaluation = _evaluated(config, documents, asked, judged, k)
    if plot is not None:
        from .plot import draw

        draw(evaluation, plot)
        say(f"wrote {plot}")
    if json:
        emit(asdict(evaluation))
    else:
        _show(evaluation)


def _only(texts: Texts, judged: dict[str, Any]) -> Texts:
    """Leave out the queries of which nothing is known."""
    kept = [i for i, one in enumerate(texts.ids) if one in judged]
    if len(kept) < len(texts.ids):
        say(f"{count(len(texts.ids) - len(kept), 'query', 'queries')} without a relevant document left out")
    return Texts([texts.ids[i] for i in kept], [texts.texts[i] for i in kept])


def _evaluated(
    source: str | None, documents: Texts, asked: Texts, judged: Mapping[str, Gains] | None, k: int
) -> Evaluation:
    from embedonce.config import compose

    from .opened import load, telling

    loaded = load(source)
    if loaded.cache.dtype != "float32":
        say(
            f"The configuration rounds to {loaded.cache.dtype}; this keeps float32, and computes again what is coarser."
        )
        loaded = replace(loaded, cache=replace(loaded.cache, dtype="float32"))
    start = time.perf_counter()
    with telling(loaded), compose(loaded) as cache:
        rows, wanted = _embedded(cache, documents, "document"), _embedded(cache, asked, "query")
        seconds = time.perf_counter() - start
        space = cache.provider.space("document")
        computed = sum(one.texts for one in cache.stats().providers.values())
    k = min(k, len(rows))
    rankings: dict[Dtype, tuple[NDArray[Any], int, float, float]] = {
        dtype: _measured(dtype, rows, wanted, k) for dtype in DTYPES
    }
    names: dict[Dtype, list[list[str]]] = {
        dtype: [[documents.ids[i] for i in row] for row in found[0].tolist()] for dtype, found in rankings.items()
    }
    finest = [dict.fromkeys(row, 1.0) for row in names["float32"]]
    truth = finest if judged is None else [judged[one] for one in asked.ids]
    return Evaluation(
        provider=space.provider,
        model=space.model,
        dimensions=rows.shape[1],
        documents=len(rows),
        queries=len(wanted),
        k=k,
        truth="float32" if judged is None else "qrels",
        computed=computed,
        seconds=seconds,
        dtypes=[
            Measured(
                dtype=dtype,
                recall=_mean([recall(*pair) for pair in zip(names[dtype], truth, strict=True)]),
                ndcg=_mean([ndcg(*pair) for pair in zip(names[dtype], truth, strict=True)]),
                same=_mean([recall(*pair) for pair in zip(names[dtype], finest, strict=True)]),
                bytes=size,
                write_us=write,
                read_us=read,
            )
            for dtype, (_, size, write, read) in rankings.items()
        ],
    )


def _embedded(cache: Cache, texts: Texts, task: str) -> NDArray[Any]:
    from .embedding.run import reason

    fetched = cache.fetch(texts.texts, task=task)
    for position, error in fetched.failed.items():
        raise Failed(
            f"{count(len(fetched.failed), task, 'queries' if task == 'query' else '')} could not be embedded, first "
            f"{texts.ids[position]!r}: {reason(error, texts.texts[position])}"
        )
    return fetched.vectors


def _measured(dtype: Dtype, rows: NDArray[Any], wanted: NDArray[Any], k: int) -> tuple[NDArray[Any], int, float, float]:
    """Write all documents as frames and read them back, as a tier does, and search in what was read.

    Returns the indices found, shape (queries, k), the bytes of a frame, and the microseconds an entry took to write
    and to read. A query is rounded as well: a cache rounds everything that it returns.
    """
    import numpy as np

    from embedonce.similarity import top_k
    from embedonce.vectors import Entry, decode_frames, encode_frames, freeze_rows, round_vectors

    read_back = np.empty(rows.shape, np.float32)
    writing = reading = 0.0
    size = 0
    for at in range(0, len(rows), CHUNK):
        chunk = rows[at : at + CHUNK]
        frames: dict[str, bytes] = {}
        decoded: dict[str, Entry] = {}
        # As long as a key; which one does not matter to a frame.
        keys = [f"eo1.{0:016x}.{at + i:064x}" for i in range(len(chunk))]
        write = read = float("inf")
        for _ in range(REPEATS):
            start = time.perf_counter()
            vectors = freeze_rows(round_vectors(chunk, dtype))
            entries = [Entry(vector, 0.0, None, None, dtype) for vector in vectors]
            frames.update(encode_frames(dict(zip(keys, entries, strict=True))))
            middle = time.perf_counter()
            decoded.update(decode_frames(frames, now=1.0, dtype=dtype, dimensions=rows.shape[1]).entries)
            end = time.perf_counter()
            write, read = min(write, middle - start), min(read, end - middle)
        read_back[at : at + CHUNK] = [decoded[key].vector for key in keys]
        writing, reading, size = writing + write, reading + read, len(frames[keys[0]])
    indices, _ = top_k(round_vectors(wanted, dtype), read_back, k)
    return indices, size, 1e6 * writing / len(rows), 1e6 * reading / len(rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _show(evaluation: Evaluation) -> None:
    one = evaluation
    by = "the given judgements" if one.truth == "qrels" else "what float32 finds"
    show(
        f"{one.provider}, model {one.model}, {one.dimensions} dimensions",
        f"{count(one.documents, 'document')}, {count(one.queries, 'query', 'queries')}, measured by {by}",
        f"{one.computed:,} computed, {one.seconds:,.1f} s",
        "",
    )
    titles = ["dtype", f"recall@{one.k}", f"nDCG@{one.k}", f"first {one.k} as float32", "bytes", "write µs", "read µs"]
    rows = [
        [
            each.dtype,
            *(f"{100 * part:.2f} %" for part in (each.recall, each.ndcg, each.same)),
            each.bytes,
            *(f"{time:.1f}" for time in (each.write_us, each.read_us)),
        ]
        for each in one.dtypes
    ]
    show(table({title: "left" if title == "dtype" else "right" for title in titles}, rows))
