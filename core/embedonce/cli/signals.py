"""SIGTERM: a command that a container or a service manager stops ends as it does after Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from .output import TERMINATED, say


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM, so that the run ends as it does after Ctrl-C."""


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that a stopped container leaves no unfinished output behind."""

    def terminate(signum: int, frame: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except Terminated:  # before the run has begun, or after it has ended
        say("interrupted")
        raise typer.Exit(TERMINATED) from None
    finally:
        signal.signal(signal.SIGTERM, previous)
