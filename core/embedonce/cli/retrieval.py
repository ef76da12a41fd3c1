"""Retrieval sets, and what is measured on them: texts with identifiers, judgements, recall and nDCG."""

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
"""By document identifier: how relevant it is to one query; what is missing is not."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts and their identifiers, by position."""

    ids: list[str]
    texts: list[str]


@dataclass(frozen=True, slots=True)
class Measured:
    """One dtype on one retrieval set. Recall, nDCG and ``same`` are means over the queries, from 0 to 1."""

    dtype: Dtype
    recall: float
    ndcg: float
    same: float
    """Which part of the k documents that float32 finds are found."""
    bytes: int
    """Of a frame without metadata."""
    write_us: float
    """Microseconds to round an entry and make its frame."""
    read_us: float
    """Microseconds to check a frame and read its vector."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What ``--json`` prints."""

    provider: str
    model: str
    dimensions: int
    documents: int
    queries: int
    """Those that count: with a relevant document."""
    k: int
    truth: str
    """``qrels`` or ``float32``."""
    computed: int
    """Texts that no tier had."""
    seconds: float
    """It took to get all vectors."""
    dtypes: list[Measured]


def read_texts(file: Path) -> Texts:
    """Read texts from JSON Lines with ``_id`` (or ``id``), ``text`` and perhaps ``title``, or from a text, one a line.

    A title is put before the text, as BEIR does. Without an identifier, and in a text, the line number is it.

    Raises:
        Refused: a line is not one of these; the message names it.
    """
    ids: list[str] = []
    texts: list[str] = []
    as_json = file.suffix.lower() in JSON_LINES
    for number, line in _lines(file):
        record = _object(file, number, line) if as_json else {"text": line}
        text, title = record.get("text"), record.get("title")
        if not isinstance(text, str) or not text.strip():
            raise Refused(f'{file}:{number}: no "text" that is a string with something in it')
        ids.append(str(record.get("_id", record.get("id", number))))
        texts.append(f"{title} {text}" if isinstance(title, str) and title else text)
    if not texts:
        raise Refused(f"{file}: no texts")
    if len(set(ids)) < len(ids):
        double = next(one for i, one in enumerate(ids) if one in ids[:i])
        raise Refused(f"{file}: two texts with the identifier {double!r}")
    return Texts(ids, texts)


def read_judgements(file: Path, queries: Texts, corpus: Texts) -> dict[str, dict[str, float]]:
    """Read judgements, by query: tab-separated query, document and score, as BEIR has them, or JSON Lines of
    ``query-id``, ``corpus-id`` and ``score``. A score that is missing is 1; a score of 0 or less is not relevant.

    Raises:
        Refused: a line is not one of these, or names a query or document that is not there.
    """
    judged: dict[str, dict[str, float]] = {}
    known = (set(queries.ids), set(corpus.ids))
    for number, (query, document, score) in _judgements(file):
        for name, ids, what in ((query, known[0], "query"), (document, known[1], "document")):
            if name not in ids:
                raise Refused(f"{file}:{number}: there is no {what} with the identifier {name!r}")
        if score > 0:
            judged.setdefault(query, {})[document] = score
    if not judged:
        raise Refused(f"{file}: no query has a relevant document")
    return judged


def _judgements(file: Path) -> Iterator[tuple[int, tuple[str, str, float]]]:
    for number, line in _lines(file):
        if file.suffix.lower() in JSON_LINES:
            record = _object(file, number, line)
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
            raise Refused(f"{file}:{number}: a query, a document and a number are expected") from None
        yield number, (str(query), str(document), score)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers from 1."""
    try:
        content = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"{file}: not UTF-8 at byte {error.start + 1}") from None
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r")


def _object(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise Refused(f"{file}:{number}: not a JSON object")
    return record


# --- measures ---------------------------------------------------------------------------------


def recall(ranked: Sequence[str], gains: Gains) -> float:
    """Return which part of the relevant documents is among the ranked ones."""
    return sum(document in gains for document in ranked) / len(gains)


def ndcg(ranked: Sequence[str], gains: Gains) -> float:
    """Return the normalised discounted cumulative gain of a ranking, from 0 to 1.

    A document at rank r (from 1) counts its gain over log2(r + 1), as trec_eval has it; 1 is the best order there is.
    """
    found = _discounted([gains.get(document, 0.0) for document in ranked])
    return found / _discounted(sorted(gains.values(), reverse=True)[: len(ranked)])


def _discounted(gains: Sequence[float]) -> float:
    return math.fsum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))
