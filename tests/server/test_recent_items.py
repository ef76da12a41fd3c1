"""Items that were used last, within a number of bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from embedonce_server.api.recent_items import RecentItems

MAX_BYTES = 100
keys = st.integers(0, 30)
steps = st.lists(st.tuples(keys, st.one_of(st.none(), st.integers(1, 120))), max_size=80)


@given(steps)
def test_an_item_is_the_one_that_was_kept_last_and_the_size_is_bounded(plan: list[tuple[int, int | None]]) -> None:
    items: RecentItems[int, tuple[int, int]] = RecentItems(MAX_BYTES, lambda key, value: value[1])
    last: dict[int, tuple[int, int]] = {}
    for number, (key, size) in enumerate(plan):
        if size is None:
            assert items.get(key) in (None, last.get(key))
        else:
            items.keep(key, (number, size))
            if size <= MAX_BYTES:
                last[key] = (number, size)
                assert items.get(key) == last[key]
        for generation in (items._newer, items._older):
            assert sum(size for _, size in generation.values()) <= MAX_BYTES


def test_an_item_in_use_stays() -> None:
    items: RecentItems[int, str] = RecentItems(10, lambda key, value: 1)
    items.keep(0, "hot")
    for i in range(1, 1000):
        items.keep(i, "cold")
        assert items.get(0) == "hot"
    assert len(items) <= 20


def test_nothing_is_left_after_clear() -> None:
    items: RecentItems[int, str] = RecentItems(10, lambda key, value: 6)
    for i in range(3):
        items.keep(i, "value")
    items.clear()
    assert [items.get(i) for i in range(3)] == [None] * 3
    assert len(items) == 0
