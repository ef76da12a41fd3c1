"""Find the lines of a file that are nearest to a question, with a cache inside OpenAI's client."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from openai import AsyncOpenAI, OpenAI

from embedonce_integrations.openai import cached

HERE = Path(__file__).parent
MODEL = "text-embedding-3-small"


def find_nearest(lines: Sequence[str], question: str, *, config: Path) -> list[tuple[float, str]]:
    """Return the lines with their similarity to the question, nearest first, and print the tokens that were charged."""
    with OpenAI() as plain:
        client = cached(plain, config=config)
        answer = client.embeddings.create(model=MODEL, input=[*lines, question])
    print(f"{len(answer.data)} vectors, {answer.usage.total_tokens} tokens")
    vectors = np.array([item.embedding for item in answer.data], np.float32)
    similarity = vectors[:-1] @ vectors[-1]
    return sorted(zip(similarity.tolist(), lines, strict=True), reverse=True)


async def embed_again(lines: Sequence[str], *, config: Path) -> None:
    """Embed each line in its own call, in tasks of an event loop, as a service would."""
    async with AsyncOpenAI() as plain:
        client = cached(plain, config=config)
        answers = await asyncio.gather(*(client.embeddings.create(model=MODEL, input=line) for line in lines))
    print(f"{len(answers)} calls, {sum(answer.usage.total_tokens for answer in answers)} tokens")


def main() -> None:
    """Read the file and the question from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("question")
    parser.add_argument("--config", type=Path, default=HERE / "embedonce.toml")
    options = parser.parse_args()
    lines = [line for line in options.file.read_text().splitlines() if line.strip()]
    for similarity, line in find_nearest(lines, options.question, config=options.config)[:3]:
        print(f"{similarity:.3f}  {line}")
    asyncio.run(embed_again(lines, config=options.config))


if __name__ == "__main__":
    main()
