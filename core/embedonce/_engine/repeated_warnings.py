"""Warnings that would repeat in every call: each kind is logged at most once a minute, with a count."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

log = logging.getLogger("embedonce")

LOG_INTERVAL = 60.0
"""Minimum number of seconds between two log lines of one kind."""

MAX_KINDS = 1000
"""Maximum number of kinds that are remembered. The kind that was seen least recently is forgotten."""


@dataclass(slots=True)
class _Kind:
    next_line: float
    """Monotonic time of the next log line."""
    count: int = 0
    """Number that was not logged yet, such as the number of corrupt entries."""
    lines: int = 0
    """Number of lines that were left out."""


class RepeatedWarnings:
    """Logs warnings of one part, such as a tier. Several threads may use it at the same time."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[str, _Kind] = OrderedDict()
        self.renew_lock()

    def renew_lock(self) -> None:
        """Create a new lock. A forked child calls this too."""
        self._lock = threading.RLock()  # re-entrant, because a signal handler may use the cache

    def warn(self, kind: str, message: str, *args: object, count: int = 0) -> bool:
        """Log a warning, unless one of this kind was logged less than :data:`LOG_INTERVAL` ago. Return whether it was.

        ``message`` has a ``%`` place for each of ``args``. With ``count``, it also has a named place ``{count}``, for
        the sum of all counts of this kind since its last line.
        """
        with self._lock:
            now = time.monotonic()
            known = self._kinds.setdefault(kind, _Kind(now))
            self._kinds.move_to_end(kind)
            if len(self._kinds) > MAX_KINDS:
                self._kinds.popitem(last=False)
            known.count += count
            if now < known.next_line:
                known.lines += 1
                return False
            total, left_out = known.count, known.lines
            known.next_line, known.count, known.lines = now + LOG_INTERVAL, 0, 0
        more = f" ({left_out:,} earlier warnings like this were not logged)" if left_out else ""
        log.warning(message.replace("{count}", f"{total:,}") + more, *args)
        return True
