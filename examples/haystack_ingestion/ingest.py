"""Ingestion with Haystack that does not embed unchanged documents again.

    python examples/haystack_ingestion/ingest.py

The documents are docstrings of Python's standard library, and the questions are their first lines. The script counts in
the model itself how many texts go through it. Run it twice: the second process computes only documents that you change.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")

from haystack import Document, Pipeline
from haystack.components.evaluators import DocumentRecallEvaluator
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack_integrations.components.embedders.sentence_transformers import (
    SentenceTransformersDocumentEmbedder,
    SentenceTransformersTextEmbedder,
)
from sentence_transformers import SentenceTransformer
from torch.nn.modules.module import register_module_forward_hook

from haystack_integrations.components.embedders.embedonce import CachedDocumentEmbedder, CachedTextEmbedder

CONFIG = Path(__file__).with_name("embedonce.toml")
MODULES = (
    "argparse calendar csv difflib heapq json logging pathlib pickle random shutil statistics tarfile textwrap zipfile"
)
TOP_K = 5

embedded_texts = 0
"""Number of texts that went through the model."""


def count_texts(module: Any, given: Any, output: Any) -> None:
    """Count the texts of a forward pass."""
    global embedded_texts
    if isinstance(module, SentenceTransformer):
        embedded_texts += len(given[0]["input_ids"])


def make_corpus(max_documents: int) -> tuple[list[Document], list[str]]:
    """Return documents, and for each the question that it answers."""
    documents: dict[str, Document] = {}
    for name in MODULES.split():
        module = importlib.import_module(name)
        for label, thing in sorted(vars(module).items()):
            if not label.startswith("_") and inspect.getmodule(thing) is module and (text := inspect.getdoc(thing)):
                question, _, content = text.partition("\n\n")
                if 20 < len(question) < 200 and len(content) > 60:
                    meta = {"name": f"{name}.{label}"}
                    documents.setdefault(question, Document(content=content[:600], meta=meta))
    questions = list(documents)[:max_documents]
    return [documents[question] for question in questions], questions


def ingest(embedder: Any, documents: Sequence[Document], label: str) -> InMemoryDocumentStore:
    """Write documents into a store through a pipeline, and print how many were computed and the time."""
    store = InMemoryDocumentStore()
    pipeline = Pipeline()
    pipeline.add_component("embedder", embedder)
    pipeline.add_component("writer", DocumentWriter(store))
    pipeline.connect("embedder.documents", "writer.documents")
    before, start = embedded_texts, time.perf_counter()
    output = pipeline.run({"embedder": {"documents": list(documents)}}, include_outputs_from={"embedder"})
    seconds = time.perf_counter() - start
    hits = output["embedder"].get("meta", {}).get("cache", {}).get("hits", {})
    found = ", ".join(f"{number} from {tier}" for tier, number in hits.items()) or "0 from the cache"
    without = sum(document.embedding is None for document in store.filter_documents())
    print(f"{label:<14}{embedded_texts - before:>4} through the model, {found}, {without} without, {seconds:.2f} s")
    return store


def retrieve(embedder: Any, store: InMemoryDocumentStore, questions: Sequence[str]) -> list[list[Document]]:
    """Return the documents nearest to each question."""
    pipeline = Pipeline()
    pipeline.add_component("embedder", embedder)
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=TOP_K))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    return [pipeline.run({"embedder": {"text": one}})["retriever"]["documents"] for one in questions]


def ids_and_scores(found: Sequence[Sequence[Document]]) -> list[list[tuple[str, float | None]]]:
    """Return the ids and scores of the documents that were found."""
    return [[(document.id, document.score) for document in documents] for documents in found]


def compare(options: dict[str, Any], config: Path, documents: list[Document], questions: list[str]) -> None:
    """Print how the cache affects retrieval, for each dtype of stored vectors."""
    plain = ingest(SentenceTransformersDocumentEmbedder(**options), documents, "no cache")
    expected = retrieve(SentenceTransformersTextEmbedder(**options), plain, questions)
    rows = [("no cache", expected)]
    for dtype in ("float32", "float16", "int8"):
        # Vectors that a tier holds with more precision are rounded when they are read.
        with patch.dict(os.environ, EMBEDONCE__CACHE__DTYPE=dtype):
            embedder = CachedDocumentEmbedder(SentenceTransformersDocumentEmbedder(**options), config=config)
            store = ingest(embedder, documents, dtype)
            query = CachedTextEmbedder(SentenceTransformersTextEmbedder(**options), config=config)
            rows.append((dtype, retrieve(query, store, questions)))
    truth = [[document] for document in documents]
    print(f"\nvectors   recall@{TOP_K}  same documents  same scores")
    for name, found in rows:
        recall = DocumentRecallEvaluator().run(ground_truth_documents=truth, retrieved_documents=found)["score"]
        same = sum(
            [one.id for one in mine] == [one.id for one in theirs] for mine, theirs in zip(found, expected, strict=True)
        )
        scores = "yes" if ids_and_scores(found) == ids_and_scores(expected) else "no"
        print(f"{name:<9} {recall:>8.3f}  {same:>5} of {len(found):<5}   {scores}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Ingest the documents once, like a job that runs every night."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="a name, or a folder")
    parser.add_argument("--documents", type=int, default=100, help="maximum number of documents")
    parser.add_argument("--change", type=int, default=0, metavar="N", help="change N of the documents")
    parser.add_argument("--compare", action="store_true", help="compare retrieval with and without a cache")
    chosen = parser.parse_args(arguments)
    options = {"model": chosen.model, "progress_bar": False}
    documents, questions = make_corpus(chosen.documents)
    current = [
        replace(one, content=f"{one.content}\n(changed at {time.time()})") if number < chosen.change else one
        for number, one in enumerate(documents)
    ]
    hook = register_module_forward_hook(count_texts)
    embedder = CachedDocumentEmbedder(SentenceTransformersDocumentEmbedder(**options), config=chosen.config)
    ingest(embedder, current, f"{len(current)} documents")
    embedder.close()  # waits for background writes
    if chosen.compare:
        compare(options, chosen.config, documents, questions)
    hook.remove()


if __name__ == "__main__":
    main()
