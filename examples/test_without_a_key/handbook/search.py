"""Retrieval: the passages that are nearest to a question."""

from collections.abc import Sequence

from embedonce import Cache
from embedonce.similarity import top_k


def find_passages(cache: Cache, passages: Sequence[str], question: str, k: int = 2) -> list[str]:
    """Return the ``k`` passages that are nearest to the question, the nearest one first."""
    documents = cache.embed_batch(passages)
    nearest, _ = top_k(cache.embed_batch([question], task="query"), documents, k)
    return [passages[index] for index in nearest[0]]


def make_prompt(passages: Sequence[str], question: str) -> str:
    """Return what the language model is asked."""
    return "\n".join(["Answer from these passages:", *passages, "", f"Question: {question}"])
