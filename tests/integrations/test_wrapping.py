"""Tests for the parts that every integration uses: shared caches and descriptions of embedders."""

from __future__ import annotations

import asyncio
import gc
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from patience import hold_lock, wait_until_collected

from embedonce import Cache, ConfigError, ProviderError, SpaceError, VectorSpace, config
from embedonce.testing.contracts.support import run_in_fork
from embedonce.testing.fakes import CountingProvider
from embedonce_integrations import wrapping
from embedonce_integrations.wrapping import (
    NOT_IN_SPACE,
    OrderedEmbeddings,
    WrappedProvider,
    WrappedSpaces,
    add_request,
    describe_by_fields,
    describe_space,
    dump_config,
    is_openai_resource,
    open_shared_cache,
    resolve_declared_space,
)

NGRAM = {"provider": {"type": "ngram", "dimensions": 64}, "tiers": [{"type": "memory"}]}
TIERS = {"tiers": [{"type": "memory"}]}


class Embedder:
    """Stands in for a framework's embedder."""


def fingerprint(embedder: object = None, *, task: str | None = None, **fields: Any) -> bytes:
    return describe_space(embedder or Embedder(), fields, model="m", task=task).fingerprint()


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


def test_fields_that_decide_vectors_change_the_space() -> None:
    plain = fingerprint()
    for field, value in (("dimensions", 2), ("prompt", "q: "), ("normalize", True), ("layers", [1, 2])):
        assert fingerprint(**{field: value}) != plain, field
    assert fingerprint(prompt=None) == plain
    assert fingerprint(task="query") != plain
    assert fingerprint(type("Other", (), {})()) != plain


@pytest.mark.parametrize("name", sorted(NOT_IN_SPACE))
def test_fields_that_decide_nothing_do_not_change_the_space(name: str) -> None:
    assert fingerprint(**{name: object()}) == fingerprint()


def test_secrets_and_credentials_are_in_no_space() -> None:
    class Secret:
        def get_secret_value(self) -> str:
            raise AssertionError("a secret must not be read")

    space = describe_space(
        Embedder(),
        {
            "key": Secret(),
            "body": {"auth": Secret(), "user": "me", "truncate": True},
            "base_url": "https://me:pass@host:8080/v1",
            "cohere_api_key": "sk-1",
            "azure_ad_token_provider": print,
            "azure_ad_async_token_provider": print,
            "aws_secret_access_key": "s",
            "headers_of_mine": {"x-api-key": "s", "Authorization": "Bearer s"},
            "subscription_key": "s",
            "endpoint": "https://host/v1?api-key=s&api-version=1",
            "query_token": "[Q]",
        },
        model="m",
    )
    assert space.extra == {
        "body": {"truncate": True},
        "base_url": "https://host:8080/v1",
        "headers_of_mine": {},
        "endpoint": "https://host/v1?api-version=1",
        "query_token": "[Q]",
    }
    assert fingerprint(base_url="https://a:b@host/v1") == fingerprint(base_url="https://host/v1")


def test_an_object_that_cannot_be_described_is_refused_with_advice() -> None:
    with pytest.raises(SpaceError, match=r"Embedder\.pooler.*space="):
        fingerprint(pooler=object())
    with pytest.raises(SpaceError, match=r"Embedder\.options\.hook"):
        fingerprint(options={"hook": print})


def test_a_class_whose_name_is_ambiguous_is_refused() -> None:
    class Local:
        pass

    script = type("Embedder", (), {"__module__": "__main__"})
    with pytest.raises(SpaceError, match=r"Local is defined in a function.*space="):
        fingerprint(Local())
    with pytest.raises(SpaceError, match=r"Embedder is defined in the script.*space="):
        fingerprint(script())


def test_a_changed_embedder_is_refused_by_its_fields() -> None:
    fields: dict[str, Any] = {"prompt": "a: ", "batch_size": 8}
    spaces = WrappedSpaces(lambda task: describe_space(Embedder(), fields, model="m", task=task))
    fields["batch_size"] = 16
    spaces.check("document")
    fields |= {"prompt": "hunter2", "pooling": "mean"}
    with pytest.raises(SpaceError, match=r"changed after it was wrapped \(pooling, prompt\)") as raised:
        spaces.check("query")
    assert "hunter2" not in str(raised.value)
    assert spaces("query").extra == {"prompt": "a: "}


