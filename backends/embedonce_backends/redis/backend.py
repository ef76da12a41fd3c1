"""The Redis tier: frames in Redis or Valkey, on one server, a cluster, or a master behind sentinels.

A batch takes one round trip to each server that holds some of its keys. ``docs/redis.md`` lists the accepted URLs and
the permissions that the Redis user needs, and describes what happens when a server is down, full or replaced.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from annotated_types import Gt, Le

from embedonce import hookimpl
from embedonce.contracts import Capabilities
from embedonce.errors import ConfigError, TierError
from embedonce.options import Doc, Size
from embedonce_backends._pages import limit_page_time

from .async_connections import AsyncClient
from .connections import Client, Settings
from .plans import (
    Command,
    Node,
    Plan,
    Trip,
    is_page,
    is_status,
    make_topology,
    raise_failures,
    raise_first_error,
)
from .url import Place, parse_url

if TYPE_CHECKING:
    from ssl import SSLContext

api = 1

MAX_BATCH_KEYS = 512
"""Maximum number of keys per call. An MGET of this many keys takes a fraction of a millisecond, during which the server
does not serve its other clients."""
SCAN_PAGE_KEYS = 1000
"""Number of keys that the server examines for one page of a scan."""
MAX_TTL_MILLISECONDS = 10**15
"""Longest TTL that is sent, about 30,000 years. Redis refuses a TTL that ends after the year 292 million."""
MAX_VALUE_BYTES: Final = 512 * 2**20
"""Redis' default limit for a value; its setting ``proto-max-bulk-len`` can change it."""


