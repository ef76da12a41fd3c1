"""The URL of a Redis tier: one server, a cluster, or a master behind sentinels.

No error message quotes the URL, because it may contain a password.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, NoReturn, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

from embedonce.errors import ConfigError

Kind: TypeAlias = Literal["one", "cluster", "sentinel"]

SCHEMES: dict[str, tuple[Kind, bool]] = {
    "redis": ("one", False),
    "rediss": ("one", True),
    "unix": ("one", False),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
}
SHAPES = (
    "redis://host:6379/0, unix:///path/of/socket, redis+cluster://host:6379,host:6379 or "
    "redis+sentinel://host:26379,host:26379/service/0 (with TLS: rediss...)"
)
REDIS_PORT = 6379
SENTINEL_PORT = 26379

OTHER_OPTIONS: dict[str, str] = {
    "ssl_ca_(certs|path|data)|ca_?certs?|ca_?file|sslrootcert|tls_ca_cert_file": "set ca_file in the table of the tier",
    "(ssl_|tls_)?cert_?(file)?|sslcert": "set cert_file in the table of the tier",
    "(ssl_|tls_)?key_?(file)?|sslkey": "set key_file in the table of the tier",
    "ssl_check_hostname": "set check_hostname in the table of the tier",
    "ssl_cert_reqs|ssl_validate|skip_?verify|insecure|tls_?insecure": (
        "the server's certificate is always checked; set ca_file to the file of the authority that signed it, and "
        "check_hostname = false if it is for another host name"
    ),
    "ssl|tls|use_?(ssl|tls)|sslmode|ssl_\\w+": "for TLS, write rediss instead of redis in url",
    "(socket_|connect_|dial_|read_|write_)*(connect_)?timeout(_ms)?": "set timeout in the table of the tier",
    "(blocking_)?(max_?connections|pool_?size|max_?pool_?size)": "set max_connections in the table of the tier",
    "user(name)?": "set username in the table of the tier, or write it before the host",
    "pass(word)?|auth": "set password in the table of the tier, or write it before the host",
    "virtual_host|database": "write the database after the host, as in redis://host:6379/0",
    "(sentinel_)?(master_?name|service_?name|master_?set|sentinel_?master_?id)": (
        "write redis+sentinel://host:26379/service"
    ),
    "protocol|decode_responses|encoding(_errors)?|charset|health_check_interval|client_name|lib_name|lib_version"
    "|retry\\w*|socket_keepalive\\w*|socket_read_size|socket_type|single_connection_client|address_remapping|family"
    "|cache\\w*|min_?retry\\w*|max_?retr\\w*|timeout_seconds|read_from_replicas|global_keyprefix": (
        "remove it; embedonce sets this by itself"
    ),
}
"""Patterns of options that URLs for other clients of Redis have, and what to do instead."""

_HOST = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.%]+)\]|(?P<name>[^\s:/?#@\[\]]+))(?::(?P<port>[0-9]{1,5}))?")


class Address(NamedTuple):
    """A server: a host and a port. For a Unix socket, ``host`` is the path of the socket and ``port`` is 0."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.port else self.host


@dataclass(frozen=True, slots=True)
class Place:
    """The parts of a URL."""

    kind: Kind
    tls: bool
    addresses: tuple[Address, ...]
    """The server, cluster nodes or sentinels that the URL lists."""
    db: int = 0
    service: str = ""
    """The master's name in the sentinels' configuration."""
    username: str | None = None
    password: str | None = field(default=None, repr=False)


def parse_url(url: str) -> Place:
    """Parse a URL.

    Raises:
        ConfigError: the URL is invalid. The message says which part is wrong, without quoting it.
    """
    try:
        parts = urlsplit(url.strip())
    except ValueError:
        _refuse("cannot be parsed")
    scheme = parts.scheme.lower().replace("valkey", "redis")
    if scheme not in SCHEMES:
        _refuse("has an unknown scheme")
    if parts.fragment:
        _refuse("has a fragment; if the password contains #, write it as %23")
    kind, tls = SCHEMES[scheme]
    login, _, hosts = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    path = unquote(parts.path)
    addresses: tuple[Address, ...]
    service = ""
    if scheme == "unix":
        if hosts or not path.strip("/"):
            _refuse("has no socket path")
        addresses = (Address(path, 0),)
        db = ""
    else:
        port = SENTINEL_PORT if kind == "sentinel" else REDIS_PORT
        addresses = tuple(_parse_address(text, port) for text in hosts.split(","))
        service, db = _split_path(kind, path)
    if kind == "one" and len(addresses) > 1:
        _refuse("names several hosts, which only redis+cluster:// and redis+sentinel:// accept")
    return Place(
        kind=kind,
        tls=tls,
        addresses=addresses,
        db=_parse_database(kind, db, parts.query),
        service=service,
        username=unquote(username) or None,
        password=unquote(password) or None,
    )


def _parse_address(text: str, default_port: int) -> Address:
    match = _HOST.fullmatch(text.strip())
    if match is None:
        _refuse("has an invalid host; if the password contains : / @ or #, write these characters as %3A %2F %40 %23")
    port = int(match["port"]) if match["port"] else default_port
    if not 0 < port < 65536:
        _refuse("has an invalid port; it must be 1 to 65535")
    return Address(match["v6"] or unquote(match["name"]), port)


def _split_path(kind: Kind, path: str) -> tuple[str, str]:
    """Return the service name and the database. The service name is empty unless the URL lists sentinels."""
    rest = path.strip("/")
    if kind != "sentinel":
        return "", rest
    service, _, db = rest.partition("/")
    if not service:
        _refuse("has no service name after the hosts")
    return service, db


def _parse_database(kind: Kind, path: str, query: str) -> int:
    options = dict(parse_qsl(query, keep_blank_values=True))
    text = options.pop("db", path)
    if options:
        _refuse_options(options)
    if not text:
        return 0
    if not re.fullmatch(r"[0-9]{1,9}", text):
        _refuse("has an invalid database; it must be a number")
    if kind == "cluster" and int(text):
        _refuse("names a database, but a cluster has only database 0")
    return int(text)


def _refuse_options(names: Iterable[str]) -> NoReturn:
    """Refuse the options after the "?". Only well-known names are repeated, because any other text may be a secret."""
    for name in names:
        for pattern, advice in OTHER_OPTIONS.items():
            if re.fullmatch(pattern, name, re.IGNORECASE):
                raise ConfigError(f'url has the option {name} after the "?", which is not supported: {advice}')
    _refuse('has options other than db after the "?"; set these options in the table of the tier instead')


def _refuse(problem: str) -> NoReturn:
    raise ConfigError(f"url {problem}; expected {SHAPES}") from None
