"""Plans for calls to Redis: the commands of a call, and the server that gets each command.

A plan is a generator that does no I/O itself. The blocking client and the async client carry out plans. A plan yields
lists of trips. A list has one :class:`Trip` per server, and the client can make these trips at the same time. The
client sends the replies of each trip back to the plan, in the same order. If every trip fails, the client throws the
error of the first trip into the plan. If only some trips fail, the error of a failed trip takes the place of each of
its replies. In the end, the plan returns the call's result.
"""

from __future__ import annotations

import re
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

from .errors import explain_cluster_reply, explain_one_server_reply, explain_sentinel_reply
from .url import Address, Place

T = TypeVar("T")

REDIRECTS = 4
"""Maximum number of redirects that one call follows when keys have moved to another node of a cluster."""

Role: TypeAlias = Literal["data", "master", "sentinel"]
Command: TypeAlias = tuple[Any, ...]
Reply: TypeAlias = Any
Check: TypeAlias = Callable[[Reply], bool]


class Node(NamedTuple):
    """A server and its role.

    A new connection to a ``"master"`` asks the server whether it is a master. A ``"data"`` server is not asked.
    """

    address: Address
    role: Role = "data"


class Trip(NamedTuple):
    """Commands to one node, all sent before the first reply is read."""

    node: Node
    commands: Sequence[Command]
    check: Check
    """Function that returns whether a reply has the expected type. It is not called for error replies."""

    def pack(self) -> bytes:
        """Return the commands in Redis' wire format."""
        return b"".join(map(hiredis.pack_command, self.commands))


Plan: TypeAlias = Generator[Sequence[Trip], Sequence[Sequence[Reply]], T]


# --- checks of replies --------------------------------------------------------------------------

_VALUES = {bytes, type(None)}


def is_value(reply: Reply) -> bool:
    """Return whether ``reply`` is a valid reply to GET."""
    return type(reply) in _VALUES


def is_status(reply: Reply) -> bool:
    """Return whether ``reply`` is a valid reply to SET or ASKING: OK, or None if SET NX found the key."""
    return reply is None or reply == b"OK"


def is_number(reply: Reply) -> bool:
    """Return whether ``reply`` is a valid reply to UNLINK."""
    return type(reply) is int


def is_text(reply: Reply) -> bool:
    """Return whether ``reply`` may be a reply to CLUSTER NODES."""
    return type(reply) is bytes


def is_list(reply: Reply) -> bool:
    """Return whether ``reply`` may be a reply to CLUSTER SLOTS or SENTINEL.

    The parts of the reply are checked where they are used.
    """
    return reply is None or type(reply) is list


def make_values_check(count: int) -> Check:
    """Return a function that checks whether its argument is a valid reply to MGET with ``count`` keys."""

    def check(reply: Reply) -> bool:
        return type(reply) is list and len(reply) == count and set(map(type, reply)) <= _VALUES

    return check


def is_page(reply: Reply) -> bool:
    """Return whether ``reply`` is a valid reply to SCAN."""
    return (
        type(reply) is list
        and len(reply) == 2
        and type(reply[0]) is bytes
        and type(reply[1]) is list
        and all(type(key) is bytes for key in reply[1])
    )


