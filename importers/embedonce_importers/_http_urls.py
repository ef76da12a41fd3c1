"""Checks the URLs of servers."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from embedonce.errors import ConfigError


@dataclass(frozen=True, slots=True)
class HttpUrl:
    """An URL without credentials, so that messages may show it."""

    text: str
    host: str
    port: int
    is_tls: bool

    def __str__(self) -> str:
        return self.text


def parse_http_url(url: str, *, default_port: int) -> HttpUrl:
    """Return the parts of an URL such as ``http://localhost:8000``.

    Raises:
        ConfigError: the URL is invalid, or has a password, a path or a query. The message does not repeat the URL,
            because it may contain a secret.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigError("url has an invalid host or port; write it as in http://localhost:8000") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError("url must start with http:// or https:// and have a host, as in http://localhost:8000")
    if "@" in parts.netloc:
        raise ConfigError("url must not contain a username or password; use the option api_key")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ConfigError("url must have no path, query or fragment; write it as in http://localhost:8000")
    is_tls = parts.scheme == "https"
    if port is None:
        port = 443 if is_tls else default_port
    shown_host = f"[{host}]" if ":" in host else host
    return HttpUrl(f"{parts.scheme}://{shown_host}:{port}", host, port, is_tls)
