"""A request to one of the small endpoints, and the fields of its body."""

from __future__ import annotations

from collections.abc import Collection, MutableMapping
from typing import Any, NamedTuple, TypeAlias

from embedonce_server.api.api_errors import ApiError
from embedonce_server.api.guards import check_json
from embedonce_server.api.incoming import Receive, read_body
from embedonce_server.api.request_body import MAX_SHOWN, parse_body, show_field
from embedonce_server.service import Generation, Service

from .metrics import Metrics

Scope: TypeAlias = MutableMapping[str, Any]


class Call(NamedTuple):
    """A request that may be answered."""

    service: Service
    metrics: Metrics
    generation: Generation
    scope: Scope
    headers: dict[bytes, bytes]
    receive: Receive

    async def read_fields(self, allowed: Collection[str]) -> dict[str, Any]:
        """Return the JSON object of the body.

        Raises:
            ApiError: the body is too large, is not a JSON object, or has a field that is not in ``allowed``.
        """
        check_json(self.headers)
        body = await read_body(self.service.bodies, self.headers, self.receive, self.generation.settings.max_body)
        try:
            fields = parse_body(body, surrogates_in="input")  # a text is accepted as /v1/embeddings does
        finally:
            self.service.bodies.bytes -= len(body)
        for name in fields:
            if name not in allowed:
                known = ", ".join(sorted(allowed))
                message = f"{show_field(name)} is unknown; the fields are {known}"
                raise ApiError(400, message, param=name[:MAX_SHOWN], code="unsupported_field")
        return fields
