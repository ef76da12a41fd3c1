"""What is said to which server of Redis, without saying it: plans that the blocking and the async client carry out.

A plan is a generator. It yields :class:`Trip` s, each to one server, is sent the replies of each, or is thrown
what went wrong, and returns the result. Where some of several trips fail, their error stands for each of their
replies. Both clients thus do the same, and do it at the same time on all servers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import hiredis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import (
    AskError,
    ClusterDownError,
    ConnectionError,
    InvalidResponse,
    MovedError,
    NoPermissionError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from embedonce.errors import PartialAnswer
from embedonce_backends._nodes import NodeDown

from .url import Address, Place

T = TypeVar("T")

REDIRECTS = 4
"""How often one call follows keys that have moved to another node of a cluster."""

Role: TypeAlias = Literal["data", "master", "sentinel"]
Command: TypeAlias = tuple[Any, ...]
Reply: TypeAlias = Any
Check: TypeAlias = Callable[[Reply], bool]


class Node(NamedTuple):
    """A server and what it is here: ``"master"`` has to say of itself that it is one, ``"data"`` is taken as it is."""

    address: Address
    role: Role = "data"


class Trip(NamedTuple):
    """Commands to one node, all sent before the first reply is read."""

    node: Node
    commands: Sequence[Command]
    check: Check
    """Whether a reply is of the kind that was asked for; errors are replies too."""

    def packed(self) -> bytes:
        """Return the commands as they are sent."""
        return b"".join(map(hiredis.pack_command, self.commands))


Plan: TypeAlias = Generator[Sequence[Trip], Sequence[Sequence[Reply]], T]


# --- what replies look like ---------------------------------------------------------------------

_VALUES = {bytes, type(None)}


def is_value(reply: Reply) -> bool:
    """Accept the reply of GET."""
    return type(reply) in _VALUES


def is_status(reply: Reply) -> bool:
    """Accept the reply of SET: OK, or nothing where NX keeps it from being stored. Of ASKING, too."""
    return reply is None or reply == b"OK"


def is_number(reply: Reply) -> bool:
    """Accept the reply of UNLINK."""
    return type(reply) is int


def is_list(reply: Reply) -> bool:
    """Accept the reply of CLUSTER SLOTS, ROLE or SENTINEL, whose parts are looked at when they are used."""
    return reply is None or type(reply) is list


def are_values(count: int) -> Check:
    """Accept the reply of MGET with ``count`` keys."""

    def check(reply: Reply) -> bool:
        return type(reply) is list and len(reply) == count and set(map(type, reply)) <= _VALUES

    return check


def is_page(reply: Reply) -> bool:
    """Accept the reply of SCAN."""
    return (
        type(reply) is list
        and len(reply) == 2
        and type(reply[0]) is bytes
        and type(reply[1]) is list
        and all(type(key) is bytes for key in reply[1])
    )


def raised(replies: Iterable[Reply]) -> None:
    """Raise the first error among replies."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply


# --- which server ---------------------------------------------------------------------------------


class Topology(Protocol):
    """Knows which server holds which key. Shared by threads, and by both clients."""

    def get(self, keys: Sequence[bytes]) -> Plan[Sequence[Reply]]:
        """Ask for the values of the keys, in their order; errors are among them."""
        ...

    def unlink(self, keys: Sequence[bytes]) -> Plan[None]:
        """Remove the keys."""
        ...

    def each(self, keys: Sequence[bytes], commands: Sequence[Command], check: Check) -> Plan[Sequence[Reply]]:
        """Send one command per key, and return the replies in the order of the keys; errors are among them."""
        ...

    def masters(self) -> Plan[Sequence[Node]]:
        """Return every server that holds keys, as of now."""
        ...


def settled(keys: Sequence[str], replies: Sequence[Reply], answer: Any) -> None:
    """Raise what went wrong with some keys, if anything did, with the answer for the others.

    Raises:
        PartialAnswer: some keys failed.
        Exception: all of them did.
    """
    failed = [(key, reply) for key, reply in zip(keys, replies, strict=True) if isinstance(reply, Exception)]
    if not failed:
        return
    problem: Exception = failed[0][1]
    if len(failed) == len(keys):
        raise problem
    raise PartialAnswer(
        f"{len(failed)} of {len(keys)} keys failed", answer=answer, failed=[key for key, _ in failed]
    ) from problem


class OneServer:
    """One server holds all keys."""

    def __init__(self, address: Address) -> None:
        self._node = Node(address)

    def get(self, keys: Sequence[bytes]) -> Plan[Sequence[Reply]]:
        replies = yield from self._to_master([("MGET", *keys)], are_values(len(keys)))
        raised(replies)
        values: list[Reply] = replies[0]
        return values

    def unlink(self, keys: Sequence[bytes]) -> Plan[None]:
        raised((yield from self._to_master([("UNLINK", *keys)], is_number)))

    def each(self, keys: Sequence[bytes], commands: Sequence[Command], check: Check) -> Plan[Sequence[Reply]]:
        return (yield from self._to_master(commands, check))

    def masters(self) -> Plan[Sequence[Node]]:
        return [(yield from self._master())]

    def _master(self) -> Plan[Node]:
        return self._node
        yield  # a plan as the others are

    def _to_master(self, commands: Sequence[Command], check: Check) -> Plan[Sequence[Reply]]:
        node = yield from self._master()
        (replies,) = yield [Trip(node, commands, check)]
        return replies


