"""Whether the terminal in which the server was started is still there."""

from __future__ import annotations

import os


class Terminal:
    """The terminal of this process, if it has one.

    SIGHUP means two things: somebody asks for a reload, or the terminal was closed.
    """

    def __init__(self) -> None:
        self._descriptors = [descriptor for descriptor in (0, 1, 2) if os.isatty(descriptor)]

    @property
    def is_closed(self) -> bool:
        """Whether the process had a terminal that is closed now."""
        return bool(self._descriptors) and not any(map(os.isatty, self._descriptors))
