"""One line per request in the log, without texts and keys, if ``embedonce serve`` has ``--access-log``."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import quote

from embedonce.config import Tenant

from .answered import Embeddings

log = logging.getLogger("embedonce.access")

is_on = False

MAX_PATH = 200
"""Number of characters of a path that are logged."""


def write(
    scope: MutableMapping[str, Any],
    status: int,
    seconds: float,
    *,
    tenant: Tenant | None,
    found: Embeddings | None,
    request_id: bytes,
) -> None:
    """Log a request. The path is quoted, because a client may put line breaks into it."""
    client = scope.get("client")
    log.info(
        "%s %s %s %d %.1f ms tenant=%s model=%s inputs=%d hits=%d id=%s",
        client[0] if client else "-",
        scope["method"],
        quote(scope["path"][:MAX_PATH]),
        status,
        seconds * 1e3,
        "-" if tenant is None else tenant.name,
        "-" if found is None else found.model.name,
        0 if found is None else found.inputs,
        0 if found is None else found.hits,
        request_id.decode(),
    )
