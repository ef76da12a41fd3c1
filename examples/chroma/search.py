"""Fill a Chroma collection without a cache, with a cold cache and with a warm one: the same answers at other costs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
from chromadb.api.types import Documents, EmbeddingFunction, Embeddings

from embedonce_integrations.chroma import CachedEmbeddingFunction
from embedonce_providers.ngram import NgramProvider

HERE = Path(__file__).parent
SPACE = {"model": "char-ngram", "dimensions": 256}  # a function from a module describes itself


class Ngrams(EmbeddingFunction[Documents]):
    """Stands in for your function. It needs no key and no download, finds near copies, and counts the texts it gets."""

    def __init__(self) -> None:
        self._provider = NgramProvider()
        self.texts = 0

    def __call__(self, input: Documents) -> Embeddings:
        self.texts += len(input)
        return list(self._provider.embed(input, "document"))

    @staticmethod
    def name() -> str:
        return "ngrams"

    def get_config(self) -> dict[str, Any]:
        return {"model": "char-ngram", "dimensions": 256}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> Ngrams:
        return Ngrams()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE.parents[1] / "docs", help="Markdown files")
    parser.add_argument("question", nargs="?", default="what happens when Redis is down?")
    parser.add_argument("--config", type=Path, default=HERE / "embedonce.toml")
    args = parser.parse_args()

    parts = [
        part.strip() for file in sorted(args.folder.glob("*.md")) for part in file.read_text("utf-8").split("\n\n")
    ]
    documents = [part for part in parts if part]
    if not documents:
        parser.error(f"there is no text in {args.folder}/*.md")
    ids = [str(i) for i in range(len(documents))]
    inner = Ngrams()

    found: list[Any] = []
    client = chromadb.EphemeralClient()
    for name in ("without", "cold", "warm"):
        function = inner if name == "without" else CachedEmbeddingFunction(inner, config=args.config, space=SPACE)
        before = inner.texts
        collection = client.create_collection(name, embedding_function=function)
        for start in range(0, len(ids), 100):
            part = slice(start, start + 100)
            collection.add(ids=ids[part], documents=documents[part])
        answer = collection.query(query_texts=[args.question], n_results=3)
        stored = collection.get(ids=ids, include=["embeddings"])
        vectors = dict(zip(stored["ids"], np.asarray(stored["embeddings"], np.float32), strict=True))
        # Compare distances, not ids, because documents at the same distance may come in any order.
        found.append((answer["distances"], [vectors[i].tobytes() for i in ids]))
        print(f"{name:8} {len(documents) + 1} texts, {inner.texts - before} embedded")
    print("the same" if found[0] == found[1] == found[2] else "NOT the same", "vectors and answers")
    print(f"nearest to {args.question!r}:")
    for document in (answer["documents"] or [[]])[0]:
        print("  ", " ".join(document.split())[:100])


if __name__ == "__main__":
    main()
