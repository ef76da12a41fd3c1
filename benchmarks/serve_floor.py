"""The least that a server of stored vectors does: raw ASGI that looks up a dict, checks a key, counts and encodes.

``serve_speed.py`` compares ``embedonce serve`` with this application, under the same uvicorn. It is not a cache: it has
one model, one key, all texts in a dict, and no bounds.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import orjson

DIMENSIONS = int(os.environ.get("FLOOR_DIMENSIONS", "384"))
KEY = os.environ.get("FLOOR_KEY", "key-of-the-benchmark")
DIGESTS = {hashlib.sha256(KEY.encode()).digest(): "benchmark"}
VECTORS: dict[str, Any] = {}
COUNTS: Counter[str] = Counter()

for text in json.loads(Path(os.environ["FLOOR_TEXTS"]).read_text()):
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    VECTORS[text] = np.random.default_rng(seed).standard_normal(DIMENSIONS).astype(np.float32)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer ``POST /v1/embeddings``."""
    if scope["type"] != "http":
        return
    headers = dict(scope["headers"])
    digest = hashlib.sha256(headers[b"authorization"].removeprefix(b"Bearer ")).digest()
    tenant = next((name for known, name in DIGESTS.items() if hmac.compare_digest(known, digest)), None)
    if tenant is None or headers[b"content-type"] != b"application/json":
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        return
    message = await receive()
    body = message["body"]
    while message.get("more_body"):
        message = await receive()
        body += message["body"]
    data = orjson.loads(body)
    texts = [data["input"]] if isinstance(data["input"], str) else data["input"]
    rows = [VECTORS[text] for text in texts]
    if data.get("encoding_format") == "base64":
        encoded: list[Any] = [binascii.b2a_base64(row, newline=False).decode() for row in rows]
    else:
        encoded = rows
    answer = orjson.dumps(
        {
            "object": "list",
            "data": [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(encoded)],
            "model": data["model"],
            "usage": {"prompt_tokens": 0, "total_tokens": 0},
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )
    COUNTS["requests"] += 1
    COUNTS["hits"] += len(rows)
    COUNTS[tenant] += len(rows)
    pairs = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(answer)),
        (b"x-embedonce-cache", b"hit"),
        (b"x-embedonce-hits", b"%d" % len(rows)),
        (b"x-embedonce-computed", b"0"),
        (b"x-embedonce-saved-tokens", b"0"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": pairs})
    await send({"type": "http.response.body", "body": answer})
