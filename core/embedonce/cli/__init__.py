"""The command line: ``embedonce`` and ``python -m embedonce``."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .commands import app as app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line and exit with its code. Ctrl-C exits without a traceback, even during the imports."""
    # Python sets a stream to None if the shell closed it. Discard the output of such a stream.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process exits
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        from .commands import run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .commands import app

    return app
