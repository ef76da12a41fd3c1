"""The order of the items of an OpenAI-compatible answer: which vector belongs to which text, according to ``index``."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import ProviderError


def order_by_index(indexes: Sequence[object], count: int) -> list[int]:
    """Return, for each of ``count`` texts, the position of its item in the answer.

    ``indexes`` has the ``index`` of each item, in the order of the answer. An item without an ``index`` has None.

    Every index from 0 to ``count`` - 1 must occur exactly once, with two exceptions. Servers that encode their answers
    with protobuf leave out an ``index`` of 0, so an item without ``index`` takes the only place that is free. If no
    item has an ``index``, the server does not number its vectors, and they are in the order of the texts.

    >>> order_by_index([2, 0, 1], 3)
    [1, 2, 0]
    >>> order_by_index([2, None, 1], 3)
    [1, 2, 0]

    Raises:
        ProviderError: the number of items is not ``count``, or the indexes do not show which item belongs to which
            text.
    """
    if len(indexes) != count:
        raise ProviderError(
            f"expected one vector per text; texts: {count}, vectors received: {len(indexes)}; nothing was stored"
        )
    unnumbered = [position for position, index in enumerate(indexes) if index is None]
    if len(unnumbered) == count:
        return unnumbered
    # A bool is an int, and 1.0 equals 1, so the type is compared.
    places = {index: position for position, index in enumerate(indexes) if type(index) is int and 0 <= index < count}
    if len(places) == count - 1 and unnumbered:
        free = next(index for index in range(count) if index not in places)
        places[free] = unnumbered[0]
    if len(places) != count:
        raise ProviderError(
            f"the indexes in the endpoint's answer are not exactly the numbers from 0 to {count - 1}, so they do not "
            "show which vector belongs to which text; nothing was stored"
        )
    return [places[index] for index in range(count)]
