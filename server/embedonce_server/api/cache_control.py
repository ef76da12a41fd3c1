"""The directives of a request's ``Cache-Control`` header (RFC 9111, section 5.2.1)."""

from __future__ import annotations

from typing import NamedTuple
from urllib.request import parse_http_list

from .api_errors import ApiError


class CacheControl(NamedTuple):
    """What a request says about the cache. Other directives are ignored, because an entry never becomes stale."""

    no_store: bool = False
    """Store nothing that this request computes."""
    no_cache: bool = False
    """Compute everything anew."""
    only_if_cached: bool = False
    """Compute nothing."""


DEFAULT = CacheControl()


def read_cache_control(header: bytes | None) -> CacheControl:
    """Return the directives of a header.

    Raises:
        ApiError: the directives exclude each other.
    """
    if header is None:
        return DEFAULT
    # The value of a directive may be a quoted string with commas.
    names = {part.partition("=")[0].strip().lower() for part in parse_http_list(header.decode("latin-1"))}
    control = CacheControl("no-store" in names, "no-cache" in names, "only-if-cached" in names)
    if control.no_cache and control.only_if_cached:
        message = "Cache-Control: no-cache and only-if-cached exclude each other; send one of them"
        raise ApiError(400, message, code="invalid_cache_control")
    return control
