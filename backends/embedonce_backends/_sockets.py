"""Sending and receiving on a socket until the deadline of the call."""

from __future__ import annotations

import select
import socket

from embedonce.contracts import time_left


class SocketWaiter:
    """Waits until a socket that does not block is ready.

    A socket with a timeout would cost more: Python sets the mode of the socket for each new timeout, and waits before
    each send, even if the data can be sent at once. Each of these system calls also lets other threads run first.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._poll = None
        if hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(descriptor, select.POLLIN)

    def is_readable(self) -> bool:
        """Return whether the socket is readable now. A socket that the other side has closed is readable."""
        if self._poll is not None:
            return bool(self._poll.poll(0))
        return bool(select.select([self._descriptor], [], [], 0)[0])

    def wait_until_readable(self) -> None:
        """Wait until the socket is readable.

        Raises:
            TierTimeout: the deadline has passed.
        """
        while True:
            left = time_left()
            if self._poll is None:
                ready = select.select([self._descriptor], [], [], left)[0]
            else:
                ready = self._poll.poll(None if left is None else left * 1000)  # poll rounds milliseconds up
            if ready:
                return

    def wait_until_writable(self) -> None:
        """Wait until the socket is writable. This raises the same error as :meth:`wait_until_readable`."""
        while True:
            left = time_left()
            if self._poll is None:
                ready = select.select([], [self._descriptor], [], left)[1]
            else:
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                ready = poll.poll(None if left is None else left * 1000)
            if ready:
                return


def send_all(connected: socket.socket, waiter: SocketWaiter, data: bytes) -> None:
    """Send all of the data through a socket that does not block.

    Raises:
        TierTimeout: the deadline has passed. Some of the data may have been sent.
        OSError: the connection is lost.
    """
    rest = memoryview(data)
    while True:
        try:
            rest = rest[connected.send(rest) :]
        except BlockingIOError:
            pass
        if not rest:
            return
        waiter.wait_until_writable()