def raise_first_error(replies: Iterable[Reply]) -> None:
    """Raise the first error among replies."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply


# --- which server ---------------------------------------------------------------------------------


class Topology(Protocol):
    """Knows which server holds which key. All threads and both clients of a backend share one instance."""

    def get(self, keys: Sequence[bytes]) -> Plan[Sequence[Reply]]:
        """Return the value of each key, in the order of the keys; a value can be an error."""
        ...

    def unlink(self, keys: Sequence[bytes]) -> Plan[None]:
        """Remove the keys."""
        ...

    def send_each(self, keys: Sequence[bytes], commands: Sequence[Command], check: Check) -> Plan[Sequence[Reply]]:
        """Send one command per key and return the replies in the order of the keys; a reply can be an error."""
        ...

    def fetch_slots(self) -> Plan[Slots]:
        """Find out which nodes serve which slots now, and return the result."""
        ...

    def has_moving_slots(self, slots: Slots) -> Plan[bool]:
        """Return whether a slot is moving from one of these nodes to another. False if the user may not ask."""
        ...


def raise_failures(keys: Sequence[str], replies: Sequence[Reply], answer: Any) -> None:
    """Raise an exception if the reply of any key is an error.

    Raises:
        PartialAnswer: some keys failed; it contains ``answer``, the result for the other keys.
        Exception: every key failed; the exception is the first error.
    """
    failed = [(key, reply) for key, reply in zip(keys, replies, strict=True) if isinstance(reply, Exception)]
    if not failed:
        return
    problem: Exception = failed[0][1]
    if len(failed) == len(keys):
        raise problem
    raise PartialAnswer(
        f"{len(failed)} of {len(keys)} keys failed ({type(problem).__name__})",
        answer=answer,
        failed=[key for key, _ in failed],
    ) from problem


class OneServer:
    """One server holds all keys."""

    def __init__(self, address: Address) -> None:
        self._node = Node(address)

    def get(self, keys: Sequence[bytes]) -> Plan[Sequence[Reply]]:
        replies = yield from self._send_to_master([("MGET", *keys)], make_values_check(len(keys)))
        raise_first_error(replies)
        values: list[Reply] = replies[0]
        return values

    def unlink(self, keys: Sequence[bytes]) -> Plan[None]:
        raise_first_error((yield from self._send_to_master([("UNLINK", *keys)], is_number)))

    def send_each(self, keys: Sequence[bytes], commands: Sequence[Command], check: Check) -> Plan[Sequence[Reply]]:
        return (yield from self._send_to_master(commands, check))

    def fetch_slots(self) -> Plan[Slots]:
        return Slots(((yield from self._find_master()),), ())

    def has_moving_slots(self, slots: Slots) -> Plan[bool]:
        return False
        yield  # makes this function a generator, which a plan has to be

    def _find_master(self) -> Plan[Node]:
        return self._node
        yield  # makes this function a generator, which a plan has to be

    def _send_to_master(self, commands: Sequence[Command], check: Check) -> Plan[Sequence[Reply]]:
        node = yield from self._find_master()
        try:
            (replies,) = yield [Trip(node, commands, check)]
        except ResponseError as error:  # a reply to the login
            explain_one_server_reply(error)
            raise
        # This is not the server that the URL promises. Other keys of the same call may have succeeded by chance.
        for reply in replies:
            if explain_one_server_reply(reply):
                raise reply
        return replies


_MOVING_SLOT = re.compile(rb"\[\d+-[<>]-")
"""A slot in the reply to CLUSTER NODES that the node is giving to another node, or taking from one."""


class Candidates:
    """Servers that can all answer the same question, in the order in which to try them.

    A server that fails goes to the end.
    """

    def __init__(self, addresses: Iterable[Address]) -> None:
        # Every change replaces the tuple. There is no lock, because a forked child could inherit it while another
        # thread of the parent holds it. If two threads make changes at the same time, one change may be lost. The
        # next failure or the next list of nodes then makes this change again.
        self._addresses = tuple(dict.fromkeys(addresses))

    def list_in_order(self) -> tuple[Address, ...]:
        """Return the addresses in the order in which to try them."""
        return self._addresses

    def move_to_end(self, address: Address) -> None:
        """Try this server last from now on, because it failed."""
        others = tuple(other for other in self._addresses if other != address)
        self._addresses = (*others, address)

    def add_missing(self, addresses: Iterable[Address]) -> None:
        """Add the addresses that are not in the list yet."""
        self._addresses = tuple(dict.fromkeys((*self._addresses, *addresses)))


class SentinelMaster(OneServer):
    """One master holds all keys, and sentinels say which server is the master."""

    def __init__(self, sentinels: Sequence[Address], service: str) -> None:
        self._sentinels = Candidates(sentinels)
        self._service = service
        self._known_master: Node | None = None

    def _send_to_master(self, commands: Sequence[Command], check: Check) -> Plan[Sequence[Reply]]:
        try:
            replies = yield from super()._send_to_master(commands, check)
        except BaseException:  # includes cancellation, which is how an async call times out
            self._known_master = None  # the master may be down or demoted, so the next call asks the sentinels
            raise
        if any(isinstance(reply, ReadOnlyError) for reply in replies):
            self._known_master = None
        return replies

    def _find_master(self) -> Plan[Node]:
        if self._known_master is not None:
            return self._known_master
        problem: BaseException = ConnectionError("the url names no sentinel")
        for address in self._sentinels.list_in_order():
            try:
                ((reply,),) = yield [
                    Trip(
                        Node(address, "sentinel"),
                        [("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)],
                        is_list,
                    )
                ]
                raise_first_error([reply])
            except BaseException as error:
                explain_sentinel_reply(error)
                self._sentinels.move_to_end(address)
                if not _can_try_next(error):
                    raise
                problem = error
                continue
            if reply is None:
                problem = ConnectionError(
                    f"sentinel {address} knows no service {self._service!r}; correct the service in url"
                )
                continue
            host, port = reply
            self._known_master = Node(Address(host.decode(), int(port)), "master")
            return self._known_master
        raise problem


class Slots(NamedTuple):
    """Which node serves each of a cluster's slots."""

    nodes: tuple[Node, ...]
    owners: tuple[int | None, ...]
    """For each slot, the index of its master in ``nodes``, or None if no node serves the slot. The tuple is empty if
    there is no cluster."""

    def has_same_owners(self, other: Slots) -> bool:
        """Return whether every slot has the same master here and in ``other``. The order of the nodes is ignored."""
        return set(self.nodes) == set(other.nodes) and self._list_owners() == other._list_owners()

    def _list_owners(self) -> list[Node | None]:
        return [None if place is None else self.nodes[place] for place in self.owners]


