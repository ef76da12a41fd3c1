"""The memcached tier: frames on one or several memcached nodes, each key on one of them by rendezvous hashing.

``docs/memcached.md`` tells what a node that is down costs, and what memcached cannot do.
"""

from __future__ import annotations

import math
import os
import re
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from annotated_types import Gt, MinLen
from pymemcache.client.rendezvous import RendezvousHash  # type: ignore[import-untyped]
from pymemcache.exceptions import MemcacheServerError  # type: ignore[import-untyped]
from xxhash import xxh3_64_intdigest

from embedonce import hookimpl
from embedonce.contracts import Capabilities, deadline, time_left
from embedonce.errors import CacheClosed, ConfigError, PartialAnswer
from embedonce.options import Doc, Size
from embedonce_backends._nodes import NodeDown, NodeTimeout

from .nodes import Connection, Node, silences

api = 1

P = TypeVar("P")
R = TypeVar("R")

BATCH = 512
"""Keys of one call."""
LARGEST = 2**20 - 512
"""memcached's limit of 1 MiB holds header and key too: with 1.6, 59 bytes and the key, which has 250 at most."""
LONGEST_KEY = 250
LONGEST_OF_OURS = 119
LONGEST_RELATIVE = 30 * 86_400
"""memcached reads a longer ttl as a date, in seconds since 1970."""
LAST_DATE = 2**31 - 1
"""A later date wraps around, and is in the past."""


class _LeftOut(NodeDown):
    """A node was not asked, because it failed a moment ago."""


