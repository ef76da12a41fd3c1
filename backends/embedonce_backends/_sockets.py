"""Sending and receiving on a socket until the deadline of the call."""

from __future__ import annotations

import select
import selectors
import socket
from contextlib import suppress

from embedonce.contracts import time_left


class SocketWaiter:
    """Waits until a socket that does not block is ready.

    A socket with a timeout would cost more: Python sets the mode of the socket for each new timeout, and waits before
    each send, even if the data can be sent at once. Each of these system calls also lets other threads run first.
    """

    def __init__(self, descriptor: int, longest_seconds: float | None = None) -> None:
        """Make a waiter for a socket. ``longest_seconds`` limits each wait of a call without a deadline."""
        self._descriptor = descriptor
        self._longest_seconds = longest_seconds
        self._poll = None
        if hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(descriptor, select.POLLIN)

    def is_readable(self) -> bool:
        """Return whether the socket is readable now. A socket that the other side has closed is readable."""
        return self._select(0)

    def wait_until_readable(self) -> None:
        """Wait until the socket is readable.

        Raises:
            TimeoutError: the time is over; a TierTimeout if the call has a deadline.
        """
        while not self._select(self._get_seconds()):
            self._check_time()

    def wait_until_writable(self) -> None:
        """Wait until the socket is writable. This raises the same errors as :meth:`wait_until_readable`."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._descriptor, selectors.EVENT_WRITE)
            while not selector.select(self._get_seconds()):
                self._check_time()

    def _select(self, seconds: float | None) -> bool:
        if self._poll is None:
            return bool(select.select([self._descriptor], [], [], seconds)[0])
        return bool(self._poll.poll(None if seconds is None else seconds * 1000))  # poll rounds milliseconds up

    def _get_seconds(self) -> float | None:
        left = time_left()
        return self._longest_seconds if left is None else left

    def _check_time(self) -> None:
        if time_left() is None and self._longest_seconds is not None:
            raise TimeoutError(f"the socket was not ready within {self._longest_seconds:g} s")


def send_all(connected: socket.socket, waiter: SocketWaiter, data: bytes) -> None:
    """Send all of the data through a socket that does not block.

    Raises:
        TimeoutError: the time is over. Some of the data may have been sent.
        OSError: the connection is lost.
    """
    rest = memoryview(data)
    while True:
        with suppress(BlockingIOError):
            rest = rest[connected.send(rest) :]
        if not rest:
            return
        waiter.wait_until_writable()
