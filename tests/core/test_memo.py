"""The keys of many texts are made together, and equal the keys that are made one by one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedonce import KeyPolicy
from embedonce._engine import routes
from embedonce._engine.routes import LiveProvider, Route
from embedonce.errors import TextError
from embedonce.testing.fakes import CountingProvider

POLICIES = (
    KeyPolicy(),
    KeyPolicy(hash="blake2b"),
    KeyPolicy(secret="s"),
    KeyPolicy(hash="blake2b", secret="s"),
)
texts = st.one_of(st.sampled_from(["a", "b", "c", "\ud800", "long " * 20]), st.text(max_size=5))


def make_route(policy: KeyPolicy, steps: Any = ()) -> Route:
    return Route(LiveProvider(CountingProvider(), fallback=False), "document", policy, steps)


@given(st.lists(st.lists(texts, max_size=12), max_size=4), st.sampled_from(POLICIES), st.booleans())
@settings(deadline=None)
def test_keys_of_a_batch_are_the_keys_of_its_texts(batches: Any, policy: KeyPolicy, has_steps: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MEMO_TEXTS", 9), ("KEYS_AT_ONCE", 4), ("MEMO_MAX_TEXT", 50), ("MEMO_CHARACTERS", 300)):
            patch.setattr(routes, name, value)
        route = make_route(policy, [str.strip] if has_steps else ())
        for batch in batches:
            keys, errors = route.find_keys(batch, 100)
            for i, (text, key) in enumerate(zip(batch, keys, strict=True)):
                if "\ud800" in text:
                    error = errors[key]
                    assert isinstance(error, TextError)
                    assert str(error).startswith(f"item {100 + i}: ")
                else:
                    assert key == route.keyer.key(route.keyer.normalize(text))
            assert len(errors) == sum("\ud800" in text for text in batch)
            for memo in (route.recent_keys, route._older_keys):
                assert len(memo) <= 9
                assert all(len(text) <= 50 for text in memo)


def test_a_batch_of_new_texts_is_in_the_memo() -> None:
    route = make_route(KeyPolicy())
    route.find_keys(["a", "b"])
    assert list(route.recent_keys) == ["a", "b"]
