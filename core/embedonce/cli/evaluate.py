"""``embedonce evaluate``: compare the retrieval quality and the size of float32, float16 and int8 vectors."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedonce._messages import format_count

from .options import ConfigOption, JsonOption
from .output import Failed, emit, make_table, say, show
from .retrieval import DtypeResult, Evaluation, Gains, Texts, ndcg, read_judgements, read_texts, recall

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from embedonce.cache import Cache
    from embedonce.vectors import Dtype

EPILOG = """
Examples:

embedonce evaluate corpus.jsonl queries.jsonl --qrels qrels.tsv

embedonce evaluate corpus.jsonl queries.jsonl -k 20 --plot precision.png

The files have the format of a BEIR data set, or are plain text with one document or query per line. Without --qrels,
a document counts as relevant if a search with float32 vectors finds it. The vectors are computed once, as float32, and
stored in the tiers like the vectors of any other command.
"""

DTYPES: tuple[Dtype, ...] = ("float32", "float16", "int8")
CHUNK = 256
"""Number of entries per write and per read. This number is similar to the batch size of a tier."""
REPEATS = 5
"""Number of times that each operation is timed. Only the shortest time is used, because other load on the machine can
make an operation slower, but never faster."""


def evaluate(
    corpus: Annotated[
        Path, typer.Argument(metavar="CORPUS", help="The documents: .jsonl, or one per line.", show_default=False)
    ],
    queries: Annotated[
        Path, typer.Argument(metavar="QUERIES", help="The queries: .jsonl, or one per line.", show_default=False)
    ],
    qrels: Annotated[
        Path | None,
        typer.Option("--qrels", metavar="FILE", help="The relevant documents: .jsonl, or tab-separated as in BEIR."),
    ] = None,
    k: Annotated[
        int,
        typer.Option(
            "-k", metavar="N", min=1, help="Measure recall and nDCG on the N documents nearest to each query."
        ),
    ] = 10,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Also write the results as a plot: .png, .svg or .pdf."),
    ] = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Compare float32, float16 and int8 on a retrieval set: recall, nDCG, bytes and time."""
    if plot is not None:
        from .plot import check_plot

        check_plot(plot)
    documents, wanted = read_texts(corpus), read_texts(queries)
    judged = None if qrels is None else read_judgements(qrels, wanted, documents)
    if judged is not None:
        wanted = _keep_judged(wanted, judged)
    evaluation = _evaluate_dtypes(config, documents, wanted, judged, k)
    if plot is not None:
        from .evaluation_plot import draw_evaluation

        draw_evaluation(evaluation, plot)
        say(f"wrote {plot}")
    if json:
        emit(asdict(evaluation))
    else:
        _show(evaluation)


def _keep_judged(texts: Texts, judged: dict[str, Any]) -> Texts:
    """Return the queries that have a relevant document, and report the number of all other queries."""
    kept = [i for i, one in enumerate(texts.ids) if one in judged]
    if len(kept) < len(texts.ids):
        left_out = format_count(len(texts.ids) - len(kept), "query", "queries")
        say(f"skipping {left_out} without a relevant document")
    return Texts([texts.ids[i] for i in kept], [texts.texts[i] for i in kept])


