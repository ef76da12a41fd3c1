"""Types of the values in ``[serve]``, ``[[serve.models]]`` and ``[[serve.tenants]]``. No message repeats a value."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, TypeAlias

from embedonce.batch_settings import refuse_batch_settings
from embedonce.errors import SpaceError
from embedonce.options import BadValue, Parsed

MIN_KEY = 16
"""Minimum number of characters of a key. A shorter key could be guessed."""
MAX_MODEL_NAME = 256
DIGEST = "sha256:"
"""Beginning of a key that is written as its SHA-256 digest."""

OWN_FIELDS = ("input", "model", "dimensions", "encoding_format", "user", "input_type", "task", "task_type")
"""Fields of a request that the server reads. They cannot be forwarded to a provider."""


def _check_host(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise BadValue("must be a host name or an IP address, and must not be empty")
    if re.fullmatch(r"[A-Za-z0-9_.-]+", value):
        return value.lower()
    import ipaddress  # imported here, because most hosts are names or IPv4 addresses

    try:
        return str(ipaddress.IPv6Address(value.removeprefix("[").removesuffix("]")))
    except ValueError:
        raise BadValue("must be a host name or an IP address, without a scheme, a port or a path") from None


def _check_allowed_host(value: object) -> str:
    if isinstance(value, str) and ("*" in value or re.fullmatch(r"[0-9A-Fa-f.:]+/[0-9]+", value)):
        raise BadValue("wildcards and networks are not supported, so list every name and address")
    return _check_host(value)


def _hash_key(value: object) -> str:
    """Return a key as ``sha256:`` and the 64 hex digits of its digest, so that equal keys have one form.

    Raises:
        BadValue: the key is too short, or has characters that an HTTP header cannot contain.
    """
    if not isinstance(value, str):
        raise BadValue("must be text")
    if value.lower().startswith(DIGEST):
        digest = value[len(DIGEST) :].lower()
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise BadValue(f"must have 64 hexadecimal digits after {DIGEST}")
        return DIGEST + digest
    if not re.fullmatch("[!-~]*", value):
        raise BadValue("must contain only printable ASCII characters, and no spaces")
    if len(value) < MIN_KEY:
        raise BadValue(
            f"must have at least {MIN_KEY} characters, so that nobody can guess it; create one with: "
            'python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    return DIGEST + hashlib.sha256(value.encode()).hexdigest()


def _check_model_name(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise BadValue("must be the name of a model, and must not be empty")
    if not value.isprintable() or value != value.strip():
        raise BadValue("must contain only printable characters, and must not start or end with a space")
    if len(value) > MAX_MODEL_NAME:
        raise BadValue(f"must have at most {MAX_MODEL_NAME} characters")
    return value


def _check_tenant_name(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch("[a-z][a-z0-9_-]*", value):
        raise BadValue("must start with a letter a-z and contain only a-z, 0-9, - and _")
    return value


def _check_namespace(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise BadValue("must be text, and must not be empty")
    if "/" in value or not value.isprintable():
        raise BadValue('must contain only printable characters, and no "/"')
    return value


def _check_forwarded_field(value: object) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise BadValue("must be the name of a field, and must not be empty")
    if value in OWN_FIELDS:
        raise BadValue("is a field that the server itself reads, so it cannot be forwarded")
    try:
        refuse_batch_settings({value: True})
    except SpaceError:
        raise BadValue(
            "cannot be forwarded, because with this field the vector of a text depends on the other texts of its batch"
        ) from None
    return value


_VARIABLE = r"|\$\{"
"""Part of a pattern that accepts a text with a variable. The schema allows variables in items of lists only by this."""

HostName: TypeAlias = Annotated[str, Parsed(_check_host, {"type": "string", "minLength": 1})]
AllowedHost: TypeAlias = Annotated[str, Parsed(_check_allowed_host, {"type": "string", "minLength": 1})]
ServeKey: TypeAlias = Annotated[
    str,
    Parsed(
        _hash_key,
        {
            "type": "string",
            "pattern": rf"^(?:[sS][hH][aA]256:[0-9a-fA-F]{{64}}|(?![sS][hH][aA]256:)[!-~]{{{MIN_KEY},}})${_VARIABLE}",
        },
    ),
]
ModelName: TypeAlias = Annotated[
    str, Parsed(_check_model_name, {"type": "string", "minLength": 1, "maxLength": MAX_MODEL_NAME})
]
TenantName: TypeAlias = Annotated[str, Parsed(_check_tenant_name, {"type": "string", "pattern": "^[a-z][a-z0-9_-]*$"})]
Namespace: TypeAlias = Annotated[str, Parsed(_check_namespace, {"type": "string", "pattern": "^[^/]+$"})]
ForwardedField: TypeAlias = Annotated[
    str, Parsed(_check_forwarded_field, {"type": "string", "minLength": 1, "not": {"enum": list(OWN_FIELDS)}})
]
