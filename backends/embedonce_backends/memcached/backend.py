"""The memcached tier: frames on one or several memcached nodes. Rendezvous hashing chooses the node of each key.

``docs/memcached.md`` describes what happens when a node is down, and what memcached cannot do.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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

from .nodes import Connection, Node, SeveralAddresses, is_node_failure

api = 1

P = TypeVar("P")
R = TypeVar("R")

MAX_BATCH_KEYS = 512
"""Maximum number of keys per call."""
MAX_VALUE_BYTES = 2**20 - 512
"""Maximum size of a value in bytes. memcached's limit of 1 MiB per item includes a header and the key. In version 1.6,
the header takes 59 bytes, and the key takes up to 250 bytes."""
MAX_KEY_LENGTH = 250
"""memcached's limit for a key, in bytes."""
MAX_OWN_KEY_LENGTH = 119
"""Length of the longest key of embedonce, without the prefix."""


class _NodeSkipped(NodeDown):
    """The error for a node that was skipped, because the node had failed shortly before."""


class MemcachedBackend:
    """Holds frames on memcached nodes. memcached may evict them at any time."""

    def __init__(
        self,
        *,
        servers: Annotated[
            list[str],
            MinLen(1),
            Doc(
                "Nodes, each as host:port or as the path of a Unix socket. All processes that share the nodes must "
                "spell them in the same way, because the spelling determines which node holds a key."
            ),
        ],
        prefix: Annotated[str, Doc("Text put before every key.")] = "",
        max_value_bytes: Annotated[
            Size, Gt(0), Doc("Do not store larger values. Raise this limit if memcached was started with a larger -I.")
        ] = MAX_VALUE_BYTES,
        max_connections: Annotated[int, Gt(0), Doc("At most this many connections to each node.")] = 16,
    ) -> None:
        names = [_normalize_server(server, index) for index, server in enumerate(_check_servers(servers))]
        if len(set(names)) < len(names):
            raise ConfigError("servers must not contain a node twice")
        max_prefix = MAX_KEY_LENGTH - MAX_OWN_KEY_LENGTH
        if not re.fullmatch(rf"[!-~]{{0,{max_prefix}}}", prefix):
            raise ConfigError(f"prefix must be at most {max_prefix} ASCII characters, without white space")
        self.capabilities = Capabilities(
            scope="network",
            deadline=True,
            ttl=True,
            max_batch=MAX_BATCH_KEYS,
            max_value_bytes=max_value_bytes,
            delete=True,
            add=True,
            bounded=True,
        )
        self._nodes = {
            name: Node(name, prefix=prefix, max_connections=max_connections, is_only_node=len(names) == 1)
            for name in names
        }
        self._ring: Any = RendezvousHash(names, hash_function=_hash_key)
        self._closed = False
        _backends.add(self)
        weakref.finalize(self, _close_nodes, list(self._nodes.values()))

    def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return the frames that are stored under ``keys``, with one ``get`` per node.

        Raises:
            PartialAnswer: some nodes did not answer; ``answer`` has what the other nodes returned.
            NodeDown: none of the nodes of these keys answered, but other nodes are up.
            Exception: no node is up; the exception is an error of pymemcache or of the socket.
        """
        found: dict[str, bytes] = {}
        parts = self._group_keys(keys)
        answers, failures = self._call_nodes(parts, Connection.get_all)
        for answer in answers:
            found.update(answer)
        self._raise_failures(failures, parts, found)
        return found

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item, with one round trip per node.

        Raises:
            MemcacheServerError: the servers refused every value.
            PartialAnswer: some values were refused, or some nodes did not answer; the other values are stored.
            NodeDown: none of the nodes of these keys answered, but other nodes are up.
        """
        parts = self._group_items(items)
        answers, failures = self._call_nodes(parts, lambda connection, part: connection.set_all(part, ttl))
        refused = [key for answer in answers for key in answer]
        self._raise_failures(failures, parts, None, refused)
        if refused:
            problem = MemcacheServerError(f"{len(refused)} of {len(items)} values were not stored")
            if len(refused) == len(items):
                raise problem
            raise PartialAnswer(str(problem), failed=refused) from problem

    def add_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> set[str]:
        """Store the items whose key is missing, with one round trip per node, and return those keys.

        Raises:
            PartialAnswer: some nodes did not answer; ``answer`` has the keys that the other nodes stored.
            NodeDown: none of the nodes of these keys answered, but other nodes are up.
        """
        parts = self._group_items(items)
        # There is no retry. If only the reply was lost, the key is already stored, and a retry would report that
        # another caller stored it.
        answers, failures = self._call_nodes(
            parts, lambda connection, part: connection.add_all(part, ttl), may_retry=False
        )
        added: set[str] = set()
        added.update(*answers)
        self._raise_failures(failures, parts, added)
        return added

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys, with one round trip per node. Nodes that seem to be down are not skipped.

        Raises:
            Exception: at least one node failed, and this is the first error. The other nodes removed their keys.
        """
        parts = self._group_keys(list(dict.fromkeys(keys)))
        _, failures = self._call_nodes(parts, Connection.delete_all, include_down=True)
        for error in failures.values():
            raise error

    def describe(self) -> str:
        """Ask all nodes, and return a text that says how many there are and which of them do not answer."""
        nodes = dict.fromkeys(self._nodes.values())
        _, failures = self._call_nodes(nodes, lambda connection, _: connection.version(), include_down=True)
        silent = "".join(f"; {node.name} does not answer ({_describe_error(e)})" for node, e in failures.items())
        return f"frames on {len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}{silent}"

    def close(self) -> None:
        """Close the idle connections now, and each connection in use when its call ends."""
        self._closed = True
        _close_nodes(self._nodes.values())

    # --- helpers ------------------------------------------------------------------------------

    def _group_keys(self, keys: Sequence[str]) -> dict[Node, Sequence[str]]:
        if not keys:
            return {}
        if len(self._nodes) == 1:
            (node,) = self._nodes.values()
            return {node: keys}
        parts: dict[str, list[str]] = {}
        for key in keys:
            parts.setdefault(self._ring.get_node(key), []).append(key)
        return {self._nodes[name]: part for name, part in parts.items()}

    def _group_items(self, items: Mapping[str, bytes]) -> dict[Node, Mapping[str, bytes]]:
        parts = self._group_keys(list(items))
        return {node: {key: items[key] for key in part} for node, part in parts.items()}

    def _call_nodes(
        self,
        parts: Mapping[Node, P],
        call: Callable[[Connection, P], R],
        *,
        may_retry: bool = True,
        include_down: bool = False,
    ) -> tuple[list[R], dict[Node, Exception]]:
        """Call each node with its part of the keys or items. Return the results, and the errors by node.

        Nodes that are down are skipped while another node is up. If no node is up, all nodes are called. They need not
        be skipped then, because their errors open the tier's breaker, and an open breaker skips the whole tier.
        """
        if self._closed:
            raise CacheClosed("the memcached backend is closed")
        time_left()
        include_down = include_down or len(self._nodes) == 1 or not self._is_any_up()
        answers: list[R] = []
        failures: dict[Node, Exception] = {}
        for index, (node, part) in enumerate(parts.items()):
            if not include_down and not node.admits_call():
                failures[node] = _NodeSkipped(f"memcached {node.name} failed recently; skipping it for now")
                continue
            try:
                with self._limit_node_time(len(parts) - index):
                    answers.append(node.run(call, part, may_retry=may_retry))
            except Exception as error:  # noqa: BLE001  (the caller raises it, or puts it into a PartialAnswer)
                failures[node] = error
                if is_node_failure(error):
                    node.mark_failed(error)
            else:
                node.mark_answered()
        return answers, failures

    def _limit_node_time(self, nodes: int) -> AbstractContextManager[None]:
        """Return a context that limits the time of the next node.

        ``nodes`` is the number of nodes that still have to be asked, including the next node. The remaining time is
        divided by ``nodes`` + 1. So even if nodes time out, the call ends before its deadline and can return the
        results of the other nodes. A node without others has the whole time.
        """
        if len(self._nodes) == 1:
            return _NO_LIMIT
        left = time_left()
        return deadline(None if left is None else left / (nodes + 1))

    def _is_any_up(self) -> bool:
        return any(node.is_up for node in self._nodes.values())

    def _raise_failures(
        self,
        failures: Mapping[Node, Exception],
        parts: Mapping[Node, Collection[str]],
        answer: Any,
        refused: Sequence[str] = (),
    ) -> None:
        """Raise an exception if a node failed.

        Raises:
            PartialAnswer: some nodes failed; the exception contains ``answer``, the result from the other nodes.
            NodeDown: every node in ``parts`` failed or was skipped, but other nodes are up.
            Exception: no node is up; the exception is the first error.
        """
        if not failures:
            return
        problem = self._make_error(failures)
        if type(problem) is _NodeSkipped:  # another call has changed the state of the node since it was skipped
            problem = NodeDown(str(problem))
        if len(failures) == len(parts):
            raise problem
        failed = [key for node in failures for key in parts[node]]
        raise PartialAnswer(str(problem), answer=answer, failed=[*failed, *refused]) from problem

    def _make_error(self, failures: Mapping[Node, Exception]) -> Exception:
        asked = [error for error in failures.values() if type(error) is not _NodeSkipped]
        if not self._is_any_up():
            return (asked or [*failures.values()])[0]
        for node, error in failures.items():
            if node.is_up:
                return error
        kind = NodeTimeout if any(isinstance(error, TimeoutError) for error in asked) else NodeDown
        reasons = dict.fromkeys(_describe_error(error) for error in asked)
        reason = f" ({'; '.join(reasons)})" if reasons else ""
        return kind(f"memcached {', '.join(node.name for node in failures)}: no answer{reason}; other nodes are up")


def _describe_error(error: Exception) -> str:
    return str(error) if isinstance(error, SeveralAddresses) else type(error).__name__


_NO_LIMIT: AbstractContextManager[None] = nullcontext()

_HOST = re.compile(r"([\w.-]+|\[[\w:.%]+\])(?::([0-9]{1,5}))?")


def _check_servers(servers: object) -> Sequence[object]:
    if isinstance(servers, str) or not isinstance(servers, Sequence) or not servers:
        raise ConfigError('servers must be a list of nodes, such as ["host:11211"]')
    return servers


def _normalize_server(server: object, index: int) -> str:
    """Return a node's name: ``host:port`` or a path. The name determines which keys are stored on the node."""
    if isinstance(server, str) and server.removeprefix("unix:").startswith("/"):
        return server.removeprefix("unix:")
    match = _HOST.fullmatch(server) if isinstance(server, str) else None
    if match is None or not 0 < int(match[2] or 11211) < 2**16:
        advice = _advise(server) if isinstance(server, str) else ""
        raise ConfigError(
            f'servers[{index}] must be "host:port", "[IPv6 address]:port" or the path of a socket{advice}'
        )
    return f"{match[1]}:{match[2] or 11211}"


def _advise(server: str) -> str:
    """Return what is wrong with an invalid node, without quoting it, because it may contain a password."""
    if "@" in server:
        return "; this tier does not support a login"
    if re.match("(memcacheds|tls|ssl)://", server):
        return "; this tier does not support TLS"
    if "?" in server:
        return '; set max_connections and timeout in the table of the tier, not after a "?"'
    if "://" in server:
        return ", without a scheme such as memcached://"
    if "," in server:
        return "; write each node as an item of the list"
    return ""


def _hash_key(text: str, seed: int) -> int:
    # pymemcache's own hash function is slow, because it is murmur3 in pure Python.
    return xxh3_64_intdigest(text.encode(), seed)


def _close_nodes(nodes: Iterable[Node]) -> None:
    for node in nodes:
        node.close()


# --- forks ------------------------------------------------------------------------------------

_backends: weakref.WeakSet[MemcachedBackend] = weakref.WeakSet()


def _reset_after_fork() -> None:
    for backend in list(_backends):
        for node in backend._nodes.values():
            node.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    """Register the memcached backend."""
    return {"memcached": MemcachedBackend}