def _evaluate_dtypes(
    source: str | None, documents: Texts, wanted: Texts, judged: Mapping[str, Gains] | None, k: int
) -> Evaluation:
    """Embed all texts once, and measure every dtype on the same vectors."""
    from embedonce.config import compose

    from .opened import load_config, translate_tier_errors

    loaded = load_config(source)
    if loaded.cache.dtype != "float32":
        say(
            f"The configuration rounds vectors to {loaded.cache.dtype}, but this run needs and stores float32. "
            "A text is embedded again if the tiers have only a coarser vector."
        )
        loaded = replace(loaded, cache=replace(loaded.cache, dtype="float32"))
    start = time.perf_counter()
    with translate_tier_errors(loaded), compose(loaded) as cache:
        rows, queries = _embed_texts(cache, documents, "document"), _embed_texts(cache, wanted, "query")
        seconds = time.perf_counter() - start
        space = cache.provider.space("document")
        computed = sum(provider.texts for provider in cache.stats().providers.values())
    k = min(k, len(rows))
    rankings: dict[Dtype, tuple[NDArray[Any], int, float, float]] = {
        dtype: _measure_dtype(dtype, rows, queries, k) for dtype in DTYPES
    }
    names: dict[Dtype, list[list[str]]] = {
        dtype: [[documents.ids[i] for i in row] for row in found[0].tolist()] for dtype, found in rankings.items()
    }
    finest = [dict.fromkeys(row, 1.0) for row in names["float32"]]
    truth = finest if judged is None else [judged[query] for query in wanted.ids]
    return Evaluation(
        provider=space.provider,
        model=space.model,
        dimensions=rows.shape[1],
        documents=len(rows),
        queries=len(queries),
        k=k,
        truth="float32" if judged is None else "qrels",
        computed=computed,
        seconds=seconds,
        dtypes=[
            DtypeResult(
                dtype=dtype,
                recall=_average([recall(*pair) for pair in zip(names[dtype], truth, strict=True)]),
                ndcg=_average([ndcg(*pair) for pair in zip(names[dtype], truth, strict=True)]),
                same=_average([recall(*pair) for pair in zip(names[dtype], finest, strict=True)]),
                bytes=size,
                write_us=write,
                read_us=read,
            )
            for dtype, (_, size, write, read) in rankings.items()
        ],
    )


def _embed_texts(cache: Cache, texts: Texts, task: str) -> NDArray[Any]:
    """Return the vectors of all texts, shape (n, d).

    Raises:
        Failed: a text could not be embedded.
    """
    from .embedding.failures import describe_error

    fetched = cache.fetch(texts.texts, task=task)
    for position, error in fetched.failed.items():
        number = format_count(len(fetched.failed), task, "queries" if task == "query" else "")
        reason = describe_error(error, texts.texts[position])
        raise Failed(f"{number} could not be embedded; the first is {texts.ids[position]!r}: {reason}")
    return fetched.vectors


def _measure_dtype(
    dtype: Dtype, rows: NDArray[Any], queries: NDArray[Any], k: int
) -> tuple[NDArray[Any], int, float, float]:
    """Write all documents as frames, read them back as a tier does, and search the vectors that were read.

    Return four values: the indices of the documents that the search found, with shape (queries, k); the number of bytes
    of a frame; the microseconds to write an entry; and the microseconds to read an entry. The queries are rounded as
    well, because a cache rounds every vector that it returns.
    """
    import numpy as np

    from embedonce.similarity import top_k
    from embedonce.vectors import Entry, decode_frames, encode_frames, freeze_rows, round_vectors

    read_back = np.empty(rows.shape, np.float32)
    writing = reading = 0.0
    size = 0
    for start_row in range(0, len(rows), CHUNK):
        chunk = rows[start_row : start_row + CHUNK]
        frames: dict[str, bytes] = {}
        decoded: dict[str, Entry] = {}
        # Keys must have the usual length; their content does not matter.
        keys = [f"eo1.{0:016x}.{start_row + i:064x}" for i in range(len(chunk))]
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
        read_back[start_row : start_row + CHUNK] = [decoded[key].vector for key in keys]
        writing, reading, size = writing + write, reading + read, len(frames[keys[0]])
    indices, _ = top_k(round_vectors(queries, dtype), read_back, k)
    return indices, size, 1e6 * writing / len(rows), 1e6 * reading / len(rows)


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _show(evaluation: Evaluation) -> None:
    truth = "the given judgements" if evaluation.truth == "qrels" else "the results of float32"
    documents = format_count(evaluation.documents, "document")
    queries = format_count(evaluation.queries, "query", "queries")
    show(
        f"{evaluation.provider}, model {evaluation.model}, {evaluation.dimensions} dimensions",
        f"{documents}, {queries}, measured against {truth}",
        f"{evaluation.computed:,} computed, {evaluation.seconds:,.1f} s",
        "",
    )
    titles = [
        "dtype",
        f"recall@{evaluation.k}",
        f"nDCG@{evaluation.k}",
        f"first {evaluation.k} as float32",
        "bytes",
        "write µs",
        "read µs",
    ]
    rows = [
        [
            result.dtype,
            *(f"{100 * part:.2f} %" for part in (result.recall, result.ndcg, result.same)),
            result.bytes,
            *(f"{time:.1f}" for time in (result.write_us, result.read_us)),
        ]
        for result in evaluation.dtypes
    ]
    show(make_table({title: "left" if title == "dtype" else "right" for title in titles}, rows))
