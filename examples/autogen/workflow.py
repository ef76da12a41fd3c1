"""An AutoGen agent that answers from a handbook whose chunks are embedded once."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from autogen_agentchat.agents import AssistantAgent
from autogen_core.memory import MemoryContent, MemoryMimeType
from autogen_core.models import ChatCompletionClient, SystemMessage
from autogen_ext.models.replay import ReplayChatCompletionClient

from embedonce_integrations.autogen import CachedMemory

HERE = Path(__file__).parent


def read_chunks(folder: Path) -> list[MemoryContent]:
    """Return the paragraphs of every file, each with its origin as metadata."""
    return [
        MemoryContent(
            content=paragraph,
            mime_type=MemoryMimeType.TEXT,
            metadata={"source": file.name, "chunk": number, "model": "text-embedding-3-small"},
        )
        for file in sorted(folder.glob("*.md"))
        for number, paragraph in enumerate(file.read_text(encoding="utf-8").split("\n\n"))
    ]


def make_chat_model(name: str | None) -> ChatCompletionClient:
    if name is None:  # a fixed answer, so that the example shows what reaches the agent at no cost
        return ReplayChatCompletionClient(["(no chat model: see what it would have read, above)"])
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    return OpenAIChatCompletionClient(model=name)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", default="When do I need a doctor's note?")
    parser.add_argument("--config", type=Path, default=HERE / "embedonce.toml")
    parser.add_argument("--handbook", type=Path, default=HERE / "handbook")
    parser.add_argument("--chat-model", help="an OpenAI chat model; needs pip install 'autogen-ext[openai]'")
    args = parser.parse_args()

    memory = CachedMemory(str(args.config), k=2, store_metadata=True)
    contents = read_chunks(args.handbook)
    for content, source in zip(contents, await memory.add_all(contents), strict=True):
        origin = content.metadata or {}
        print(f"{'miss' if source == 'provider' else 'hit':4}  {origin['source']} {origin['chunk']}")

    agent = AssistantAgent("clerk", model_client=make_chat_model(args.chat_model), memory=[memory])
    answer = await agent.run(task=args.question)
    for message in await agent.model_context.get_messages():
        if isinstance(message, SystemMessage):
            print(message.content)
    print(answer.messages[-1].to_text())  # type: ignore[union-attr]
    await memory.close()


if __name__ == "__main__":
    asyncio.run(main())
