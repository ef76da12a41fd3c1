"""LiteLLM as a child process of the tests. It reads one request per line, as JSON, and writes one answer per line.

It runs in a process of its own because its import takes seconds, warns, and changes settings of the process.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import litellm

litellm.suppress_debug_info = True


async def embed_async(**arguments: Any) -> Any:
    return await litellm.aembedding(**arguments)


def embed(*, is_async: bool, **arguments: Any) -> dict[str, Any]:
    try:
        answer = asyncio.run(embed_async(**arguments)) if is_async else litellm.embedding(**arguments)
    except litellm.APIError as error:
        return {"error": type(error).__name__, "status": error.status_code}
    except Exception as error:
        return {"error": type(error).__name__, "status": getattr(error, "status_code", None)}
    return {
        "embeddings": [item["embedding"] for item in answer.data],
        "headers": dict(answer._response_headers),
        "tokens": answer.usage.total_tokens,
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(embed(**json.loads(line))), flush=True)
    os._exit(0)  # LiteLLM's own callbacks at exit take seconds
