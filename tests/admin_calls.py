"""Settings of a server with an administrator, and calls of ``/admin/*``."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from serving import ADMIN_KEY, KEY, Answer, Served

from embedonce_backends.disk import DiskBackend

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
OTHER_KEY = "key-of-the-other-team"
TENANTS = {"search": KEY, "other": OTHER_KEY}
CACHED = {"cache-control": "only-if-cached"}


def configure(folder: Path, **serve: Any) -> dict[str, Any]:
    return {
        "provider": {"type": "ngram"},
        "tiers": [{"type": "memory"}, {"type": "disk", "path": str(folder / "disk")}],
        "serve": {"admin_key": ADMIN_KEY, **serve},
    }


def with_tenants(folder: Path) -> dict[str, Any]:
    models = [{"name": name, "provider": {"type": "ngram", "dimensions": n}} for name, n in (("one", 64), ("two", 128))]
    tenants: list[dict[str, Any]] = [{"name": name, "keys": [key]} for name, key in TENANTS.items()]
    tenants[1]["tokens_per_day"] = 1000
    return configure(folder, models=models, tenants=tenants)


async def ask(server: Served, path: str, body: Any) -> Answer:
    return await server.call("POST", f"/admin/{path}", body, ADMIN)


def key_of(tenant: str) -> dict[str, str]:
    return {"authorization": f"Bearer {TENANTS[tenant]}"}


async def is_cached(server: Served, text: Any, *, tenant: str | None = None, **fields: Any) -> bool:
    headers = {**CACHED, **({} if tenant is None else key_of(tenant))}
    answer = await server.embed(text, headers=headers, **fields)
    assert answer.status in (200, 404)
    return answer.status == 200


def make_disk_unlistable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let disk tiers be unable to list their keys, as Memcached is."""
    make = DiskBackend.__init__

    @wraps(make)
    def make_without_scan(backend: DiskBackend, *arguments: Any, **options: Any) -> None:
        make(backend, *arguments, **options)
        backend.capabilities = replace(backend.capabilities, scan=False)

    monkeypatch.setattr(DiskBackend, "__init__", make_without_scan)