class RedisBackend:
    """Holds frames in Redis. All processes that use the same servers and the same prefix share the frames."""

    def __init__(
        self,
        *,
        url: Annotated[
            str,
            Doc(
                "redis://host:6379/0, unix:///path, redis+cluster://host:6379,host:6379 or "
                "redis+sentinel://host:26379,host:26379/service/0. For TLS, write rediss instead of redis."
            ),
        ],
        prefix: Annotated[str, Doc('Text put before every key, such as "embed:v1:".')] = "",
        username: Annotated[str | None, Doc("ACL user, if it is not in the URL.")] = None,
        password: Annotated[str | None, Doc("Password, if it is not in the URL.")] = None,
        sentinel_username: Annotated[str | None, Doc("ACL user of the sentinels.")] = None,
        sentinel_password: Annotated[str | None, Doc("Password of the sentinels.")] = None,
        ca_file: Annotated[
            Path | None, Doc("TLS: PEM file of the authorities that may sign the server's certificate.")
        ] = None,
        cert_file: Annotated[Path | None, Doc("TLS: PEM file of this client's certificate.")] = None,
        key_file: Annotated[Path | None, Doc("TLS: PEM file of the private key of cert_file.")] = None,
        check_hostname: Annotated[
            bool, Doc("TLS: require that the certificate is valid for the server's host name.")
        ] = True,
        max_connections: Annotated[
            int, Gt(0), Le(10_000), Doc("At most this many connections to each server, per process and per event loop.")
        ] = 32,
        max_value_bytes: Annotated[Size, Gt(0), Doc("Do not store larger values.")] = MAX_VALUE_BYTES,
    ) -> None:
        place = parse_url(url)
        self._prefix = _check_prefix(prefix)
        self._topology = make_topology(place)
        self._settings = Settings(
            place,
            username=_choose_login("username", place.username, username),
            password=_choose_login("password", place.password, password),
            sentinel_username=sentinel_username,
            sentinel_password=sentinel_password,
            tls=_make_tls_context(place, ca_file, cert_file, key_file, check_hostname),
            max_connections=max_connections,
        )
        self._client = Client(self._settings)
        self.capabilities = Capabilities(
            scope="network",
            deadline=True,
            ttl=True,
            max_batch=MAX_BATCH_KEYS,
            max_value_bytes=max_value_bytes,
            delete=True,
            scan=True,
            count=True,
            add=True,
            twin=True,
        )

    def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return the frames that are stored under ``keys``, with one MGET or, in a cluster, one pipeline per node.

        Raises:
            PartialAnswer: some nodes of a cluster did not answer; ``answer`` has what the other nodes returned.
        """
        return self._client.run(self._plan_get(keys)) if keys else {}

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item, with one pipeline per server. A server that refuses an item still stores the other items.

        Raises:
            PartialAnswer: some items were not stored; ``__cause__`` is the reason.
            redis.OutOfMemoryError: the server is full, and it is configured not to evict.
            redis.ReadOnlyError: the server is a replica.
        """
        if items:
            self._client.run(self._plan_set(items, ttl))

    def add_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> set[str]:
        """Store the items whose key is missing, and return those keys.

        If several callers add the same key at the same time, only one call stores the item and returns the key.
        """
        return self._client.run(self._plan_add(items, ttl)) if items else set()

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys; the server frees their memory in the background."""
        for start in range(0, len(keys), MAX_BATCH_KEYS):
            self._client.run(self._topology.unlink(self._encode_keys(keys[start : start + MAX_BATCH_KEYS])))

    def scan(self, prefix: str, /) -> Iterator[str]:
        """Yield the keys that start with ``prefix``.

        The server examines about 1,000 keys per request, and can serve other clients between two requests. A key that
        exists during the whole listing is listed. A key may be listed twice if the server's hash table grows or
        shrinks.

        Raises:
            TierError: slots of the cluster moved to another node during the listing, or are still moving when it ends.
                Keys may have been missed.
        """
        with limit_page_time():
            slots = self._client.run(self._topology.fetch_slots())
        pattern = _escape_pattern(self._prefix + prefix) + "*"
        for node in slots.nodes:
            yield from self._scan_node(node, pattern)
        # Look for moving slots first. If such a move ends before the owners are read, its slot has another owner.
        with limit_page_time():
            is_moving = self._client.run(self._topology.has_moving_slots(slots))
        with limit_page_time():
            slots_at_end = self._client.run(self._topology.fetch_slots())
        if is_moving or not slots.has_same_owners(slots_at_end):
            raise TierError("slots of the cluster moved during the listing, so it may have missed keys; try again")

    def _scan_node(self, node: Node, pattern: str) -> Iterator[str]:
        skip = len(self._prefix)
        # A cursor is valid only on the server that returned it. After a failover, the connections of the pool could
        # reach different servers. So all requests of a scan use the same new connection.
        with self._client.open_connection(node) as connection:
            cursor = b"0"
            while True:
                command = ("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_PAGE_KEYS)
                with limit_page_time():
                    (reply,) = connection.ask(Trip(node, [command], is_page))
                raise_first_error([reply])
                cursor, names = reply
                for name in names:
                    yield name.decode("utf-8", "replace")[skip:]
                if cursor == b"0":
                    return

    def count(self, prefix: str, /) -> int:
        """Return how many keys ``scan(prefix)`` yields. It runs the scan, because Redis cannot count keys by prefix."""
        return sum(1 for _ in self.scan(prefix))

    def twin(self) -> RedisTwin:
        """Return a native async client for the same servers and the running event loop."""
        return RedisTwin(self)

    def close(self) -> None:
        """Close the idle connections now, and each connection in use when its call ends."""
        self._client.close()

    # --- plans, for both clients ---

    def _encode_keys(self, keys: Sequence[str]) -> list[bytes]:
        prefix = self._prefix
        return [(prefix + key).encode() for key in keys]

    def _plan_get(self, keys: Sequence[str]) -> Plan[dict[str, bytes]]:
        values = yield from self._topology.get(self._encode_keys(keys))
        found = {key: value for key, value in zip(keys, values, strict=True) if type(value) is bytes}
        if len(found) < len(keys):
            raise_failures(keys, values, found)
        return found

    def _plan_set(self, items: Mapping[str, bytes], ttl: float | None) -> Plan[None]:
        names = self._encode_keys(list(items))
        commands = _make_set_commands(names, items, _make_ttl_options(ttl))
        replies = yield from self._topology.send_each(names, commands, is_status)
        raise_failures([*items], replies, None)

    def _plan_add(self, items: Mapping[str, bytes], ttl: float | None) -> Plan[set[str]]:
        names = self._encode_keys(list(items))
        commands = _make_set_commands(names, items, ("NX", *_make_ttl_options(ttl)))
        replies = yield from self._topology.send_each(names, commands, is_status)
        added = {key for key, reply in zip(items, replies, strict=True) if reply == b"OK"}
        raise_failures([*items], replies, added)
        return added


class RedisTwin:
    """The native async client of a :class:`RedisBackend`, for the event loop in which it was made."""

    def __init__(self, backend: RedisBackend) -> None:
        self._backend = backend
        self._client = AsyncClient(backend._settings)

    async def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return the frames that are stored under ``keys``."""
        return await self._client.run(self._backend._plan_get(keys)) if keys else {}

    async def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item."""
        if items:
            await self._client.run(self._backend._plan_set(items, ttl))

    async def close(self) -> None:
        """Close the idle connections now, and each connection in use when its call ends."""
        await self._client.close()


def _make_set_commands(names: Sequence[bytes], items: Mapping[str, bytes], options: tuple[Any, ...]) -> list[Command]:
    return [("SET", name, value, *options) for name, value in zip(names, items.values(), strict=True)]


def _make_ttl_options(ttl: float | None) -> tuple[Any, ...]:
    """Return the options of SET for a ttl in seconds."""
    if ttl is None:
        return ()
    return ("PX", max(1, math.ceil(min(ttl * 1000, MAX_TTL_MILLISECONDS))))


def _escape_pattern(text: str) -> str:
    """Return the glob pattern that matches only ``text``."""
    return "".join("\\" + char if char in "*?[]^\\-" else char for char in text)


def _check_prefix(prefix: str) -> str:
    try:
        prefix.encode()
    except UnicodeEncodeError:
        raise ConfigError("prefix must not contain characters that UTF-8 cannot encode") from None
    return prefix


def _choose_login(name: str, url_value: str | None, option_value: str | None) -> str | None:
    """Return a user or a password, which may be set in the URL or as an option, but not in both ways."""
    if url_value is not None and option_value is not None:
        raise ConfigError(f"{name} is set both in url and as an option; remove one of the two")
    return option_value if url_value is None else url_value


def _make_tls_context(
    place: Place, ca_file: Path | None, cert_file: Path | None, key_file: Path | None, check_hostname: bool
) -> SSLContext | None:
    files = {"ca_file": ca_file, "cert_file": cert_file, "key_file": key_file}
    if not place.tls:
        for name, file in files.items():
            if file is not None:
                raise ConfigError(f"{name} requires TLS: use a rediss:// URL")
        return None
    import ssl

    try:
        context = ssl.create_default_context(cafile=_expand_path(ca_file))
        if cert_file is not None:
            context.load_cert_chain(cert_file.expanduser(), _expand_path(key_file))
    except OSError as error:  # ssl.SSLError is an OSError
        raise ConfigError(f"cannot load ca_file, cert_file or key_file: {error.strerror or error}") from error
    context.check_hostname = check_hostname
    return context


def _expand_path(file: Path | None) -> str | None:
    return None if file is None else str(file.expanduser())


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    """Register the Redis backend."""
    return {"redis": RedisBackend}
