"""Run files through a LlamaIndex pipeline without a cache, with a cold cache and with a warm one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter

from embedonce_integrations.llama_index import CachedEmbedding
from embedonce_providers.ngram import NgramProvider

HERE = Path(__file__).parent


class Ngrams(BaseEmbedding):
    """Stands in for your model. It needs no key and no download, finds near copies, and counts the texts it gets."""

    _provider: NgramProvider = PrivateAttr(default_factory=NgramProvider)
    _texts: int = PrivateAttr(default=0)

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        self._texts += len(texts)
        return np.asarray(self._provider.embed(texts, "document")).tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embeddings([query])[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE.parents[1] / "docs", help="Markdown files")
    parser.add_argument("question", nargs="?", default="what happens when Redis is down?")
    parser.add_argument("--config", type=Path, default=HERE / "embedonce.toml")
    args = parser.parse_args()

    documents = [Document(text=file.read_text("utf-8")) for file in sorted(args.folder.glob("*.md"))]
    inner = Ngrams()
    space = inner._provider.space("document")

    found: list[Any] = []
    for name in ("without", "cold", "warm"):
        model: BaseEmbedding = inner
        if name != "without":
            model = CachedEmbedding(inner, config=args.config, space=space, symmetric=True, embed_batch_size=512)
        before = inner._texts
        splitter = SentenceSplitter(chunk_size=128, chunk_overlap=0)
        nodes = IngestionPipeline(transformations=[splitter, model], disable_cache=True).run(documents=documents)
        retriever = VectorStoreIndex(nodes, embed_model=model).as_retriever(similarity_top_k=3)
        answer = [hit.text for hit in retriever.retrieve(args.question)]
        found.append((answer, np.asarray([node.embedding for node in nodes], np.float32).tobytes()))
        print(f"{name:8} {len(nodes) + 1} texts, {inner._texts - before} embedded")
    print("the same" if found[0] == found[1] == found[2] else "NOT the same", "vectors and answers")
    print(f"nearest to {args.question!r}:")
    for text in found[-1][0]:
        print("  ", " ".join(text.split())[:100])


if __name__ == "__main__":
    main()
