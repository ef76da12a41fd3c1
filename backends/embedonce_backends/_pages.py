"""The time limit for one page of a listing."""

from collections.abc import Iterator
from contextlib import contextmanager

from embedonce.contracts import deadline, time_left

PAGE_SECONDS = 10.0
"""Maximum number of seconds that a listing waits for each of its pages."""


@contextmanager
def limit_page_time() -> Iterator[None]:
    """Run the ``with`` block with a deadline of at most ``PAGE_SECONDS``.

    The listing as a whole has no time limit, because its duration depends on the number of keys. Each page has a time
    limit, so that a server that hangs cannot block the listing forever.
    """
    left = time_left()
    with deadline(PAGE_SECONDS if left is None else min(left, PAGE_SECONDS)):
        yield
