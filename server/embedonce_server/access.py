"""Which keys a request has: that of a tenant, or the admin key."""

from __future__ import annotations

from collections.abc import Mapping

from embedonce.config import Tenant

from .api_errors import ApiError
from .service import Generation
from .tenants import read_bearer


def find_tenant(generation: Generation, headers: Mapping[bytes, bytes]) -> Tenant | None:
    """Return the tenant whose key a request has; None if the server has no tenants.

    Raises:
        ApiError: the key is missing or unknown.
    """
    if not generation.settings.tenants:
        return None
    key = read_bearer(headers.get(b"authorization", b"")) or headers.get(b"api-key")
    tenant = None if key is None else generation.keyring.find_tenant(key)
    if tenant is None:
        what = "the request has no key" if key is None else "the key is not valid"
        raise _make_unauthorized(f"{what}; send a key of this server as Authorization: Bearer …")
    return tenant


def check_admin(generation: Generation, headers: Mapping[bytes, bytes]) -> None:
    """Check that a request has the admin key, which only ``Authorization`` may carry.

    Raises:
        ApiError: the key is missing or wrong.
    """
    key = read_bearer(headers.get(b"authorization", b""))
    if key is None or not generation.keyring.is_admin(key):
        what = "the request has no key" if key is None else "the key is not the admin key"
        raise _make_unauthorized(f"{what}; send admin_key of [serve] as Authorization: Bearer …")


def _make_unauthorized(message: str) -> ApiError:
    headers = {"www-authenticate": "Bearer"}
    return ApiError(401, message, kind="authentication_error", code="invalid_api_key", headers=headers)
