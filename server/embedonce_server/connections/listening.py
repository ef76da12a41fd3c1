"""The sockets that the server listens on, and whether other machines can reach them."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

BACKLOG = 2048
"""Connections that wait until a worker accepts them."""

MAX_TRIES = 20
"""Attempts to find a port that is free on all addresses."""


class CannotListen(Exception):
    """The server cannot listen where it should. The message says what to do."""


@dataclass(frozen=True, slots=True)
class Address:
    """One address of a host."""

    family: socket.AddressFamily
    sockaddr: tuple[object, ...]

    @property
    def ip(self) -> str:
        return str(self.sockaddr[0])

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect to the address."""
        address = ipaddress.ip_address(self.ip.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        return bool((mapped or address).is_loopback)


def resolve_host(host: str) -> list[Address]:
    """Return the addresses of a host, IPv4 first.

    Raises:
        CannotListen: the host has no address.
    """
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CannotListen(f"the host {host!r} has no address: {reason}; use an address of this machine") from None
    addresses = [_unwrap_mapped(Address(family, tuple(sockaddr))) for family, _, _, _, sockaddr in found]
    unique = {(address.family, address.ip): address for address in addresses}
    return sorted(unique.values(), key=lambda address: address.family != socket.AF_INET)


def _unwrap_mapped(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address such as ``::ffff:127.0.0.1`` stands for."""
    mapped = getattr(ipaddress.ip_address(address.ip.partition("%")[0]), "ipv4_mapped", None)
    return address if mapped is None else Address(socket.AF_INET, (str(mapped), 0))


def list_open_addresses(addresses: Sequence[Address]) -> list[str]:
    """Return the addresses that other machines may be able to connect to."""
    return [address.ip for address in addresses if not address.is_loopback]


def bind_addresses(addresses: Sequence[Address], port: int) -> list[socket.socket]:
    """Return listening sockets, one per address, all with the same port. Port 0 stands for any port that is free.

    An address that this machine does not have is left out, if the machine has another of the addresses.

    Raises:
        CannotListen: an address cannot be used, or the port is in use.
    """
    for _ in range(MAX_TRIES):
        try:
            return _bind_all(addresses, port)
        except _PortTaken as error:
            if port:
                raise CannotListen(
                    f"port {port} of {error.ip} is in use by another program; stop that program, or choose another "
                    "port with --port (0: any free port)"
                ) from None
    raise CannotListen("no port is free on all addresses of the host; choose one with --port")


class _PortTaken(Exception):
    def __init__(self, ip: str) -> None:
        super().__init__(ip)
        self.ip = ip


def _bind_all(addresses: Sequence[Address], port: int) -> list[socket.socket]:
    bound: list[socket.socket] = []
    missing: list[str] = []
    try:
        for address in addresses:
            try:
                bound.append(_bind(address, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise _PortTaken(address.ip) from None
                reason = f"{address.ip}: {error.strerror}"
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    hint = "; choose a port from 1024 on with --port" if error.errno == errno.EACCES else ""
                    raise CannotListen(f"cannot listen on port {port} of {reason}{hint}") from None
                missing.append(reason)
            else:
                port = bound[-1].getsockname()[1]
        if not bound:
            raise CannotListen(f"this machine does not have the address ({'; '.join(missing)}); choose another --host")
    except BaseException:
        for listener in bound:
            listener.close()
        raise
    return bound


def _bind(address: Address, port: int) -> socket.socket:
    listener = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere the option lets two programs listen on the same port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((address.sockaddr[0], port, *address.sockaddr[2:]))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def format_url(listener: socket.socket) -> str:
    """Return the URL of a listening socket, such as ``http://127.0.0.1:8080``."""
    ip, port = listener.getsockname()[:2]
    return f"http://[{ip}]:{port}" if ":" in ip else f"http://{ip}:{port}"
