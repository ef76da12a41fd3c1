"""One line per request in the log, without texts and keys, if ``embedonce serve`` has ``--access-log``."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import quote

from embedonce.config import Tenant

from .answered import Embeddings
from .api.api_errors import ApiError

log = logging.getLogger("embedonce.access")

is_on = False

MAX_PATH = 200
"""Number of characters of a path that are logged."""


def write(
    scope: MutableMapping[str, Any],
    outcome: Embeddings | ApiError | int,
    seconds: float,
    *,
    tenant: Tenant | None,
    request_id: bytes,
) -> None:
    """Log a request. ``outcome`` is its answer, its error or its status.

    The path is quoted, because a client may put line breaks into it.
    """
    client = scope.get("client")
    found = outcome if isinstance(outcome, Embeddings) else None
    status = outcome if isinstance(outcome, int) else outcome.status if isinstance(outcome, ApiError) else 200
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