class MemcachedBackend:
    """Holds frames on memcached nodes, for as long as memcached likes to keep them."""

    def __init__(
        self,
        *,
        servers: Annotated[
            list[str],
            MinLen(1),
            Doc("The nodes, host:port each (or the path of a Unix socket), written alike by all who share them."),
        ],
        prefix: Annotated[str, Doc("Put before every key.")] = "",
        max_value_bytes: Annotated[
            Size, Gt(0), Doc("Leave out larger values. Raise it where memcached was started with a larger -I.")
        ] = LARGEST,
        max_connections: Annotated[int, Gt(0), Doc("At most this many connections to each node.")] = 16,
    ) -> None:
        names = [_name(server, place) for place, server in enumerate(_listed(servers))]
        if len(set(names)) < len(names):
            raise ConfigError("servers names a node twice")
        if not re.fullmatch(rf"[!-~]{{0,{LONGEST_KEY - LONGEST_OF_OURS}}}", prefix):
            raise ConfigError(
                f"prefix is at most {LONGEST_KEY - LONGEST_OF_OURS} characters of ASCII, without white space"
            )
        self.capabilities = Capabilities(
            scope="network",
            deadline=True,
            ttl=True,
            max_batch=BATCH,
            max_value_bytes=max_value_bytes,
            delete=True,
            add=True,
            bounded=True,
        )
        self.clock: Callable[[], float] = time.time
        """Unix time in seconds, for a ttl above thirty days."""
        self._nodes = {name: Node(name, prefix=prefix, most=max_connections, alone=len(names) == 1) for name in names}
        self._ring: Any = RendezvousHash(names, hash_function=_hash)
        self._closed = False
        _all.add(self)
        weakref.finalize(self, _close, list(self._nodes.values()))

    def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return what is there, by one ``get`` per node.

        Raises:
            PartialAnswer: some nodes do not answer; what the others have is in it.
            NodeDown: no node that was asked has answered; others are up.
            Exception: pymemcache's or the socket's: no node is up.
        """
        found: dict[str, bytes] = {}
        parts = self._by_node(keys)
        answers, failures = self._ask(parts, Connection.get_all)
        for answer in answers:
            found.update(answer)
        self._check(failures, parts, found)
        return found

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item, in one trip per node.

        Raises:
            MemcacheServerError: every value was refused.
            PartialAnswer: some values were refused, or some nodes do not answer; the other values are stored.
            NodeDown: no node that was asked has answered; others are up.
        """
        expire = self._expire(ttl)
        parts = self._items_by_node(items)
        answers, failures = self._ask(parts, lambda connection, part: connection.set_all(part, expire))
        refused = [key for answer in answers for key in answer]
        self._check(failures, parts, None, refused)
        if refused:
            problem = MemcacheServerError(f"{len(refused)} of {len(items)} values were not stored")
            if len(refused) == len(items):
                raise problem
            raise PartialAnswer(str(problem), failed=refused) from problem

    def add_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> set[str]:
        """Store the items whose key is absent, in one trip per node, and return those keys.

        Raises:
            PartialAnswer: some nodes do not answer; what the others have stored is in it.
            NodeDown: no node that was asked has answered; others are up.
        """
        expire = self._expire(ttl)
        parts = self._items_by_node(items)
        # Never twice: an answer that was lost had perhaps stored, and the second would name another as the winner.
        answers, failures = self._ask(parts, lambda connection, part: connection.add_all(part, expire), twice=False)
        added: set[str] = set()
        added.update(*answers)
        self._check(failures, parts, added)
        return added

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys, in one trip per node. A node that is down is asked all the same.

        Raises:
            Exception: of a node that failed; the others have removed theirs.
        """
        parts = self._by_node(list(dict.fromkeys(keys)))
        _, failures = self._ask(parts, Connection.delete_all, even_down=True)
        for error in failures.values():
            raise error

    def describe(self) -> str:
        """Say how many nodes there are, and which do not answer."""
        nodes = dict.fromkeys(self._nodes.values())
        _, failures = self._ask(nodes, lambda connection, _: connection.version(), even_down=True)
        silent = "".join(f"; {node.name} does not answer ({type(e).__name__})" for node, e in failures.items())
        return f"frames on {len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}{silent}"

    def close(self) -> None:
        """Close every connection."""
        self._closed = True
        _close(self._nodes.values())

    # --- helpers ------------------------------------------------------------------------------

    def _expire(self, ttl: float | None) -> int:
        """Return memcached's ``exptime``: seconds, from thirty days on a date, 0 for never."""
        if ttl is None:
            return 0
        if ttl <= LONGEST_RELATIVE:
            return max(1, math.ceil(ttl))
        date = math.ceil(self.clock() + ttl)
        return date if date <= LAST_DATE else 0

    def _by_node(self, keys: Sequence[str]) -> dict[Node, Sequence[str]]:
        if not keys:
            return {}
        if len(self._nodes) == 1:
            (node,) = self._nodes.values()
            return {node: keys}
        parts: dict[str, list[str]] = {}
        for key in keys:
            parts.setdefault(self._ring.get_node(key), []).append(key)
        return {self._nodes[name]: part for name, part in parts.items()}

    def _items_by_node(self, items: Mapping[str, bytes]) -> dict[Node, Mapping[str, bytes]]:
        parts = self._by_node(list(items))
        return {node: {key: items[key] for key in part} for node, part in parts.items()}

    def _ask(
        self,
        parts: Mapping[Node, P],
        call: Callable[[Connection, P], R],
        *,
        twice: bool = True,
        even_down: bool = False,
    ) -> tuple[list[R], dict[Node, Exception]]:
        """Make the call on every node with its part; return the answers, and the errors of the others by node.

        A node that is down is left out while another is up: where none is, all are asked, and the
        tier's breaker decides.
        """
        if self._closed:
            raise CacheClosed("the memcached backend is closed")
        time_left()
        even_down = even_down or not self._some_up()
        answers: list[R] = []
        failures: dict[Node, Exception] = {}
        for place, (node, part) in enumerate(parts.items()):
            if not even_down and not node.admits():
                failures[node] = _LeftOut(f"memcached {node.name} is left out for now")
                continue
            share = self._share(len(parts) - place)
            try:
                with deadline(share):
                    answers.append(node.run(call, part, twice=twice))
            except Exception as error:  # noqa: BLE001  (the caller raises it, unless the other nodes serve)
                failures[node] = error
                if silences(error):
                    node.failed(error)
            else:
                node.answered()
        return answers, failures

    def _share(self, nodes: int) -> float | None:
        """Return the seconds that one node may take while ``nodes`` are still to be asked.

        One share stays unused, so that the call ends before its deadline, with what the others gave.
        """
        left = time_left()
        return left if left is None or len(self._nodes) == 1 else left / (nodes + 1)

    def _some_up(self) -> bool:
        return any(node.up for node in self._nodes.values())

    def _check(
        self,
        failures: Mapping[Node, Exception],
        parts: Mapping[Node, Collection[str]],
        answer: Any,
        refused: Sequence[str] = (),
    ) -> None:
        """Raise what went wrong with nodes, if anything did; with the answer of those that gave one.

        As NodeDown where the nodes that failed are not all there are.
        """
        if not failures:
            return
        problem = self._problem(failures)
        if len(failures) == len(parts):
            raise problem
        failed = [key for node in failures for key in parts[node]]
        raise PartialAnswer(str(problem), answer=answer, failed=[*failed, *refused]) from problem

    def _problem(self, failures: Mapping[Node, Exception]) -> Exception:
        asked = [error for error in failures.values() if type(error) is not _LeftOut]
        if not self._some_up():
            return (asked or [*failures.values()])[0]
        for node, error in failures.items():
            if node.up:
                return error
        kind = NodeTimeout if any(isinstance(error, TimeoutError) for error in asked) else NodeDown
        return kind(f"memcached {', '.join(node.name for node in failures)}: no answer; others are up")


_HOST = re.compile(r"([\w.-]+|\[[\w:.%]+\])(?::([0-9]{1,5}))?")


def _listed(servers: object) -> Sequence[object]:
    if isinstance(servers, str) or not isinstance(servers, Sequence) or not servers:
        raise ConfigError('servers is a list of nodes: ["host:11211"]')
    return servers


def _name(server: object, place: int) -> str:
    """Return a node's name, ``host:port`` or a path: by it keys find their node."""
    if isinstance(server, str) and server.removeprefix("unix:").startswith("/"):
        return server.removeprefix("unix:")
    match = _HOST.fullmatch(server) if isinstance(server, str) else None
    if match is None or not 0 < int(match[2] or 11211) < 2**16:
        raise ConfigError(f'servers[{place}] is no "host:port", no "[IPv6 address]:port" and no path of a socket')
    return f"{match[1]}:{match[2] or 11211}"


def _hash(text: str, seed: int) -> int:
    # pymemcache's murmur3 is pure Python.
    return xxh3_64_intdigest(text.encode(), seed)


def _close(nodes: Iterable[Node]) -> None:
    for node in nodes:
        node.close()


# --- forks ------------------------------------------------------------------------------------

_all: weakref.WeakSet[MemcachedBackend] = weakref.WeakSet()


def _in_child() -> None:
    for backend in list(_all):
        for node in backend._nodes.values():
            node.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    """Register the memcached backend."""
    return {"memcached": MemcachedBackend}
