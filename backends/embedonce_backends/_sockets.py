"""Waiting for a socket until the deadline of the call, with one system call."""

from __future__ import annotations

import select

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
        return bool(self._select(0.0, write=False))

    def wait(self, *, write: bool = False) -> None:
        """Wait until the socket is readable, or with ``write`` until it is readable or writable.

        Raises:
            TierTimeout: the deadline has passed.
        """
        while not self._select(time_left(), write=write):
            pass

    def _select(self, seconds: float | None, *, write: bool) -> bool:
        if self._poll is None:
            descriptors = [self._descriptor]
            return any(select.select(descriptors, descriptors if write else [], [], seconds))
        milliseconds = None if seconds is None else seconds * 1000  # poll rounds it up
        if not write:
            return bool(self._poll.poll(milliseconds))
        self._poll.modify(self._descriptor, select.POLLIN | select.POLLOUT)
        try:
            return bool(self._poll.poll(milliseconds))
        finally:
            self._poll.modify(self._descriptor, select.POLLIN)
