"""Tests for the parts that every integration uses: shared caches and descriptions of embedders."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patience import hold_lock, wait_until_collected

from embedonce import Cache, ConfigError, SpaceError, VectorSpace, config
from embedonce.testing.contracts.support import run_in_fork
from embedonce.testing.fakes import CountingProvider
from embedonce_integrations import wrapping
from embedonce_integrations.wrapping import (
    WrappedProvider,
    WrappedSpaces,
    add_request,
    dump_config,
    make_describer,
    open_shared_cache,
    resolve_declared_space,
)

NGRAM = {"provider": {"type": "ngram", "dimensions": 64}, "tiers": [{"type": "memory"}]}
TIERS = {"tiers": [{"type": "memory"}]}


def test_equal_configurations_share_one_cache(tmp_path: Path) -> None:
    file = tmp_path / "embedonce.toml"
    file.write_text('[provider]\ntype = "ngram"\ndimensions = 64\n[[tiers]]\ntype = "memory"\n')
    first = open_shared_cache(NGRAM)
    assert open_shared_cache(dict(NGRAM)) is first
    assert open_shared_cache(file) is first
    assert open_shared_cache(config.load(file)) is first
    assert open_shared_cache({**NGRAM, "key": {"version": "v2"}}) is not first
    assert open_shared_cache({**NGRAM, "drift": {"action": "refuse"}}) is not first


def test_another_provider_shares_the_tiers() -> None:
    one, two, other = CountingProvider(), CountingProvider(), CountingProvider(model="other")
    first, second, third = (open_shared_cache(TIERS, provider=provider) for provider in (one, two, other))
    first.embed_batch(["a", "b"])
    second.embed_batch(["b", "a"])
    third.embed_batch(["a", "b"])
    assert (one.texts, two.texts, other.texts) == (2, 0, 2)


def test_a_provider_takes_the_place_of_the_configurations() -> None:
    provider = CountingProvider()
    cache = open_shared_cache({**NGRAM, "provider": {"type": "no such plugin"}}, provider=provider)
    assert (cache.embed("a") == provider.vector_of("a")).all()


def test_a_closed_or_collected_cache_is_not_shared_again() -> None:
    first = open_shared_cache(NGRAM)
    first.close()
    second = open_shared_cache(NGRAM)
    assert second is not first
    second.embed("text")
    gone = weakref.ref(second)
    del first, second
    wait_until_collected(gone)
    assert open_shared_cache(NGRAM).lookup(["text"]).sources == [None], "the memory tier is gone with its last user"


def test_the_shared_cache_lives_as_long_as_one_of_its_users() -> None:
    cache: Cache | None = open_shared_cache(TIERS, provider=CountingProvider())
    assert cache is not None
    cache.embed("text")
    gc.collect()
    again = CountingProvider()
    open_shared_cache(TIERS, provider=again).embed("text")
    assert again.texts == 0


@dataclass
class Described:
    model: str = "m"
    prompt: str = ""
    calls: int = 0
    seen: Any = None


def describe_spaces(embedder: object, **options: Any) -> WrappedSpaces:
    return WrappedSpaces(make_describer(embedder, **options))


def test_an_embedder_that_was_changed_is_refused() -> None:
    embedder = Described()
    spaces = describe_spaces(embedder)
    embedder.calls = 3
    spaces.check("document")
    embedder.prompt = "hunter2"
    for task in ("document", "query"):
        with pytest.raises(SpaceError, match=r"changed after it was wrapped \(prompt\)") as raised:
            spaces.check(task)
        assert "hunter2" not in str(raised.value)
    assert spaces("query").extra == {"model": "m", "prompt": ""}


@pytest.mark.parametrize("seen", [1, [1], {"a": 1}, {"a": [1]}])
def test_what_an_embedder_writes_down_during_its_calls_is_no_change(seen: Any) -> None:
    embedder = Described()
    spaces = describe_spaces(embedder)
    grown = {1: 2, "[1]": [1, "x"], "{'a': 1}": {"a": 2, "b": 1}, "{'a': [1]}": {"a": [1, 2]}}[
        seen if isinstance(seen, int) else str(seen)
    ]
    for value in (seen, grown):
        with spaces.calling("document"):
            embedder.seen = value
    spaces.check("query")
    embedder.seen = seen
    with pytest.raises(SpaceError, match="seen"):
        spaces.check("query")


@pytest.mark.parametrize("value", ["m-2", True, ["b"], {"a": "c"}, -1])
def test_a_setting_that_an_embedder_changes_during_its_call_is_an_error(value: Any) -> None:
    embedder = Described(seen={str: None, bool: None, list: ["a"], dict: {"a": "b"}, int: 0}[type(value)])
    spaces = describe_spaces(embedder)
    with pytest.raises(SpaceError, match=r"changed while it computed vectors, so nothing was stored \(seen.*ignore="):  # noqa: SIM117
        with spaces.calling("document"):
            embedder.seen = value


@pytest.mark.parametrize("name", ["max_length", "dimensions", "steps", "weights", "vocabulary", "part"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), ([1], [1, 2]), ({"a": 1}, {"a": 2}), ({}, {"a": 1})])
def test_only_a_record_may_grow(name: str, before: Any, after: Any) -> None:
    embedder = Described()
    setattr(embedder, name, before)
    spaces = describe_spaces(embedder)
    with pytest.raises(SpaceError, match=f"{name}.*ignore="):  # noqa: SIM117
        with spaces.calling("document"):
            setattr(embedder, name, after)


@pytest.mark.parametrize("name", ["_calls", "tokensUsed", "total_cost", "error_count", "hits"])
def test_an_object_inside_may_keep_records(name: str) -> None:
    inner, outer = Described(), Described()
    setattr(inner, name, 1)
    outer.seen = [inner]
    spaces = describe_spaces(outer)
    with spaces.calling("document"):
        setattr(inner, name, 2)
    with pytest.raises(SpaceError, match=r"seen\[0\]\.prompt"):  # noqa: SIM117
        with spaces.calling("document"):
            inner.prompt = "x"


def test_a_change_that_a_call_makes_while_another_one_runs_is_no_change() -> None:
    embedder = Described()
    spaces = describe_spaces(embedder)
    with spaces.calling("document"):
        embedder.seen = 1
        with spaces.calling("query"):
            embedder.seen = 2
        embedder.prompt = "b: "
        with pytest.raises(SpaceError, match="prompt"):
            spaces.check("query")
        embedder.prompt = ""


def test_ignored_fields_may_change() -> None:
    embedder = Described()
    spaces = describe_spaces(embedder, ignore=["prompt"])
    embedder.prompt = "b: "
    spaces.check("document")


def test_a_declared_space_gets_the_task_unless_it_has_one() -> None:
    assert resolve_declared_space({"model": "m"}).task is None
    assert resolve_declared_space({"model": "m"}, task="query").task == "query"
    assert resolve_declared_space(VectorSpace(provider="p", model="m", task="mine"), task="query").task == "mine"


@pytest.mark.parametrize("face", ["both", "embed", "aembed"])
async def test_a_wrapped_provider_has_only_the_given_functions(face: str) -> None:
    calls: list[str] = []

    def embed(texts: list[str], task: str) -> Sequence[Sequence[float]]:
        calls.append("embed")
        return [[float(len(text)), 1.0] for text in texts]

    async def aembed(texts: list[str], task: str) -> Sequence[Sequence[float]]:
        calls.append("aembed")
        return [[float(len(text)), 1.0] for text in texts]

    provider = WrappedProvider(
        embed=embed if face != "aembed" else None,
        aembed=aembed if face != "embed" else None,
        space=lambda task: VectorSpace(provider="p", model="m"),
    )
    cache = open_shared_cache({"tiers": []}, provider=provider)
    assert np.asarray(await cache.aembed("four")).tolist() == [4.0, 1.0]
    assert cache.embed("three").tolist() == [5.0, 1.0]
    first, second = ("embed", "embed") if face == "embed" else ("aembed", "aembed" if face == "aembed" else "embed")
    assert calls == [first, second]


def test_arguments_of_a_call_are_part_of_the_space() -> None:
    space = VectorSpace(provider="p", model="m", extra={"a": 1})
    assert add_request(space, {}) == space
    assert add_request(space, {"batch_size": 3, "user": "me", "unset": None}) == space
    described = add_request(space, {"dimensions": 8})
    assert described.extra == {"a": 1, "request": {"dimensions": 8}}
    with pytest.raises(SpaceError, match=r"the call's hook"):
        add_request(space, {"hook": lambda text: text})
    with pytest.raises(SpaceError, match="depends on the other texts"):
        add_request(space, {"options": {"late_chunking": True}})


def test_a_configuration_without_secrets_can_be_dumped(tmp_path: Path) -> None:
    assert dump_config(None) is None
    assert dump_config(tmp_path / "embedonce.toml") == str(tmp_path / "embedonce.toml")
    config = {
        "key": {"secret": "${SECRET}", "version": "v1"},
        "tiers": [{"type": "redis", "url": "redis://:${PASSWORD}@localhost"}, {"type": "disk", "encryption": "${KEY}"}],
    }
    written = dump_config(config)
    assert written == config
    assert isinstance(written, dict)
    assert written["tiers"] is not config["tiers"]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"key": {"secret": "hunter2"}}, "key.secret"),
        ({"provider": {"type": "openai", "api_key": "hunter2"}}, "provider.api_key"),
        (
            {"tiers": [{"type": "memory"}, {"type": "disk", "encryption": ["${OLD}", "hunter2"]}]},
            "tiers[1].encryption[1]",
        ),
        ({"tiers": [{"type": "redis", "url": "redis://:hunter2@${HOST}"}]}, "tiers[0].url"),
        ({"tiers": [{"type": "redis", "url": "redis://${HOST}/?password=hunter2"}]}, "tiers[0].url"),
    ],
)
def test_a_secret_in_plain_text_is_named_and_not_dumped(config: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{name}: a secret would be written")) as raised:
        dump_config(config)
    assert "hunter2" not in str(raised.value)


def test_a_child_forked_while_a_cache_is_made_can_make_one() -> None:
    with hold_lock(wrapping._lock):
        run_in_fork(lambda: open_shared_cache(NGRAM).embed("a text"), "a shared cache")


def test_a_wrapped_embedder_knows_only_documents_and_queries() -> None:
    space = VectorSpace(provider="p", model="m")
    provider = wrapping.WrappedProvider(embed=lambda texts, task: [[1.0, 2.0]] * len(texts), space=lambda _: space)
    with Cache(provider) as cache:
        cache.embed("a", "query")
        for task, message in (("qurey", 'did you mean "query"'), ("code", 'it knows "document" and "query"')):
            with pytest.raises(SpaceError, match=message):
                cache.embed("a", task)
