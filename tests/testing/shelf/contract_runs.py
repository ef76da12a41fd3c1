"""What the tests of the contracts share: a barrier for races, and the outcome of a standard test."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from embedonce.testing.contracts.support import CALL_TIMEOUT


class Rendezvous:
    """A barrier for the kit's eight threads; each thread waits in its first ``times`` calls only.

    It makes a race happen in every run, in whatever order a busy machine runs the threads.
    """

    def __init__(self, times: int = 1) -> None:
        self._times = times
        self._barrier = threading.Barrier(8)
        self._this = threading.local()

    def __call__(self) -> None:
        met = getattr(self._this, "met", 0)
        if threading.current_thread() is not threading.main_thread() and met < self._times:
            self._this.met = met + 1
            self._barrier.wait(CALL_TIMEOUT)


def is_failing(test: Callable[[], None]) -> bool:
    """Return whether a standard test fails; raise if it is skipped, because that proves nothing."""
    try:
        test()
    except pytest.skip.Exception as skipped:
        raise AssertionError(f"skipped: {skipped}") from None
    except (Exception, pytest.fail.Exception):
        return True
    return False
