"""Bounds the bytes of answers that one worker keeps in memory until the clients have read them.

An answer of one hit of up to ``PART_BYTES`` does not count, because each connection has at most one answer at a time.
A short request can have a large answer: 2,048 inputs of one letter, with 3,072 dimensions each, make more than 25 MB.
"""

from __future__ import annotations

import asyncio
from collections import deque

from .api_errors import ApiError

MAX_ANSWERS = 512 * 1024 * 1024
"""Bytes of answers that one worker keeps in memory at the same time."""

WAIT_SECONDS = 5.0
"""Time for which an answer waits until clients have read others."""

PART_BYTES = 64 * 1024
"""Minimum size of each part of an answer but the last. A part is sent when the client has read most of those before."""


class AnswerMemory:
    """The bytes of the answers of one worker. Answers that do not fit wait in the order in which they came."""

    def __init__(self) -> None:
        self.bytes = 0
        """Bytes that are taken."""
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def try_take(self, size: int) -> bool:
        """Take bytes for an answer if there are enough and no other answer waits for them. Return whether they are."""
        if self.bytes + size > MAX_ANSWERS or self._waiting:
            return False
        self.bytes += size
        return True

    async def take(self, size: int) -> None:
        """Take bytes for an answer, and wait for them if there are too few.

        Raises:
            ApiError: the answer is larger than all bytes, or they are still in use after some seconds.
        """
        if self.try_take(size):
            return
        if size > MAX_ANSWERS:
            message = (
                f"the answer would have about {size:,} bytes, and the most are {MAX_ANSWERS:,}; send fewer inputs in "
                'one request, or encoding_format = "base64"'
            )
            raise ApiError(400, message, param="input", code="answer_too_large")
        place = (size, asyncio.get_running_loop().create_future())
        self._waiting.append(place)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await place[1]
        except BaseException as error:
            if place in self._waiting:
                self._waiting.remove(place)
                self._admit()
            else:
                self.give(size)
            if not isinstance(error, TimeoutError):
                raise
            message = "the server has too many large answers that clients have not read; try again"
            raise ApiError(503, message, kind="server_error", code="overloaded", retry_after=1) from None

    def give(self, size: int) -> None:
        """Return bytes of an answer. If it needs more than it has taken, ``size`` is negative."""
        self.bytes -= size
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self.bytes + self._waiting[0][0] <= MAX_ANSWERS:
            size, admitted = self._waiting.popleft()
            self.bytes += size
            if not admitted.done():
                admitted.set_result(None)
