"""Reads from Redis or Valkey, on one server or a cluster. Only commands that read are sent.

The client is redis-py's. Its connections are replaced by ones whose timeout is the time that the current call has left.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn, TypeAlias
from urllib.parse import parse_qsl, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    NoPermissionError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.exceptions import TimeoutError as RedisTimeout
from redis.retry import Retry

from embedonce.contracts import time_left
from embedonce.errors import ConfigError, SourceError, TierTimeout
from embedonce.options import Doc

Client: TypeAlias = Any
"""redis-py's Redis or RedisCluster. Its types do not say that replies are bytes."""

SHAPES = (
    "redis://host:6379/0, redis+cluster://host:6379,host:6379 or unix:///path/of/socket?db=0 (with TLS: rediss...); "
    "a username and a password go before the host, as in redis://user:password@host:6379/0"
)
REDIS_PORT = 6379
TLS_OPTIONS = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname"})
"""Options of redis-py that a URL may have after the "?", beside ``db``."""
LOGIN_OPTIONS = frozenset({"username", "password"})
"""Options that redis-py accepts after the "?" of the URL of a Unix socket."""

CLUSTER_NODE = "the server is a node of a cluster: write the url as redis+cluster://host:port"
NOT_A_CLUSTER = "the server is not a node of a cluster: write the url as redis://host:port"
UNKNOWN_COMMAND = "the server does not know a command that reads a store; if it is a sentinel, set url to the master"
NO_PERMISSION = (
    "the Redis user may not read the store; it needs the commands get, mget, hmget, hlen, scan and hscan for the keys "
    "of the store (in a cluster, also cluster slots and command)"
)
NO_LOGIN = "the server refused the login; write the username and the password before the host in url"

NO_TLS = ". If its port has no TLS, write redis instead of rediss"

MAX_SILENCE = 30.0
"""Seconds without a byte from the server after which a call without a deadline fails. The calls of a scan have no
deadline, and a command that reads takes milliseconds."""
CLUSTER_RETRIES = 3
"""How often a call is repeated after a node of a cluster failed, or after it has redirected the call."""
BATCH_KEYS = 256
"""Maximum number of values per round trip. Values of 3,072 dimensions in JSON then take about 16 MB."""
PAGE_KEYS = 1000
"""Number of keys that the server examines for one page of a scan."""
SAMPLE_PAGES = 100
PAGE_FIELDS = 100
"""Number of fields of a hash per page. The values are sent with them, about 6 MB at 3,072 dimensions."""


UrlOption: TypeAlias = Annotated[
    str,
    Doc(
        "redis://host:6379/0, redis+cluster://host:6379,host:6379 or unix:///path?db=0. For TLS, write rediss instead "
        "of redis, and ?ssl_ca_certs=/path/of/ca.pem after the database if an authority of your own signs certificates."
    ),
]
"""The option ``url``."""


class WrongType:
    """Stands for the value of a key that has another type than the command expects."""


WRONG_TYPE = WrongType()