class Candidates:
    """Servers any of which can be asked, in the order to try them: one that failed is asked last the next time."""

    def __init__(self, addresses: Iterable[Address]) -> None:
        self._lock = threading.Lock()
        self._addresses = list(addresses)

    def reset(self) -> None:
        """Start anew, as in a forked child."""
        self._lock = threading.Lock()

    def in_order(self) -> list[Address]:
        """Return them all."""
        with self._lock:
            return list(self._addresses)

    def failed(self, address: Address) -> None:
        """Take note of one that did not answer."""
        with self._lock:
            if address in self._addresses:
                self._addresses.remove(address)
                self._addresses.append(address)

    def learned(self, addresses: Iterable[Address]) -> None:
        """Add those that are not known yet."""
        with self._lock:
            self._addresses.extend(address for address in addresses if address not in self._addresses)


class BehindSentinels(OneServer):
    """One master holds all keys, and sentinels say which server that is."""

    def __init__(self, sentinels: Sequence[Address], service: str) -> None:
        self._sentinels = Candidates(sentinels)
        self._service = service
        self._known: Node | None = None

    def _to_master(self, commands: Sequence[Command], check: Check) -> Plan[Sequence[Reply]]:
        try:
            replies = yield from super()._to_master(commands, check)
        except BaseException:  # cancelled as well: that is how an async call runs out of time
            self._known = None  # gone, or the master no longer: the next call asks
            raise
        if any(isinstance(reply, ReadOnlyError) for reply in replies):
            self._known = None
        return replies

    def _master(self) -> Plan[Node]:
        if self._known is not None:
            return self._known
        problem: BaseException = ConnectionError("no sentinel was named")
        for address in self._sentinels.in_order():
            try:
                ((reply,),) = yield [
                    Trip(
                        Node(address, "sentinel"),
                        [("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)],
                        is_list,
                    )
                ]
                raised([reply])
            except BaseException as error:
                self._sentinels.failed(address)
                if not _another_may_answer(error):
                    raise
                problem = error
                continue
            if reply is None:
                problem = ConnectionError(f"the sentinel {address} watches no service of this name")
                continue
            host, port = reply
            self._known = Node(Address(host.decode(), int(port)), "master")
            return self._known
        raise problem


class Slots(NamedTuple):
    """Who serves which of a cluster's slots."""

    nodes: tuple[Node, ...]
    owners: tuple[int | None, ...]
    """For each slot, the place of its master in ``nodes``; None: nobody serves it."""


class Cluster:
    """Several masters, each with a share of the slots. Keys that have moved are followed."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._nodes = Candidates(addresses)
        self._known: Slots | None = None
        self._up: set[Node] = set()
        """Those that answered when they were asked last."""

    def get(self, keys: Sequence[bytes]) -> Plan[Sequence[Reply]]:
        replies = yield from self.each(keys, [("GET", key) for key in keys], is_value)
        # A key that somebody else made a list is nothing to us, as it is to MGET; SET replaces it.
        return [None if isinstance(reply, ResponseError) and _is_of_another_type(reply) else reply for reply in replies]

    def unlink(self, keys: Sequence[bytes]) -> Plan[None]:
        raised((yield from self.each(keys, [("UNLINK", key) for key in keys], is_number)))

    def each(self, keys: Sequence[bytes], commands: Sequence[Command], check: Check) -> Plan[Sequence[Reply]]:
        slots = yield from self._slots()
        replies: list[Reply] = [None] * len(keys)
        groups: dict[tuple[Node, bool], list[int]] = {}
        for place, key in enumerate(keys):
            groups.setdefault((_owner(slots, key_slot(key)), False), []).append(place)
        for _ in range(1 + REDIRECTS):
            groups = yield from self._round(groups, commands, check, replies)
            if not groups:
                break
        return replies  # what is still being redirected is an error among the replies

    def masters(self) -> Plan[Sequence[Node]]:
        self._known = None
        return (yield from self._slots()).nodes

    def _round(
        self,
        groups: dict[tuple[Node, bool], list[int]],
        commands: Sequence[Command],
        check: Check,
        replies: list[Reply],
    ) -> Plan[dict[tuple[Node, bool], list[int]]]:
        """Send each group, put the replies at their places, and return what is to be sent elsewhere."""
        trips = [_group_trip(node, asking, places, commands, check) for (node, asking), places in groups.items()]
        try:
            answers = yield trips
        except BaseException as error:  # cancelled as well: that is how an async call runs out of time
            self._known = None  # a node is gone, or slow: look where its slots are next time
            self._up.difference_update(node for node, _ in groups)
            problem = self._down(error)
            if problem is error:
                raise
            raise problem from error
        for (node, _), answer in zip(groups, answers, strict=True):
            if _has_failed(answer):
                self._known = None
                self._up.discard(node)
            else:
                self._up.add(node)
        again: dict[tuple[Node, bool], list[int]] = {}
        for (node, asking), answer in zip(groups, answers, strict=True):
            own = answer[1::2] if asking else answer
            if _has_failed(answer):
                own = [self._down(answer[0])] * len(own)
            for place, reply in zip(groups[node, asking], own, strict=True):
                replies[place] = reply
                if isinstance(reply, MovedError):
                    self._known = None
                    again.setdefault((_other(reply, node), False), []).append(place)
                elif isinstance(reply, AskError):  # its slot is on its way: this once, ask over there
                    again.setdefault((_other(reply, node), True), []).append(place)
                elif isinstance(reply, ClusterDownError):
                    self._known = None
        return again

    def _down(self, error: BaseException) -> BaseException:
        """Return an error of some nodes, as NodeDown where others are up and nobody has to wait for these."""
        if not self._up or isinstance(error, TimeoutError) or not isinstance(error, ConnectionError | OSError):
            return error
        problem = NodeDown(f"a node of the cluster fails ({type(error).__name__}); others are up")
        problem.__cause__ = error
        return problem

    def _slots(self) -> Plan[Slots]:
        if self._known is not None:
            return self._known
        problem: BaseException = ConnectionError("no node was named")
        for address in self._nodes.in_order():
            try:
                ((reply,),) = yield [Trip(Node(address), [("CLUSTER", "SLOTS")], is_list)]
                raised([reply])
                slots = _slots_of(reply, address)
            except BaseException as error:
                self._nodes.failed(address)
                if not _another_may_answer(error) or isinstance(error, ResponseError):
                    raise  # with a reply: this is no cluster, or not for this user
                problem = error
                continue
            self._nodes.learned(node.address for node in slots.nodes)
            self._up.intersection_update(slots.nodes)
            self._known = slots
            return slots
        raise problem


def _is_of_another_type(error: ResponseError) -> bool:
    return str(error).startswith("WRONGTYPE")


def _has_failed(answer: Sequence[Reply]) -> bool:
    # What a server says is a ResponseError, if it is an error.
    return isinstance(answer[0], Exception) and not isinstance(answer[0], ResponseError)


def _another_may_answer(error: BaseException) -> bool:
    # Where time has run out it has for the others, too; they are asked first by the next call.
    return isinstance(error, RedisError | OSError) and not isinstance(error, TimeoutError)


def _owner(slots: Slots, slot: int) -> Node:
    place = slots.owners[slot]
    if place is None:
        # Any node answers with the error that says so.
        return slots.nodes[0]
    return slots.nodes[place]


def _group_trip(node: Node, asking: bool, places: Sequence[int], commands: Sequence[Command], check: Check) -> Trip:
    if not asking:
        return Trip(node, [commands[place] for place in places], check)
    paired = [command for place in places for command in (("ASKING",), commands[place])]
    return Trip(node, paired, lambda reply: is_status(reply) or check(reply))


def _other(error: AskError, node: Node) -> Node:
    # An empty host is the one that was asked.
    return Node(Address(error.host or node.address.host, int(error.port)))


def _slots_of(reply: Reply, asked: Address) -> Slots:
    """Read what CLUSTER SLOTS says: rows of first slot, last slot, master, replicas.

    Raises:
        InvalidResponse: it says something else, or nothing.
    """
    nodes: dict[Node, int] = {}
    owners: list[int | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
    try:
        for first, last, (host, port, *_), *_ in reply:
            # No host, or "?": the node does not know how it is reached, but it was reached just now.
            name = asked.host if host in (None, b"", b"?") else host.decode()
            place = nodes.setdefault(Node(Address(name, int(port))), len(nodes))
            owners[first : last + 1] = [place] * (last + 1 - first)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidResponse("the reply to CLUSTER SLOTS cannot be read") from error
    if not nodes or len(owners) != REDIS_CLUSTER_HASH_SLOTS:
        raise InvalidResponse("no node of the cluster serves a slot")
    return Slots(tuple(nodes), tuple(owners))


def topology_of(place: Place) -> Topology:
    """Return how the servers of a place share the keys."""
    if place.kind == "cluster":
        return Cluster(place.addresses)
    if place.kind == "sentinel":
        return BehindSentinels(place.addresses, place.service)
    return OneServer(place.addresses[0])


ROLE: Command = ("ROLE",)


def is_master(reply: Reply) -> bool:
    """Tell from the reply of ROLE whether a server is a master; one that may not be asked is taken for it."""
    return isinstance(reply, NoPermissionError) or (type(reply) is list and reply[:1] == [b"master"])
