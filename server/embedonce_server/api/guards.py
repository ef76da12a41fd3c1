"""Which requests are let in: by their Host, their Origin, and the type of their body.

A web page that a user of this machine has open may send requests to a server on loopback. It cannot choose the Host and
the Origin that its browser sends, and without CORS it cannot send JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from ipaddress import ip_address

from .api_errors import ApiError

MAX_MEMO = 256

_SHOWN = re.compile(r"[A-Za-z0-9._:-]{1,100}")
"""Hosts that a message repeats."""

SINGLE_HEADERS = (b"host", b"origin", b"authorization", b"api-key", b"content-type", b"content-length")
"""Headers that a request must not have twice, because two programs on its way might read different ones."""


_HOST = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[^\[\]:@/\s]+))(?::[0-9]{1,5})?")


def is_loopback(name: str) -> bool:
    """Return whether a host's name or address always means this machine."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def split_port(host: str) -> str:
    """Return the name or address of a Host header in lowercase, without its port and without brackets.

    The result is empty if the header has another form, because a proxy may find another host in it.
    """
    parts = _HOST.fullmatch(host.strip().lower())
    return "" if parts is None else parts["address"] or parts["name"]


class HostGuard:
    """Lets requests in whose Host is a loopback name or is allowed."""

    def __init__(self, allowed: Iterable[str]) -> None:
        self._allowed = frozenset(allowed)
        self.admitted: dict[bytes, None] = {}
        """Host headers that were checked before."""

    def check(self, host: bytes | None) -> None:
        """Check a Host header.

        Raises:
            ApiError: the host is missing, or is not allowed.
        """
        if host in self.admitted:
            return
        name = "" if host is None else split_port(host.decode("latin-1"))
        if not name or not (is_loopback(name) or name in self._allowed):
            shown = f'the Host "{name}"' if _SHOWN.fullmatch(name) else "the Host of the request"
            message = f"{shown} is not in allowed_hosts of [serve]; add it there and reload the server"
            raise ApiError(403, message, kind="permission_error", code="host_not_allowed")
        if host is not None and len(self.admitted) < MAX_MEMO:
            self.admitted[host] = None


def check_origin(origin: bytes, host: bytes | None) -> None:
    """Refuse requests that a page of another site has sent.

    Raises:
        ApiError: the Origin is not the server itself.
    """
    scheme, separator, place = origin.decode("latin-1").partition("://")
    own = "" if host is None else host.decode("latin-1").strip().lower()
    if not separator or scheme not in ("http", "https") or place.strip().lower() != own:
        message = (
            "this Origin is not the server's own; send the request from a backend, because cross-site requests of "
            "browsers are not supported"
        )
        raise ApiError(403, message, kind="permission_error", code="origin_not_allowed")


def check_sender(hosts: HostGuard, headers: Mapping[bytes, bytes]) -> None:
    """Check the Host and the Origin of a request.

    Raises:
        ApiError: the host is not allowed, or a page of another site has sent the request.
    """
    host = headers.get(b"host")
    if host not in hosts.admitted:
        hosts.check(host)
    origin = headers.get(b"origin")
    if origin is not None:
        check_origin(origin, host)


def check_json(headers: Mapping[bytes, bytes]) -> None:
    """Check that the body is JSON in UTF-8 and is not compressed.

    Raises:
        ApiError: it is something else.
    """
    kind = headers.get(b"content-type")
    if kind != b"application/json":
        parts = [part.strip() for part in (kind or b"").decode("latin-1").lower().split(";")]
        charset = parts[1].replace(" ", "").replace('"', "") if len(parts) > 1 else "charset=utf-8"
        if parts[0] != "application/json" or len(parts) > 2 or charset not in ("charset=utf-8", ""):
            message = "send the header Content-Type: application/json and a body in UTF-8"
            raise ApiError(415, message, code="unsupported_media_type")
    encoding = headers.get(b"content-encoding")
    if encoding is not None and any(part.strip().lower() not in (b"identity", b"") for part in encoding.split(b",")):
        raise ApiError(415, "send the body without Content-Encoding", code="unsupported_media_type")


def read_headers(pairs: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return headers by name, in lowercase. The lines of a repeated header are joined to one list (RFC 9110, 5.3).

    Raises:
        ApiError: a header that must be single is there twice.
    """
    headers = dict(pairs)
    return headers if len(headers) == len(pairs) else _join_headers(pairs)


def _join_headers(pairs: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    headers: dict[bytes, bytes] = {}
    for name, value in pairs:
        if name not in headers:
            headers[name] = value
        elif name in SINGLE_HEADERS:
            raise ApiError(400, f"the header {name.decode()} occurs twice; send it once", code="duplicate_header")
        else:
            headers[name] += b", " + value
    return headers