class Cluster:
    """Several masters, each with a share of the slots. Calls follow keys that have moved to another node."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._nodes = Candidates(addresses)
        self._known_slots: Slots | None = None
        self._up_nodes: set[Node] = set()
        """Nodes that answered their last request."""

    def get(self, keys: Sequence[bytes]) -> Plan[Sequence[Reply]]:
        replies = yield from self.send_each(keys, [("GET", key) for key in keys], is_value)
        # A value of a different type, such as a list, counts as missing, as it does in MGET. SET replaces the value.
        return [None if isinstance(reply, ResponseError) and _is_wrong_type(reply) else reply for reply in replies]

    def unlink(self, keys: Sequence[bytes]) -> Plan[None]:
        raise_first_error((yield from self.send_each(keys, [("UNLINK", key) for key in keys], is_number)))

    def send_each(self, keys: Sequence[bytes], commands: Sequence[Command], check: Check) -> Plan[Sequence[Reply]]:
        slots = yield from self._get_slots()
        replies: list[Reply] = [None] * len(keys)
        groups: dict[tuple[Node, bool], list[int]] = {}
        for place, key in enumerate(keys):
            groups.setdefault((_find_owner(slots, key_slot(key)), False), []).append(place)
        for _ in range(1 + REDIRECTS):
            groups = yield from self._send_groups(groups, commands, check, replies)
            if not groups:
                break
        return replies  # if a key still needs a redirect now, its reply is the redirect error

    def fetch_slots(self) -> Plan[Slots]:
        self._known_slots = None
        return (yield from self._get_slots())

    def has_moving_slots(self, slots: Slots) -> Plan[bool]:
        replies = yield [Trip(node, [("CLUSTER", "NODES")], is_text) for node in slots.nodes]
        for (reply,) in replies:
            if isinstance(reply, Exception) and not isinstance(reply, NoPermissionError):
                raise reply
        return any(type(reply) is bytes and _MOVING_SLOT.search(reply) is not None for (reply,) in replies)

    def _send_groups(
        self,
        groups: dict[tuple[Node, bool], list[int]],
        commands: Sequence[Command],
        check: Check,
        replies: list[Reply],
    ) -> Plan[dict[tuple[Node, bool], list[int]]]:
        """Send the commands of each group, put their replies into ``replies``, and return the groups to redirect.

        A group has the commands that go to one node in the same way. In ``groups`` and in the result, a group is stored
        under a pair: the node, and whether ASKING has to precede each command. The group itself is a list of indices
        into ``commands`` and ``replies``.
        """
        trips = [_make_trip(node, asking, places, commands, check) for (node, asking), places in groups.items()]
        try:
            answers = yield trips
        except BaseException as error:  # includes cancellation, which is how an async call times out
            self._known_slots = None  # a node is down or slow, so the next call fetches the slots again
            self._up_nodes.difference_update(node for node, _ in groups)
            problem = self._translate_node_error(error)
            if problem is error:
                raise
            raise problem from error
        for (node, _), answer in zip(groups, answers, strict=True):
            if _has_failed(answer):
                self._known_slots = None
                self._up_nodes.discard(node)
            else:
                self._up_nodes.add(node)
        redirected: dict[tuple[Node, bool], list[int]] = {}
        for (node, asking), answer in zip(groups, answers, strict=True):
            own = answer[1::2] if asking else answer
            if _has_failed(answer):
                own = [self._translate_node_error(answer[0])] * len(own)
            for place, reply in zip(groups[node, asking], own, strict=True):
                replies[place] = reply
                if isinstance(reply, MovedError):
                    self._known_slots = None
                    redirected.setdefault((_find_redirect_node(reply, node), False), []).append(place)
                elif isinstance(reply, AskError):  # the slot is still moving, so only this request is redirected
                    redirected.setdefault((_find_redirect_node(reply, node), True), []).append(place)
                elif isinstance(reply, ClusterDownError):
                    self._known_slots = None
        return redirected

    def _translate_node_error(self, error: BaseException) -> BaseException:
        """Return NodeDown for a connection error while other nodes are up; return any other error unchanged.

        A timeout is returned unchanged, so that the tier's breaker counts it. If it were returned as NodeDown, which
        the breaker does not count, every call would wait for the node that hangs.
        """
        if not self._up_nodes or isinstance(error, TimeoutError) or not isinstance(error, ConnectionError | OSError):
            return error
        problem = NodeDown(f"a node of the cluster is failing ({type(error).__name__}); other nodes are up")
        problem.__cause__ = error
        return problem

    def _get_slots(self) -> Plan[Slots]:
        if self._known_slots is not None:
            return self._known_slots
        problem: BaseException = ConnectionError("the url names no node")
        for address in self._nodes.list_in_order():
            try:
                ((reply,),) = yield [Trip(Node(address), [("CLUSTER", "SLOTS")], is_list)]
                raise_first_error([reply])
                slots = _parse_slots(reply, address)
            except BaseException as error:
                explain_cluster_reply(error)
                self._nodes.move_to_end(address)
                if not _can_try_next(error) or isinstance(error, ResponseError):
                    raise  # this is not a cluster, or the user is not allowed to run CLUSTER SLOTS
                problem = error
                continue
            self._nodes.add_missing(node.address for node in slots.nodes)
            self._up_nodes.intersection_update(slots.nodes)
            self._known_slots = slots
            return slots
        raise problem


def _is_wrong_type(error: ResponseError) -> bool:
    return type(error).__name__ == "WRONGTYPE"


def _has_failed(answer: Sequence[Reply]) -> bool:
    # An error that the server replied with is a ResponseError. Any other error means that the trip failed.
    return isinstance(answer[0], Exception) and not isinstance(answer[0], ResponseError)


def _can_try_next(error: BaseException) -> bool:
    # After a timeout, this call has no time left for another server. The failed server has moved to the end of the
    # list, so the next call starts with another server.
    return isinstance(error, RedisError | OSError) and not isinstance(error, TimeoutError)


def _find_owner(slots: Slots, slot: int) -> Node:
    place = slots.owners[slot]
    if place is None:
        # No node serves the slot. Ask any node; it replies with an error that says that the slot is not served.
        return slots.nodes[0]
    return slots.nodes[place]


def _make_trip(node: Node, asking: bool, places: Sequence[int], commands: Sequence[Command], check: Check) -> Trip:
    if not asking:
        return Trip(node, [commands[place] for place in places], check)
    paired = [command for place in places for command in (("ASKING",), commands[place])]
    return Trip(node, paired, lambda reply: is_status(reply) or check(reply))


def _find_redirect_node(error: AskError, node: Node) -> Node:
    # An empty host means the host of the node that replied.
    return Node(Address(error.host or node.address.host, int(error.port)))


def _parse_slots(reply: Reply, asked: Address) -> Slots:
    """Parse the reply to CLUSTER SLOTS, whose rows are: first slot, last slot, master, replicas.

    Raises:
        InvalidResponse: the reply does not have this form, or it lists no node or invalid slots.
    """
    nodes: dict[Node, int] = {}
    owners: list[int | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
    try:
        for first, last, (host, port, *_), *_ in reply:
            # No host, or "?", means that the node does not know its own host. Use the host that was asked.
            name = asked.host if host in (None, b"", b"?") else host.decode()
            place = nodes.setdefault(Node(Address(name, int(port))), len(nodes))
            owners[first : last + 1] = [place] * (last + 1 - first)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidResponse("cannot parse the reply to CLUSTER SLOTS") from error
    if not nodes or len(owners) != REDIS_CLUSTER_HASH_SLOTS:
        raise InvalidResponse("the reply to CLUSTER SLOTS lists no node, or invalid slots")
    return Slots(tuple(nodes), tuple(owners))


def make_topology(place: Place) -> Topology:
    """Return the topology for the servers of a URL."""
    if place.kind == "cluster":
        return Cluster(place.addresses)
    if place.kind == "sentinel":
        return SentinelMaster(place.addresses, place.service)
    return OneServer(place.addresses[0])


ROLE: Command = ("ROLE",)


def is_master(reply: Reply) -> bool:
    """Return whether the reply to ROLE comes from a master.

    If the Redis user is not allowed to run ROLE, the server is assumed to be a master.
    """
    return isinstance(reply, NoPermissionError) or (type(reply) is list and reply[:1] == [b"master"])
