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
    model, inputs, hits = "-", "-", "-"
    if isinstance(outcome, Embeddings):
        status, model, inputs, hits = 200, outcome.model.name, f"{outcome.inputs}", f"{outcome.hits}"
    elif isinstance(outcome, ApiError):
        status, model = outcome.status, outcome.model or "-"
    else:
        status = outcome
    log.info(
        "%s %s %s %d %.1f ms tenant=%s model=%s inputs=%s hits=%s id=%s",
        client[0] if client else "-",
        scope["method"],
        quote(scope["path"][:MAX_PATH]),
        status,
        seconds * 1e3,
        "-" if tenant is None else tenant.name,
        model,
        inputs,
        hits,
        request_id.decode(),
    )
