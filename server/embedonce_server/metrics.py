"""Metrics of all workers of a host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedonce.config import Tenant

if TYPE_CHECKING:
    from .embedding import Embeddings
    from .service import Service


class Metrics:
    """The counters of one worker, and what other workers have counted."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def count_embeddings(self, tenant: Tenant | None, found: Embeddings | None, status: int, seconds: float) -> None:
        """Count a request for vectors."""
