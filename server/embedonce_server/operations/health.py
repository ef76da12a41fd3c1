"""Whether a worker can answer, and which tiers and providers fail. Nothing is called for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedonce_server.service import Service


def read_health(service: Service) -> dict[str, Any]:
    """Return the state of a worker, its tiers and its providers.

    A tier or a provider that fails does not make the worker unready, because hits of other tiers are still answered.
    The result has no secret, no URL, and no name of a tenant or a model, because everybody may read it.
    """
    stats = service.stats()
    return {
        "status": service.state,
        "tiers": {
            name: {"status": "skipped" if tier.is_skipped else "ok", "last_error": tier.last_cause}
            for name, tier in stats.tiers.items()
        },
        "providers": {
            name: {"status": "ok" if provider.last_error is None else "failing", "last_error": provider.last_error}
            for name, provider in stats.providers.items()
        },
    }
