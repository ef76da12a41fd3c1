"""The Redis tier: frames under keys of one server, a cluster, or a master behind sentinels; Valkey as well.

A batch is one trip to each server that holds some of its keys. ``docs/redis.md`` tells which URLs there are,
what happens when a server is down, full or replaced, and what a user of the tier has to be allowed to do.
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
from embedonce_backends._pages import page

from .async_connections import AsyncClient
from .connections import Client, Settings
from .plans import Command, Node, Plan, Trip, is_page, is_status, raised, settled, topology_of
from .url import Place, place_of

if TYPE_CHECKING:
    from ssl import SSLContext

api = 1

KEYS = 512
"""Keys of one call. A server answers nobody else while it answers an MGET: a fraction of a millisecond for these."""
SCANNED = 1000
"""Keys that the server looks at for one page of a scan."""
MOST_MILLISECONDS = 10**15
"""Redis refuses a TTL that ends after the year 292 million. This is 30,000 years."""
LARGEST: Final = 512 * 2**20
"""Redis' own limit for a value, unless its ``proto-max-bulk-len`` says another."""


class RedisBackend:
    """Holds frames in Redis, for all who are given the same servers and prefix."""

    def __init__(
        self,
        *,
        url: Annotated[
            str,
            Doc(
                "redis://host:6379/0, unix:///path, redis+cluster://host:6379,host:6379 or "
                "redis+sentinel://host:26379,host:26379/service/0; rediss for redis: TLS."
            ),
        ],
        prefix: Annotated[str, Doc('Put before each key, such as "embed:v1:".')] = "",
        username: Annotated[str | None, Doc("ACL user, where the URL names none.")] = None,
        password: Annotated[str | None, Doc("Password, where the URL has none.")] = None,
        sentinel_username: Annotated[str | None, Doc("ACL user of the sentinels.")] = None,
        sentinel_password: Annotated[str | None, Doc("Password of the sentinels.")] = None,
        ca_file: Annotated[Path | None, Doc("TLS: who may sign the server's certificate; PEM.")] = None,
        cert_file: Annotated[Path | None, Doc("TLS: this client's certificate; PEM.")] = None,
        key_file: Annotated[Path | None, Doc("TLS: the key of cert_file; PEM.")] = None,
        check_hostname: Annotated[bool, Doc("TLS: the certificate must be for the host of the URL.")] = True,
        max_connections: Annotated[
            int, Gt(0), Le(10_000), Doc("Most connections to each server, of this process; as many of each event loop.")
        ] = 32,
        max_value_bytes: Annotated[Size, Gt(0), Doc("Larger values are not stored.")] = LARGEST,
    ) -> None:
        place = place_of(url)
        self._prefix = _checked(prefix)
        self._topology = topology_of(place)
        self._settings = Settings(
            place,
            username=_one("username", place.username, username),
            password=_one("password", place.password, password),
            sentinel_username=sentinel_username,
            sentinel_password=sentinel_password,
            tls=_tls(place, ca_file, cert_file, key_file, check_hostname),
            most=max_connections,
        )
        self._client = Client(self._settings)
        self.capabilities = Capabilities(
            scope="network",
            deadline=True,
            ttl=True,
            max_batch=KEYS,
            max_value_bytes=max_value_bytes,
            delete=True,
            scan=True,
            count=True,
            add=True,
            twin=True,
        )

    def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return what is there, by one MGET, or in a cluster one pipeline per node.

        Raises:
            PartialAnswer: nodes of a cluster do not answer; what the others have is in it.
        """
        return self._client.run(self._getting(keys)) if keys else {}

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item, by one pipeline per server. Where one is refused, the others are stored all the same.

        Raises:
            PartialAnswer: some are not stored, and why is its cause.
            redis.OutOfMemoryError: the server is full and may not evict.
            redis.ReadOnlyError: the server is a replica.
        """
        if items:
            self._client.run(self._setting(items, ttl))

    def add_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> set[str]:
        """Store the items whose key is absent, and return those keys; exactly one caller gets each."""
        return self._client.run(self._adding(items, ttl)) if items else set()

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys; the server frees their memory in the background."""
        for start in range(0, len(keys), KEYS):
            self._client.run(self._topology.unlink(self._names(keys[start : start + KEYS])))

    def scan(self, prefix: str, /) -> Iterator[str]:
        """Yield the keys that start with ``prefix``, page by page; other clients are served in between.

        A key that is there from beginning to end is among them; one may come twice while the server's table grows
        or shrinks.

        Raises:
            TierError: slots of the cluster moved meanwhile, so that keys may have been missed.
        """
        with page():
            nodes = self._client.run(self._topology.masters())
        pattern = _pattern(self._prefix + prefix)
        for node in nodes:
            yield from self._scan(node, pattern)
        with page():
            changed = self._client.run(self._topology.masters()) != nodes
        if changed:
            raise TierError("the cluster was changed during the listing, which may have missed keys; try again")

    def _scan(self, node: Node, pattern: str) -> Iterator[str]:
        skip = len(self._prefix)
        # A connection of its own: if another server took over, the cursor would mean something else there.
        with self._client.alone(node) as connection:
            cursor = b"0"
            while True:
                command = ("SCAN", cursor, "MATCH", pattern, "COUNT", SCANNED)
                with page():
                    (reply,) = connection.ask(Trip(node, [command], is_page))
                raised([reply])
                cursor, names = reply
                for name in names:
                    yield name.decode("utf-8", "replace")[skip:]
                if cursor == b"0":
                    return

    def count(self, prefix: str, /) -> int:
        """Return how many keys ``scan(prefix)`` gives: Redis keeps no such figure, so they are walked over."""
        return sum(1 for _ in self.scan(prefix))

    def twin(self) -> RedisTwin:
        """Return a native async client of the same servers, for the running event loop."""
        return RedisTwin(self)

    def close(self) -> None:
        """Close every connection, those in use when their call ends."""
        self._client.close()

    # --- plans, for both clients ---

    def _names(self, keys: Sequence[str]) -> list[bytes]:
        prefix = self._prefix
        return [(prefix + key).encode() for key in keys]

    def _getting(self, keys: Sequence[str]) -> Plan[dict[str, bytes]]:
        values = yield from self._topology.get(self._names(keys))
        found = {key: value for key, value in zip(keys, values, strict=True) if type(value) is bytes}
        if len(found) < len(keys):
            settled(keys, values, found)
        return found

    def _setting(self, items: Mapping[str, bytes], ttl: float | None) -> Plan[None]:
        names = self._names(list(items))
        replies = yield from self._topology.each(names, _sets(names, items, _lasting(ttl)), is_status)
        settled([*items], replies, None)

    def _adding(self, items: Mapping[str, bytes], ttl: float | None) -> Plan[set[str]]:
        names = self._names(list(items))
        replies = yield from self._topology.each(names, _sets(names, items, ("NX", *_lasting(ttl))), is_status)
        added = {key for key, reply in zip(items, replies, strict=True) if reply == b"OK"}
        settled([*items], replies, added)
        return added


class RedisTwin:
    """The Redis backend as a native async client, for the event loop in which it was made."""

    def __init__(self, backend: RedisBackend) -> None:
        self._backend = backend
        self._client = AsyncClient(backend._settings)

    async def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return what is there."""
        return await self._client.run(self._backend._getting(keys)) if keys else {}

    async def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item."""
        if items:
            await self._client.run(self._backend._setting(items, ttl))

    async def close(self) -> None:
        """Close every connection, those in use when their call ends."""
        await self._client.close()


def _sets(names: Sequence[bytes], items: Mapping[str, bytes], options: tuple[Any, ...]) -> list[Command]:
    return [("SET", name, value, *options) for name, value in zip(names, items.values(), strict=True)]


def _lasting(ttl: float | None) -> tuple[Any, ...]:
    if ttl is None:
        return ()
    return ("PX", max(1, math.ceil(min(ttl * 1000, MOST_MILLISECONDS))))


def _pattern(prefix: str) -> str:
    """Return the glob pattern of what starts with ``prefix``."""
    return "".join("\\" + char if char in "*?[]^\\-" else char for char in prefix) + "*"


def _checked(prefix: str) -> str:
    try:
        prefix.encode()
    except UnicodeEncodeError:
        raise ConfigError("prefix holds a character that UTF-8 cannot hold") from None
    return prefix


def _one(name: str, of_url: str | None, given: str | None) -> str | None:
    if of_url is not None and given is not None:
        raise ConfigError(f"{name} is given twice: leave it out of the url")
    return given if of_url is None else of_url


def _tls(
    place: Place, ca_file: Path | None, cert_file: Path | None, key_file: Path | None, check_hostname: bool
) -> SSLContext | None:
    files = {"ca_file": ca_file, "cert_file": cert_file, "key_file": key_file}
    if not place.tls:
        for name, file in files.items():
            if file is not None:
                raise ConfigError(f"{name} is for TLS, which an url with rediss speaks")
        return None
    import ssl

    try:
        context = ssl.create_default_context(cafile=_path(ca_file))
        if cert_file is not None:
            context.load_cert_chain(cert_file.expanduser(), _path(key_file))
    except OSError as error:  # ssl.SSLError, too
        raise ConfigError(f"ca_file, cert_file or key_file cannot be used ({error.strerror or error})") from error
    context.check_hostname = check_hostname
    return context


def _path(file: Path | None) -> str | None:
    return None if file is None else str(file.expanduser())


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    """Name this file's backend."""
    return {"redis": RedisBackend}
