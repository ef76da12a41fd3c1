"""Fill a LangChain vector store without a cache, with a cold cache and with a warm one: the same answers, less cost."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

from embedonce_integrations.langchain import CachedEmbeddings
from embedonce_providers.ngram import NgramProvider

HERE = Path(__file__).parent


class Ngrams(Embeddings):
    """Stands in for your embeddings. It needs no key or download, finds near copies, and counts the texts it gets."""

    def __init__(self) -> None:
        self.provider = NgramProvider()
        self.texts = 0

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        self.texts += len(texts)
        return np.asarray(self.provider.embed(texts, "document")).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE.parents[1] / "docs", help="Markdown files")
    parser.add_argument("question", nargs="?", default="what happens when Redis is down?")
    parser.add_argument("--config", type=Path, default=HERE / "embedonce.toml")
    args = parser.parse_args()

    paragraphs = [part for file in sorted(args.folder.glob("*.md")) for part in file.read_text("utf-8").split("\n\n")]
    paragraphs = [part for part in paragraphs if part.strip()]
    inner = Ngrams()
    space = inner.provider.space("document")

    found = []
    for name in ("without", "cold", "warm"):
        embeddings: Embeddings = inner
        if name != "without":
            embeddings = CachedEmbeddings(inner, config=args.config, space=space, symmetric=True)
        before = inner.texts
        store = InMemoryVectorStore.from_texts(paragraphs, embeddings)
        answer = [document.page_content for document in store.similarity_search(args.question, k=3)]
        vectors = np.asarray([entry["vector"] for entry in store.store.values()], np.float32)
        found.append((answer, vectors.tobytes()))
        print(f"{name:8} {len(paragraphs) + 1} texts, {inner.texts - before} embedded")
    print("the same" if found[0] == found[1] == found[2] else "NOT the same", "vectors and answers")
    print(f"nearest to {args.question!r}:")
    for text in found[-1][0]:
        print("  ", " ".join(text.split())[:100])


if __name__ == "__main__":
    main()
