"""Reading retrieval sets (texts with identifiers, and judgements), and measuring recall and nDCG on them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .output import Refused

if TYPE_CHECKING:
    from embedonce.vectors import Dtype

JSON_LINES = (".jsonl", ".ndjson")

Gains: TypeAlias = Mapping[str, float]
"""Relevance of documents to one query, by document identifier. A missing document is not relevant."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts and their identifiers; ``ids[i]`` belongs to ``texts[i]``."""

    ids: list[str]
    texts: list[str]


@dataclass(frozen=True, slots=True)
class DtypeResult:
    """Results of one dtype on one retrieval set. Recall, nDCG and ``same`` are means over the queries, from 0 to 1."""

    dtype: Dtype
    recall: float
    ndcg: float
    same: float
    """Of the k documents that a search with float32 finds, the share that a search with this dtype also finds."""
    bytes: int
    """Bytes of a frame without metadata."""
    write_us: float
    """Microseconds to round the vector of an entry and make its frame."""
    read_us: float
    """Microseconds to check the frame of an entry and read its vector."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The document that ``--json`` prints."""

    provider: str
    model: str
    dimensions: int
    documents: int
    queries: int
    """Number of queries that were measured. Queries without a relevant document are skipped."""
    k: int
    truth: str
    """Source of the relevant documents: ``qrels`` or ``float32``."""
    computed: int
    """Number of texts that the provider embedded, because no tier had their vectors."""
    seconds: float
    """Seconds to get all vectors."""
    dtypes: list[DtypeResult]


def read_texts(file: Path) -> Texts:
    """Read texts from a JSON Lines file, or from a plain text file with one text per line.

    A JSON object has the text as ``text``, its identifier as ``_id`` or ``id``, and optionally a ``title``. A title is
    put before the text, as in BEIR. A text without an identifier gets its line number as its identifier.

    Raises:
        Refused: a line is invalid; the message contains the line number.
    """
    ids: list[str] = []
    texts: list[str] = []
    as_json = file.suffix.lower() in JSON_LINES
    for number, line in _read_lines(file):
        record = _parse_object(file, number, line) if as_json else {"text": line}
        text, title = record.get("text"), record.get("title")
        if not isinstance(text, str) or not text.strip():
            raise Refused(f'{file}:{number}: "text" must be a string that is not blank')
        ids.append(str(record.get("_id", record.get("id", number))))
        texts.append(f"{title} {text}" if isinstance(title, str) and title else text)
    if not texts:
        raise Refused(f"{file}: contains no texts")
    if len(set(ids)) < len(ids):
        duplicate = next(one for i, one in enumerate(ids) if one in ids[:i])
        raise Refused(f"{file}: two texts have the identifier {duplicate!r}")
    return Texts(ids, texts)


def read_judgements(file: Path, queries: Texts, corpus: Texts) -> dict[str, dict[str, float]]:
    """Read judgements and return the relevant documents by query.

    A tab-separated file has the columns query, document and score, as in BEIR. An object of a JSON Lines file has the
    fields ``query-id``, ``corpus-id`` and ``score``. A missing score counts as 1. A document with a score of 0 or less
    is not relevant.

    Raises:
        Refused: a line is invalid, or it names an unknown query or document.
    """
    judged: dict[str, dict[str, float]] = {}
    known = (set(queries.ids), set(corpus.ids))
    for number, (query, document, score) in _parse_judgements(file):
        for name, ids, kind in ((query, known[0], "query"), (document, known[1], "document")):
            if name not in ids:
                raise Refused(f"{file}:{number}: there is no {kind} with the identifier {name!r}")
        if score > 0:
            judged.setdefault(query, {})[document] = score
    if not judged:
        raise Refused(f"{file}: no query has a relevant document")
    return judged


def _parse_judgements(file: Path) -> Iterator[tuple[int, tuple[str, str, float]]]:
    for number, line in _read_lines(file):
        if file.suffix.lower() in JSON_LINES:
            record = _parse_object(file, number, line)
            fields = [record.get("query-id"), record.get("corpus-id"), record.get("score", 1)]
        else:
            fields = list(next(csv.reader([line], delimiter="\t", quoting=csv.QUOTE_NONE)))
            if number == 1 and fields[:1] == ["query-id"]:
                continue
        try:
            query, document, *rest = fields
            score = float(rest[0]) if rest else 1.0
            if query is None or document is None or not math.isfinite(score):
                raise ValueError
        except (TypeError, ValueError):
            raise Refused(f"{file}:{number}: expected a query, a document and a finite number") from None
        yield number, (str(query), str(document), score)


def _read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the number (from 1) and the text of each line that is not blank."""
    try:
        content = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"{file}: not UTF-8 at byte {error.start + 1}") from None
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r")


def _parse_object(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise Refused(f"{file}:{number}: not a JSON object")
    return record


# --- measures ---------------------------------------------------------------------------------


def recall(ranked: Sequence[str], gains: Gains) -> float:
    """Return the share of the relevant documents that are among the ranked documents."""
    return sum(document in gains for document in ranked) / len(gains)


def ndcg(ranked: Sequence[str], gains: Gains) -> float:
    """Return the normalised discounted cumulative gain of a ranking, from 0 to 1.

    A document at rank r (from 1) adds its gain divided by log2(r + 1), as in trec_eval. The best possible
    order has the value 1.
    """
    found = _sum_discounted([gains.get(document, 0.0) for document in ranked])
    return found / _sum_discounted(sorted(gains.values(), reverse=True)[: len(ranked)])


def _sum_discounted(gains: Sequence[float]) -> float:
    return math.fsum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))
