"""How long a listing waits for one of its pages."""

from collections.abc import Iterator
from contextlib import contextmanager

from embedonce.contracts import deadline, time_left

PAGE_SECONDS = 10.0


@contextmanager
def page() -> Iterator[None]:
    """Bound one page: a listing takes as long as there are keys, and a server that hangs must not hold it for ever."""
    left = time_left()
    with deadline(PAGE_SECONDS if left is None else min(left, PAGE_SECONDS)):
        yield