def test_enums_and_sets_are_described_by_their_values() -> None:
    class Pooling(Enum):
        MEAN = "mean"

    assert fingerprint(pooling=Pooling.MEAN) == fingerprint(pooling="mean")
    assert fingerprint(tags={"b", "a"}) == fingerprint(tags=["a", "b"])


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


def test_paths_and_precisions_are_described() -> None:
    assert fingerprint(model_path=Path("/a")) == fingerprint(model_path="/a")
    dtype = type("dtype", (), {"__module__": "torch", "__str__": lambda self: "torch.float16"})()
    assert fingerprint(options={"torch_dtype": dtype}) == fingerprint(options={"torch_dtype": "torch.float16"})


# --- models and dataclasses -------------------------------------------------------------------


@dataclass
class Described:
    model: str = "m"
    prompt: str = ""
    batch_size: int = 8


def test_a_dataclass_describes_itself() -> None:
    space = describe_by_fields(Described())
    assert space.model == "m"
    assert space == describe_by_fields(Described(batch_size=9))
    assert space != describe_by_fields(Described(prompt="query: "))
    assert space != describe_by_fields(Described(), overrides={"endpoint": "here"})
    assert space != describe_by_fields(Described(), task="query")


def test_an_embedder_without_fields_is_refused() -> None:
    with pytest.raises(SpaceError, match=r"Embedder does not say.*space="):
        describe_by_fields(Embedder())
    script = type("Described", (Described,), {"__module__": "__main__"})
    with pytest.raises(SpaceError, match=r"another script.*space="):
        describe_by_fields(script())


def test_arguments_of_a_call_are_part_of_the_space() -> None:
    space = VectorSpace(provider="p", model="m", extra={"a": 1})
    assert add_request(space, {}) == space
    assert add_request(space, {"batch_size": 3, "user": "me", "unset": None}) == space
    described = add_request(space, {"dimensions": 8})
    assert described.extra == {"a": 1, "request": {"dimensions": 8}}
    with pytest.raises(SpaceError, match=r"the call's\.hook"):
        add_request(space, {"hook": print})


# --- an OpenAI client's answers ---------------------------------------------------------------


def make_answer(places: Sequence[Any]) -> Any:
    return SimpleNamespace(data=[SimpleNamespace(index=place, embedding=[place]) for place in places])


@pytest.mark.parametrize("inputs", [["a", "b", "c"], [[1], [2, 3], [4]]])
@pytest.mark.parametrize("places", [[0, 1, 2], [2, 0, 1], [None, None, None]])
def test_answers_come_in_the_order_of_the_input(inputs: Any, places: list[Any]) -> None:
    async def later(**_: Any) -> Any:
        return make_answer(places)

    resource = SimpleNamespace(create=lambda **_: make_answer(places), other=1)
    wanted = [None] * 3 if places[0] is None else [0, 1, 2]
    ordered = OrderedEmbeddings(resource)
    assert [item.index for item in ordered.create(input=inputs).data] == wanted
    assert ordered.other == 1
    answer = asyncio.run(OrderedEmbeddings(SimpleNamespace(create=later)).create(input=inputs))
    assert [item.index for item in answer.data] == wanted


@pytest.mark.parametrize("places", [[], [0], [0, 0], [0, 2], [-1, 0], [None, 0], [0, 1, 2], ["0", "1"]])
def test_an_answer_with_ambiguous_indexes_is_an_error(places: list[Any]) -> None:
    ordered = OrderedEmbeddings(SimpleNamespace(create=lambda **_: make_answer(places)))
    with pytest.raises(ProviderError, match="which vector belongs to which input"):
        ordered.create(input=["a", "b"])


@pytest.mark.parametrize("one", ["text", [1, 2, 3]])
def test_one_input_has_one_vector(one: Any) -> None:
    assert OrderedEmbeddings(SimpleNamespace(create=lambda **_: make_answer([0]))).create(input=one).data[0].index == 0
    with pytest.raises(ProviderError):
        OrderedEmbeddings(SimpleNamespace(create=lambda **_: make_answer([0, 1]))).create(input=one)


def test_only_clients_of_openai_are_recognised() -> None:
    assert not is_openai_resource(None)
    assert not is_openai_resource(SimpleNamespace(create=print))


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
