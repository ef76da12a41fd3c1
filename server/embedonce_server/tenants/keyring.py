"""Keys of requests: which tenant a key belongs to, and whether it is the admin key. Only digests are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from hmac import compare_digest

from embedonce.config import Tenant
from embedonce_server.api.api_errors import ApiError

DIGEST = "sha256:"
"""Beginning of a configured key that is written as its SHA-256 digest."""

_SCHEME = b"bearer"


class Keyring:
    """The keys of all tenants, and the admin key, as SHA-256 digests.

    A presented key is hashed before it is looked up. So the time of a comparison depends on the digest, which nobody
    can choose, and tells nothing about the configured keys.

    Args:
        tenants: the tenants. A key is either plain, or ``sha256:`` and the 64 hexadecimal digits of its digest.
        admin_key: the admin key in one of these two forms, or None if there is none.

    Raises:
        ValueError: a digest is invalid, or two tenants have the same key, or a tenant has the admin key.
    """

    __slots__ = ("_admin", "_tenants", "is_open")

    def __init__(self, tenants: Sequence[Tenant], admin_key: str | None) -> None:
        self._admin = None if admin_key is None else _read_digest(admin_key)
        self._tenants: dict[bytes, tuple[bytes, Tenant]] = {}
        for tenant in tenants:
            for key in tenant.keys:
                digest = _read_digest(key)
                _, owner = self._tenants.setdefault(digest, (digest, tenant))
                if owner is not tenant or digest == self._admin:
                    other = "the admin key" if owner is tenant else f'a key of tenant "{owner.name}"'
                    raise ValueError(f'a key of tenant "{tenant.name}" is also {other}; choose another key')
        self.is_open = not self._tenants
        """Whether there are no tenants, so that requests need no key."""

    def find_tenant(self, key: bytes) -> Tenant | None:
        """Return the tenant that has this key, or None."""
        digest = hashlib.sha256(key).digest()
        found = self._tenants.get(digest)
        return found[1] if found is not None and compare_digest(found[0], digest) else None

    def is_admin(self, key: bytes) -> bool:
        """Return whether this is the admin key. Without an admin key, no key is."""
        return self._admin is not None and compare_digest(self._admin, hashlib.sha256(key).digest())

    def __repr__(self) -> str:
        admin = "no admin key" if self._admin is None else "an admin key"
        return f"<Keyring {len(self._tenants)} keys of tenants, {admin}>"


def read_bearer(header: bytes) -> bytes | None:
    """Return the key in the value of an ``Authorization`` header, or None if it is not a bearer token.

    The scheme may be in upper or lower case, as in ``bearer KEY``.
    """
    scheme, _, key = header.strip(b" \t").partition(b" ")
    return key.strip(b" \t") or None if scheme.lower() == _SCHEME else None


def _read_digest(key: str) -> bytes:
    """Return the digest of a configured key.

    Raises:
        ValueError: the key begins with ``sha256:``, but 64 hexadecimal digits do not follow. The key is not shown.
    """
    if not key.startswith(DIGEST):
        return hashlib.sha256(key.encode()).digest()
    try:
        digest = bytes.fromhex(key[len(DIGEST) :])
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise ValueError(f"a key must have 64 hexadecimal digits after {DIGEST}")
    return digest


def find_tenant(keyring: Keyring, headers: Mapping[bytes, bytes]) -> Tenant | None:
    """Return the tenant whose key a request has; None if the server has no tenants.

    Raises:
        ApiError: the key is missing or unknown.
    """
    if keyring.is_open:
        return None
    key = read_bearer(headers.get(b"authorization", b"")) or headers.get(b"api-key")
    tenant = None if key is None else keyring.find_tenant(key)
    if tenant is None:
        if key is not None and keyring.is_admin(key):
            raise _make_unauthorized("admin_key is only for /admin and /metrics; send the key of a tenant")
        what = "the request has no key" if key is None else "unknown key"
        raise _make_unauthorized(f"{what}; send a key of this server as Authorization: Bearer …")
    return tenant


def check_admin(keyring: Keyring, headers: Mapping[bytes, bytes]) -> None:
    """Check that a request has the admin key, which only ``Authorization`` may carry.

    Raises:
        ApiError: the key is missing or wrong.
    """
    key = read_bearer(headers.get(b"authorization", b""))
    if key is None or not keyring.is_admin(key):
        what = "the request has no key" if key is None else "the key is not the admin key"
        raise _make_unauthorized(f"{what}; send admin_key of [serve] as Authorization: Bearer …")


def _make_unauthorized(message: str) -> ApiError:
    headers = {"www-authenticate": "Bearer"}
    return ApiError(401, message, kind="authentication_error", code="invalid_api_key", headers=headers)
