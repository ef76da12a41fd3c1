"""Where Redis is, read from a URL: one server, a cluster, or a master behind sentinels.

No message repeats the URL: it may hold a password.
"""

from __future__ import annotations

import re
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

_HOST = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.%]+)\]|(?P<name>[^\s:/?#@\[\]]+))(?::(?P<port>[0-9]{1,5}))?")


class Address(NamedTuple):
    """A server: host and port, or the path of a Unix socket with port 0."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.port else self.host


@dataclass(frozen=True, slots=True)
class Place:
    """What a URL says."""

    kind: Kind
    tls: bool
    addresses: tuple[Address, ...]
    """One server; or the nodes, or the sentinels, that are asked where the others are."""
    db: int = 0
    service: str = ""
    """What the sentinels call the master."""
    username: str | None = None
    password: str | None = field(default=None, repr=False)


def place_of(url: str) -> Place:
    """Read a URL.

    Raises:
        ConfigError: it is none of the known shapes; the message says which part is wrong, and never repeats it.
    """
    try:
        parts = urlsplit(url.strip())
    except ValueError:
        _refuse("cannot be read")
    scheme = parts.scheme.lower().replace("valkey", "redis")
    if scheme not in SCHEMES:
        _refuse("has an unknown scheme")
    if parts.fragment:
        _refuse("has a fragment (write # in a password as %23)")
    kind, tls = SCHEMES[scheme]
    login, _, hosts = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    path = unquote(parts.path)
    addresses: tuple[Address, ...]
    service = ""
    if scheme == "unix":
        if hosts or not path.strip("/"):
            _refuse("names no socket: unix:///path/of/socket")
        addresses = (Address(path, 0),)
        db = ""
    else:
        port = SENTINEL_PORT if kind == "sentinel" else REDIS_PORT
        addresses = tuple(_address(text, port) for text in hosts.split(","))
        service, db = _service_and_db(kind, path)
    if kind == "one" and len(addresses) > 1:
        _refuse("names several hosts: redis+cluster:// or redis+sentinel:// take them")
    return Place(
        kind=kind,
        tls=tls,
        addresses=addresses,
        db=_database(kind, db, parts.query),
        service=service,
        username=unquote(username) or None,
        password=unquote(password) or None,
    )


def _address(text: str, port: int) -> Address:
    match = _HOST.fullmatch(text.strip())
    if match is None:
        _refuse("has a host that cannot be read (a password with : / @ or # in it is written with %3A %2F %40 %23)")
    given = int(match["port"]) if match["port"] else port
    if not 0 < given < 65536:
        _refuse("has a port that does not exist")
    return Address(match["v6"] or unquote(match["name"]), given)


def _service_and_db(kind: Kind, path: str) -> tuple[str, str]:
    rest = path.strip("/")
    if kind != "sentinel":
        return "", rest
    service, _, db = rest.partition("/")
    if not service:
        _refuse("names no service: redis+sentinel://host:26379/service")
    return service, db


def _database(kind: Kind, path: str, query: str) -> int:
    options = dict(parse_qsl(query, keep_blank_values=True))
    text = options.pop("db", path)
    if options:
        _refuse("has options after ?, which are written as options of the tier")
    if not text:
        return 0
    if not re.fullmatch(r"[0-9]{1,9}", text):
        _refuse("has a database that is no number")
    if kind == "cluster" and int(text):
        _refuse("names a database, and a cluster has only number 0")
    return int(text)


def _refuse(what: str) -> NoReturn:
    raise ConfigError(f"url {what}; it looks like {SHAPES}") from None