class RedisReader:
    """Reads the keys and hashes of one Redis database. Several threads and forked children may use it.

    A method raises the errors of redis-py, :class:`~embedonce.errors.TierTimeout` if the server did not answer in time,
    or :class:`~embedonce.errors.SourceError` if the server is of another kind. No message contains a key.
    """

    def __init__(self, url: str) -> None:
        self._place = parse_url(url)
        self.name = self._place.name
        # A forked child makes a client of its own. It also needs its own lock, because a thread of the parent could
        # have held the lock during the fork.
        self._clients: dict[int, Client] = {}
        self._locks: dict[int, threading.Lock] = {}

    # --- reading ---

    def get_values(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the string under each key. A key that is missing or has another type gives None."""
        client = self._get_client()
        values: list[bytes | None] = []
        for start in range(0, len(keys), BATCH_KEYS):
            part = keys[start : start + BATCH_KEYS]
            if isinstance(client, RedisCluster):  # MGET accepts only keys of one slot
                replies = self._run_pipeline(client, [("GET", key) for key in part])
                values += [None if isinstance(reply, WrongType) else reply for reply in replies]
            else:
                with self._translate_errors():
                    values += client.mget(part)
        return values

    def get_fields(self, keys: Sequence[bytes], fields: Sequence[str]) -> list[list[bytes | None] | WrongType]:
        """Return the fields of the hash under each key, in the order of ``fields``. All are None if it is missing."""
        client = self._get_client()
        rows: list[Any] = []
        for start in range(0, len(keys), BATCH_KEYS):
            rows += self._run_pipeline(client, [("HMGET", key, *fields) for key in keys[start : start + BATCH_KEYS]])
        return rows

    def get_fields_of(self, key: bytes, fields: Sequence[bytes]) -> list[bytes | None]:
        """Return the fields of one large hash. A missing field gives None.

        Raises:
            SourceError: the key is not a hash.
        """
        client = self._get_client()
        values: list[bytes | None] = []
        for start in range(0, len(fields), BATCH_KEYS):
            (reply,) = self._run_pipeline(client, [("HMGET", key, *fields[start : start + BATCH_KEYS])])
            if isinstance(reply, WrongType):
                self._refuse_type(key)
            values += reply
        return values

    def scan_keys(self, prefix: bytes, kind: str) -> Iterator[list[bytes]]:
        """Yield the keys that start with ``prefix`` and have the type ``kind`` ("hash", "string"), in pages.

        The server can serve other clients between two pages. If its hash table grows meanwhile, a key may be listed
        twice.
        """
        for node in self._list_nodes():
            cursor = 0
            while True:
                cursor, keys = self._scan_page(node, cursor, prefix, kind)
                if keys:
                    yield keys
                if not cursor:
                    break

    def scan_fields(self, key: bytes, *, page: int = PAGE_FIELDS) -> Iterator[list[tuple[bytes, bytes]]]:
        """Yield the fields and values of one hash, in pages. A field may be listed twice if the hash grows meanwhile.

        ``page`` is about the number of fields per page.

        Raises:
            SourceError: the key is not a hash.
        """
        client, cursor = self._get_client(), 0
        while True:
            try:
                with self._translate_errors():
                    cursor, fields = client.hscan(key, cursor, count=page)
            except ResponseError as error:
                if _is_wrong_type(error):
                    self._refuse_type(key)
                raise
            if fields:
                yield list(fields.items())
            if not cursor:
                return

    def count_fields(self, key: bytes) -> int:
        """Return the number of fields of a hash, 0 if it is missing.

        Raises:
            SourceError: the key is not a hash.
        """
        (reply,) = self._run_pipeline(self._get_client(), [("HLEN", key)])
        if isinstance(reply, WrongType):
            self._refuse_type(key)
        count: int = reply
        return count

    def sample_keys(self, prefix: bytes, kind: str) -> tuple[list[bytes], bool]:
        """Return about 1,000 keys that start with ``prefix`` and have the type ``kind``, and whether these are all.

        The server examines at most 100,000 keys for this, because a database may have hundreds of millions.
        """
        sample: list[bytes] = []
        for node in self._list_nodes():
            cursor = 0
            for _ in range(SAMPLE_PAGES):
                cursor, keys = self._scan_page(node, cursor, prefix, kind)
                sample += keys
                if not cursor or len(sample) >= PAGE_KEYS:
                    break
            if cursor:
                return sample, False
        return sample, True

    # --- upkeep ---

    @contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Turn an error of Redis inside the block into a SourceError that says what to do, for ``check``."""
        try:
            yield
        except (RedisError, RedisClusterException, OSError) as error:
            raise SourceError(f"cannot read from {self.name}: {_explain(error, self._place.url)}") from error

    def close(self) -> None:
        """Close the connections of this process. A later call opens new ones. A second call does nothing."""
        client = self._clients.pop(os.getpid(), None)
        if client is not None:
            client.close()

    def _get_client(self) -> Client:
        pid = os.getpid()
        client = self._clients.get(pid)
        if client is None:
            with self._locks.setdefault(pid, threading.Lock()):
                client = self._clients.get(pid)
                if client is None:
                    client = self._clients[pid] = self._make_client()
        return client

    def _make_client(self) -> Client:
        options: dict[str, Any] = {
            "connection_class": _choose_connection(self._place.url),
            "protocol": 2,  # it needs no HELLO command
        }
        if not self._place.url.startswith("rediss:"):
            # Without this, redis-py sends CLIENT SETINFO on each new connection. Over TLS, it must read a reply before
            # it checks that nothing else is left to be read, because the server sends session tickets of its own.
            options["driver_info"] = None
        with self._translate_errors():
            if self._place.is_cluster:
                others = [ClusterNode(host, port) for host, port in self._place.other_nodes]
                # This reads the layout of the cluster from the first node that answers.
                # When a node fails or a slot has moved, it tries again at once: its own pauses may take seconds.
                retry = Retry(NoBackoff(), CLUSTER_RETRIES)
                return RedisCluster(url=self._place.url, startup_nodes=others, retry=retry, **options)
            return redis.Redis.from_url(self._place.url, retry=Retry(NoBackoff(), 0), **options)

    def _scan_page(self, node: Client, cursor: int, prefix: bytes, kind: str) -> tuple[int, list[bytes]]:
        with self._translate_errors():
            page: Any = node.scan(cursor, match=_escape_pattern(prefix) + b"*", count=PAGE_KEYS, _type=kind)
        return page[0], page[1]

    def _list_nodes(self) -> list[Client]:
        client = self._get_client()
        if isinstance(client, RedisCluster):
            nodes = sorted(client.get_primaries(), key=lambda node: (node.host, node.port))
            return [client.get_redis_connection(node) for node in nodes]
        return [client]

    def _run_pipeline(self, client: Client, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        with self._translate_errors():
            # No transaction, because MULTI and EXEC are of no use here and a cluster refuses them across slots.
            pipeline: Any = (
                client.pipeline() if isinstance(client, RedisCluster) else client.pipeline(transaction=False)
            )
            for command in commands:
                pipeline.execute_command(*command)
            # redis-py would put the arguments of a failed command into the message of its error.
            replies: list[Any] = pipeline.execute(raise_on_error=False)
            for place, reply in enumerate(replies):
                if isinstance(reply, ResponseError) and _is_wrong_type(reply):
                    replies[place] = WRONG_TYPE
                elif isinstance(reply, Exception):
                    raise reply
        return replies

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except TierTimeout:
            raise
        except (RedisTimeout, TimeoutError) as error:
            raise TierTimeout("Redis did not answer in time") from error
        except (RedisError, RedisClusterException) as error:
            text = str(error)
            if isinstance(error, ResponseError) and text.lower().startswith("unknown command"):
                # The server's message repeats the arguments, which may be texts, so it is not even the cause.
                raise SourceError(f"cannot read from {self.name}: {UNKNOWN_COMMAND}") from None
            if not self._place.is_cluster and _is_from_cluster(error):
                raise SourceError(f"cannot read from {self.name}: {CLUSTER_NODE}") from None
            if self._place.is_cluster and "cluster mode is not enabled" in text.lower():
                raise SourceError(f"cannot read from {self.name}: {NOT_A_CLUSTER}") from None
            raise

    def _refuse_type(self, key: bytes) -> NoReturn:
        raise SourceError(f"the key {key.decode('utf-8', 'replace')!r} of {self.name} is not a hash")


# --- connections that end in time -----------------------------------------------------------------


def _get_seconds() -> float:
    left = time_left()
    return MAX_SILENCE if left is None else left


if TYPE_CHECKING:
    _Base = redis.Connection
else:
    _Base = object


class _EndsInTime(_Base):
    """Makes the timeout of each connect, read and write of a connection the time that the current call has left."""

    def connect_check_health(self, *args: Any, **kwargs: Any) -> None:
        self._limit_time()
        super().connect_check_health(*args, **kwargs)

    def send_packed_command(self, *args: Any, **kwargs: Any) -> None:
        self._limit_time()
        super().send_packed_command(*args, **kwargs)

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        self._limit_time()
        return super().read_response(*args, **kwargs)

    def _limit_time(self) -> None:
        self.socket_timeout = self.socket_connect_timeout = seconds = _get_seconds()
        if self._sock is not None:
            self._sock.settimeout(seconds)


class _Connection(_EndsInTime, redis.Connection):
    pass


class _TLSConnection(_EndsInTime, redis.SSLConnection):
    pass


class _SocketConnection(_EndsInTime, redis.UnixDomainSocketConnection):
    pass


def _choose_connection(url: str) -> type[_EndsInTime]:
    if url.startswith("rediss:"):
        return _TLSConnection
    return _SocketConnection if url.startswith("unix:") else _Connection


# --- URLs and messages ----------------------------------------------------------------------------


class Place(NamedTuple):
    """The parts of a URL."""

    url: str
    """The URL for redis-py, with the first host."""
    is_cluster: bool
    other_nodes: tuple[tuple[str, int], ...]
    """The hosts and ports of a cluster after the first."""
    name: str
    """Names the place in messages. It contains no secret."""


def parse_url(url: str) -> Place:
    """Parse the option ``url``.

    Raises:
        ConfigError: the URL is invalid. The message does not quote it, because it may contain a password.
    """
    try:
        parts = urlsplit(url.strip())
        login, at, hosts = parts.netloc.rpartition("@")
        nodes = [_parse_host(host) for host in hosts.split(",")] if hosts else []
    except ValueError:
        _refuse("has an invalid host or port; if the password contains : / @ or #, write %3A %2F %40 %23")
    whole = parts.scheme.lower().replace("valkey", "redis")
    scheme, _, kind = whole.partition("+")
    if kind == "sentinel":
        _refuse("names sentinels, which importers do not ask; set it to the address of the master or of a replica")
    if scheme not in ("redis", "rediss", "unix") or kind not in ("", "cluster") or (scheme == "unix" and kind):
        _refuse("has an unknown scheme")
    if parts.fragment:
        _refuse("has a fragment; if the password contains #, write it as %23")
    is_cluster = kind == "cluster"
    if len(nodes) > 1 and not is_cluster:
        _refuse("names several hosts, which only redis+cluster:// accepts")
    if scheme == "unix" and (nodes or not parts.path.strip("/")):
        _refuse("has no socket path")
    if scheme != "unix" and not nodes:
        _refuse("has no host")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    _check_options(options, scheme)
    db = options.get("db") or ("" if scheme == "unix" else parts.path.strip("/")) or "0"
    if not re.fullmatch("[0-9]{1,9}", db):
        _refuse("has an invalid database; it must be a number")
    if is_cluster and int(db):
        _refuse("names a database, but a cluster has only database 0")
    shown = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in nodes)
    name = f"unix://{parts.path}?db={db}" if scheme == "unix" else f"{whole}://{shown}/{int(db)}"
    # urlunsplit would leave out the slashes of unix:// if there is no login.
    first = f"{scheme}://{login}{at}{hosts.partition(',')[0]}{parts.path}{'?' * bool(parts.query)}{parts.query}"
    return Place(first, is_cluster, tuple(nodes[1:]), name)


def _parse_host(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.netloc != text:
        raise ValueError("no host")
    return parts.hostname, REDIS_PORT if parts.port is None else parts.port


def _check_options(options: dict[str, str], scheme: str) -> None:
    allowed = {"db"} | (TLS_OPTIONS if scheme == "rediss" else LOGIN_OPTIONS if scheme == "unix" else set())
    for name in options:
        if name in ("ssl_cert_reqs", "ssl"):
            _refuse(
                f'has the option {name} after the "?", which is not supported: the certificate is always checked; '
                "set ssl_ca_certs to the file of the authority that signed it"
            )
        if name not in allowed:
            # The name itself is not repeated, because it may be a part of a password that contains "?".
            _refuse(f'has an option after the "?" that is not supported here; it may have {", ".join(sorted(allowed))}')


def _refuse(problem: str) -> NoReturn:
    raise ConfigError(f"url {problem}; expected {SHAPES}") from None


def _escape_pattern(prefix: bytes) -> bytes:
    return re.sub(rb"([*?\[\]\\^])", rb"\\\1", prefix)


def _is_wrong_type(error: ResponseError) -> bool:
    return str(error).startswith("WRONGTYPE")


def _is_from_cluster(error: Exception) -> bool:
    text = str(error)
    kinds = ("MovedError", "AskError", "ClusterCrossSlotError", "ClusterDownError")
    return type(error).__name__ in kinds or text.startswith(("MOVED", "CROSSSLOT", "CLUSTERDOWN"))


def _explain(error: Exception, url: str) -> str:
    if isinstance(error, NoPermissionError):
        return NO_PERMISSION
    if isinstance(error, AuthenticationError) or "NOAUTH" in str(error):
        return NO_LOGIN
    if isinstance(error, TierTimeout | RedisTimeout | TimeoutError):
        return (
            "the server did not answer in time; check that it runs and that this host may reach it"
            f"{NO_TLS * url.startswith('rediss')}"
        )
    if isinstance(error, ConnectionError | OSError):
        return f"{str(error).rstrip('.')}; check url, and that the server runs{NO_TLS * url.startswith('rediss')}"
    return str(error)
