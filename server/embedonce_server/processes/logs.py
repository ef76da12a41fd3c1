"""Messages of the server: one line each on standard error."""

from __future__ import annotations

import logging
import sys


def set_up_logging(*, worker: int | None = None) -> None:
    """Send the messages of this process to standard error. ``worker`` is the number of a worker among several."""
    who = "" if worker is None else f"worker {worker}: "
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(levelname)s: %(message)s"))
    logging.raiseExceptions = False  # a broken standard error must not print tracebacks
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("embedonce.serve", "embedonce.access"):
        logging.getLogger(name).setLevel(logging.INFO)
