"""Reads pickles of lists of floats without unpickling them.

``pickle.loads`` can run any code that a file names, so it must not see data of another program. But the pickle of a
list of floats needs few opcodes only, and none of them can call anything. This parser knows these opcodes, in the order
in which Python writes them with the protocols 2 to 5, and refuses everything else.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_PROTO, _FRAME, _STOP = 0x80, 0x95, ord(".")
_EMPTY_LIST, _MEMOIZE, _BINPUT = ord("]"), 0x94, ord("q")
_MARK, _APPEND, _APPENDS = ord("("), ord("a"), ord("e")
_BINFLOAT = ord("G")

_INTEGERS = {ord("K"): (1, False), ord("M"): (2, False), ord("J"): (4, True)}
"""Opcodes of integers: BININT1, BININT2 and BININT, with the size in bytes and whether there is a sign."""

_FLOAT = np.dtype([("opcode", "u1"), ("number", ">f8")])
"""BINFLOAT and its number, without padding: 9 bytes."""


def parse_pickled_list(data: bytes) -> NDArray[np.float64]:
    """Return the numbers in the pickle of a list of floats and small integers, of shape (d,).

    Raises:
        ValueError: the data is not such a pickle, or the list is empty. The message is a reason to be counted.
    """
    return _Parser(data).parse()


class _Parser:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.parts: list[NDArray[np.float64]] = []

    def parse(self) -> NDArray[np.float64]:
        try:
            self._parse_list()
        except IndexError:  # `self.data[...]` after the end
            raise ValueError("truncated pickle") from None
        if not self.parts:
            raise ValueError("empty list")
        return np.concatenate(self.parts) if len(self.parts) > 1 else self.parts[0]

    def _parse_list(self) -> None:
        if self._next() != _PROTO or self._next() not in (2, 3, 4, 5):
            raise ValueError("not a pickle of protocol 2 to 5")
        self._skip_frame()
        if self._next() != _EMPTY_LIST:
            raise ValueError("not a pickled list of floats")
        self._skip_frame()
        # The list is put into the memo, where nothing in the list refers to it. Optimised pickles leave this out.
        if self._peek() == _MEMOIZE:
            self.position += 1
        elif self._peek() == _BINPUT:
            self.position += 2
        while True:
            self._skip_frame()
            opcode = self._peek()
            if opcode == _STOP:
                break
            if opcode == _MARK:
                self.position += 1
                self._parse_numbers()
                end = _APPENDS
            else:
                self._parse_number()
                end = _APPEND
            self._skip_frame()
            if self._next() != end:
                raise ValueError("not a pickled list of floats")
        if self.position + 1 != len(self.data):
            raise ValueError("bytes after the end of the pickle")

    def _parse_numbers(self) -> None:
        self._parse_number()
        while self._peek() != _APPENDS:
            self._parse_number()

    def _parse_number(self) -> None:
        """Add the number here, and also the floats that follow a float without anything in between."""
        self._skip_frame()
        opcode = self._peek()
        if opcode == _BINFLOAT:
            count = (len(self.data) - self.position) // _FLOAT.itemsize
            # Python ends a part of a list after 1,000 items, so more would be of no use.
            run = np.frombuffer(self.data, _FLOAT, min(count, 1000), self.position)
            others = np.flatnonzero(run["opcode"] != _BINFLOAT)
            length = int(others[0]) if others.size else run.size
            if length == 0:
                raise IndexError
            self.parts.append(run["number"][:length].astype(np.float64))
            self.position += length * _FLOAT.itemsize
        elif opcode in _INTEGERS:
            size, is_signed = _INTEGERS[opcode]
            content = self.data[self.position + 1 : self.position + 1 + size]
            if len(content) < size:
                raise IndexError
            self.parts.append(np.array([int.from_bytes(content, "little", signed=is_signed)], np.float64))
            self.position += 1 + size
        else:
            raise ValueError("not a pickled list of floats")

    def _skip_frame(self) -> None:
        if self._peek() == _FRAME:
            size = int.from_bytes(self.data[self.position + 1 : self.position + 9], "little")
            self.position += 9
            if self.position + size > len(self.data):
                raise IndexError

    def _peek(self) -> int:
        return self.data[self.position]

    def _next(self) -> int:
        opcode = self.data[self.position]
        self.position += 1
        return opcode
