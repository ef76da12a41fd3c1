"""Tests for the walk that describes an embedder by everything plain that it holds."""

from __future__ import annotations

import functools
import io
import logging
import os
import random
import re
import threading
import weakref
from collections import ChainMap, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import requests
from pydantic import SecretStr

from embedonce import Cache, SpaceError
from embedonce.testing.fakes import CountingProvider
from embedonce_integrations._description_changes import list_differences
from embedonce_integrations.describing import (
    describe_embedder,
    find_model,
    read_state,
    refuse_tied_settings,
)
from embedonce_integrations.embedder_fields import NOT_IN_SPACE, is_secret, is_unmistakable

SECRET = "sk-0123456789-do-not-tell"


class Embedder:
    """Stands in for a framework's embedder. It keeps its settings in ``__dict__``."""

    def __init__(self, **settings: Any) -> None:
        self.model = "m"
        self.__dict__.update(settings)


class Part:
    def __init__(self, **settings: Any) -> None:
        self.__dict__.update(settings)


class Slots:
    __slots__ = ("__weakref__", "_size", "other")

    def __init__(self, size: int) -> None:
        self._size = size

    @property
    def size(self) -> int:
        return self._size


class Pooling(Enum):
    MEAN = "mean"
    OWN = object()


class Phrase(str):
    """A text with an attribute."""


class Lazy(Embedder):
    @functools.cached_property
    def tokenizer(self) -> Any:
        return object()


class Client(openai.OpenAI):
    pass


Pair = namedtuple("Pair", "left right")


@functools.lru_cache
def remembered() -> int:
    return 1


def extra_of(**settings: Any) -> Mapping[str, Any]:
    described = dict(describe_embedder(Embedder(**settings)).extra or {})
    del described["model"]
    return described


def fingerprint(**settings: Any) -> bytes:
    return describe_embedder(Embedder(**settings)).fingerprint()


def test_fields_that_decide_vectors_change_the_space() -> None:
    plain = fingerprint()
    for name, value in (("dimensions", 2), ("_prompt", "q: "), ("normalize", True), ("layers", [1, 2])):
        assert fingerprint(**{name: value}) != plain, name
    assert fingerprint(prompt=None) == plain
    assert describe_embedder(Embedder(), task="query").fingerprint() != plain
    assert describe_embedder(Embedder(), more={"size": 3}).extra == {"model": "m", "size": 3}


@pytest.mark.parametrize("name", sorted(NOT_IN_SPACE))
def test_fields_that_decide_nothing_do_not_change_the_space(name: str) -> None:
    camel = re.sub("_(.)", lambda letter: letter[1].upper(), name)
    for spelled in (name, f"_{name}", f"__{name}_", camel, name.replace("_", "-")):
        for value in (3, {"a": [1.5, "b", None]}, threading.Lock(), httpx.Timeout(3), SecretStr("a")):
            assert fingerprint(**{spelled: value}) == fingerprint(), spelled
        assert fingerprint(options={spelled: 3}) == fingerprint(options={}), spelled
        is_equal = fingerprint(replacements={spelled: 3}) == fingerprint(replacements={spelled: 4})
        assert is_equal is is_unmistakable(spelled), spelled
        if not is_secret(name):
            with pytest.raises(SpaceError, match="ignore="):
                fingerprint(**{spelled: object()})


def test_an_object_is_not_left_out_because_of_its_name() -> None:
    for name in ("session", "embedding_backend", "cache"):
        for one, other in ((Part(a=1), Part(a=2)), ([Embedder(a=1)], [Embedder(a=2)]), (len, max)):
            assert fingerprint(**{name: one}) != fingerprint(**{name: other}), name


def test_the_settings_of_a_client_are_settings() -> None:
    for name in ("client_kwargs", "client_args", "async_client_kwargs", "sync_client_kwargs", "http_client_kwargs"):
        one, same, other = (
            fingerprint(**{name: {"params": {"task": task}, "timeout": timeout, "headers": {"a": timeout}}})
            for task, timeout in (("a", 1), ("a", 2), ("b", 1))
        )
        assert one == same != other


def test_names_of_prompts_are_not_names_of_settings() -> None:
    for name in ("user", "count", "token", "password", "key"):
        for field in ("prompts", "replacements", "weights", "options_by_word"):
            assert fingerprint(**{field: {name: "a: "}}) != fingerprint(**{field: {name: "b: "}}), name


@pytest.mark.parametrize(
    "name",
    [
        *("api_key", "openaiApiKey", "cohere_api_key", "azure_ad_token_provider", "x-api-key", "_token", "hf_token"),
        *("aws_secret_access_key", "subscription_key", "passwd", "Authorization", "session_token", "key"),
    ],
)
def test_secrets_are_in_no_space(name: str) -> None:
    assert is_secret(name)
    assert fingerprint(**{name: "a"}) == fingerprint(**{name: "b"}) == fingerprint()
    assert SECRET not in repr(extra_of(**{name: SECRET}, options={name: SECRET}))


@pytest.mark.parametrize(
    "name", ["query_token", "max_tokens", "tokenizer_name", "keywords", "author", "passage", "secret_prompt"]
)
def test_settings_whose_names_resemble_secrets_are_in_the_space(name: str) -> None:
    assert fingerprint(**{name: "a"}) != fingerprint(**{name: "b"})


@pytest.mark.parametrize("value", [SecretStr(SECRET), [SecretStr(SECRET)], SECRET, {"a": [SECRET]}, f"Bearer {SECRET}"])
def test_a_value_that_is_a_secret_is_shown_nowhere(value: Any) -> None:
    space = describe_embedder(Embedder(setting=value))
    assert SECRET not in f"{space!r} {space.extra!r} {space.described()!r}"


def test_credentials_are_removed_from_urls() -> None:
    url = "https://me:pass@host:8080/v1?api-key=s&version=1"
    assert extra_of(server=url) == {"server": "https://host:8080/v1?version=1"}
    assert fingerprint(base_url="https://a:b@host/v1") == fingerprint(base_url="https://host/v1/")


REFERRED = Part(a=1), Part(a=2)

VALUES: list[tuple[Any, Any]] = [
    (float("nan"), 1.0),
    (10**6000, 10**6000 + 1),
    ("\ud800", "\ud801"),
    ("Basic text about tea: ", "Basic text about beer: "),
    ("\ud800", "\\ud800"),
    ({1: "a"}, {"1": "a"}),
    ({(1, 2): "a"}, {(1, 3): "a"}),
    ({Pooling.MEAN: "a"}, {Pooling.MEAN: "b"}),
    (bytearray(b"a"), bytearray(b"b")),
    (memoryview(b"a"), memoryview(b"b")),
    (OrderedDict(a=1), OrderedDict(a=2)),
    (OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)),
    (OrderedDict({1: 1, 2: 2}), OrderedDict({2: 2, 1: 1})),
    (weakref.ref(REFERRED[0]), weakref.ref(REFERRED[1])),
    (random.Random(1), random.Random(2)),
    (io.StringIO("a"), io.StringIO("b")),
    (io.BytesIO(b"a"), io.BytesIO(b"b")),
    ("As in http://x ?\nquery: ", "As in http://x ?query: "),
    ("see http://x/?token=a b ", "see http://x/?token=c d "),
    (defaultdict(int, a=1), defaultdict(int, a=2)),
    (Pair(1, 2), Pair(2, 1)),
    (MappingProxyType({"a": 1}), MappingProxyType({"a": 2})),
    (ChainMap({"a": 1}), ChainMap({"a": 2})),
    (Slots(1), Slots(2)),
    (Part(a=Part(b=1)), Part(a=Part(b=2))),
    (SimpleNamespace(a=1), SimpleNamespace(a=2)),
    (Path("a"), Path("b")),
    (re.compile("a" * 300 + "b"), re.compile("a" * 300 + "c")),
    (re.compile("a"), re.compile("a", re.IGNORECASE)),
    (1j, 2j),
    (range(3), range(4)),
    (slice(1, 2), slice(1, 3)),
    (Fraction(1, 3), Fraction(2, 3)),
    (1, True),
    (1, 1.0),
    (np.arange(3), np.arange(3.0)),
    (np.zeros((2, 1)), np.zeros((1, 2))),
    (np.array(["a"]), np.array(["b"])),
    (np.array([{"a": 1}], object), np.array([{"a": 2}], object)),
    (np.float32(1), np.float32(2)),
    (np.dtype("f4"), np.dtype("f8")),
    (len, max),
    (np.mean, np.median),
    (np.sin, np.cos),
    (str.upper, str.lower),
    ("abc".upper, "abd".upper),
    (functools.partial(int, base=2), functools.partial(int, base=3)),
    (Part(a=1).__eq__, Part(a=2).__eq__),
    (remembered, len),
    (Part, Slots),
    (list[int], list[str]),
    (Mapping[str, int], Mapping[str, str]),
    (int | None, str | None),
    (os.path, re),
    (SecretStr, Part),
]


@pytest.mark.parametrize(("one", "other"), VALUES, ids=lambda value: type(value).__name__)
def test_every_plain_value_is_in_the_space(one: Any, other: Any) -> None:
    for settings in (lambda value: {"_setting": value}, lambda value: {"inner": Part(options=[value])}):
        first, again, second = (fingerprint(**settings(value)) for value in (one, one, other))
        assert first == again
        assert first != second


def test_equal_values_of_different_types_are_equal() -> None:
    assert fingerprint(a=Pooling.MEAN) == fingerprint(a="mean")
    assert fingerprint(a={"b", "a"}) == fingerprint(a=["a", "b"])
    assert fingerprint(a=Path("/a")) == fingerprint(a="/a")
    assert fingerprint(a=(1, 2)) == fingerprint(a=[1, 2])


def test_a_subclass_keeps_the_attributes_that_it_adds() -> None:
    one, other = Phrase("text"), Phrase("text")
    other.language = "fr"  # type: ignore[attr-defined]
    assert fingerprint(a=one) == fingerprint(a="text")
    assert fingerprint(a=one) != fingerprint(a=other)


@pytest.mark.parametrize(
    "make",
    [
        *(object, lambda: lambda text: text, lambda: (text for text in "a"), lambda: iter([1]), lambda: os.environ),
        *(lambda: type("Local", (), {"__qualname__": "f.<locals>.Local"})(), lambda: Pooling.OWN.value),
        *(lambda: np.random.default_rng(1), lambda: ValueError("x"), lambda: np.ma.masked_array([1], [True])),
    ],
)
def test_what_cannot_be_described_is_refused_with_advice(make: Callable[[], Any]) -> None:
    for settings in ({"hook": make()}, {"_a": {"b": [make()]}}, {"part": Part(hook=make())}):
        with pytest.raises(SpaceError, match="space=") as raised:
            fingerprint(**settings)
        assert len(str(raised.value)) < 500
    with pytest.raises(SpaceError, match=r'Embedder\.part\.hook \(of type object\).*ignore=\["part\.hook"\]'):
        fingerprint(part=Part(hook=object()))


def test_machinery_has_no_setting() -> None:
    for item in (
        *(threading.Lock(), logging.getLogger("a"), random.SystemRandom(), ContextVar("empty")),
        *(weakref.WeakValueDictionary(), threading.local()),
    ):
        assert fingerprint(item=item) == fingerprint(), type(item)


def test_values_of_one_thread_or_context_are_refused() -> None:
    local = threading.local()
    local.client = httpx.Client()
    assert fingerprint(item=local) == fingerprint()
    local.task = "a"
    for item in (local, ContextVar("task", default="a"), weakref.proxy(REFERRED[0])):
        with pytest.raises(SpaceError, match="ignore="):
            fingerprint(item=item)


class Items(dict[str, Any]):
    """An embedder that is a dict."""


def test_the_items_of_an_embedder_are_a_part_of_its_state() -> None:
    one, same, other = (
        describe_embedder(Items(prefix=prefix, api_key=key)) for prefix, key in (("a", "x"), ("a", "y"), ("b", "x"))
    )
    assert one == same != other


def test_a_prompt_is_no_url() -> None:
    for name in ("instruction", "query_prefix"):
        assert fingerprint(**{name: "http://alice@tea"}) != fingerprint(**{name: "http://bob@tea"})
    assert fingerprint(prompts={"a": "http://alice@tea"}) != fingerprint(prompts={"a": "http://bob@tea"})


def test_cycles_end() -> None:
    embedder = Embedder(part=Part())
    embedder.part.owner = embedder  # type: ignore[attr-defined]
    embedder.part.me = embedder.part  # type: ignore[attr-defined]
    loop: list[Any] = []
    loop.append(loop)
    embedder.loop = loop  # type: ignore[attr-defined]
    assert describe_embedder(embedder) == describe_embedder(embedder)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(SpaceError, match="nested too deeply"):
        fingerprint(deep=deep)


def test_a_cached_property_follows_from_the_rest() -> None:
    embedder = Lazy()
    before = describe_embedder(embedder)
    assert embedder.tokenizer
    assert describe_embedder(embedder) == before


def test_a_cache_inside_is_described_by_its_space() -> None:
    one, other = (SimpleNamespace(cache=Cache(CountingProvider(model=name))) for name in ("one", "two"))
    assert fingerprint(base=one) != fingerprint(base=other)


def test_a_client_is_described_by_where_it_sends_requests_and_what_it_adds() -> None:
    def make(url: str, kind: type[openai.OpenAI] = openai.OpenAI, **options: Any) -> openai.OpenAI:
        return kind(base_url=url, api_key=SECRET, **options)

    one = fingerprint(client=make("http://one/v1"))
    assert one == fingerprint(client=make("http://one/v1/", timeout=3, default_headers={"a": "b"}))
    assert one != fingerprint(client=make("http://two/v1"))
    assert one != fingerprint(client=make("http://one/v1", default_query={"truncate": "END"}))
    assert one == fingerprint(client=make("http://one/v1", default_query={"api-version": "1"}))
    assert one != fingerprint(client=make("http://one/v1", Client))
    assert fingerprint(part=[make("http://one/v1")]) != fingerprint(part=[make("http://two/v1")])
    assert fingerprint(ask=make("http://one/v1").embeddings.create) != fingerprint(
        ask=make("http://two/v1").embeddings.create
    )
    # An embedder that makes its client at the first call has the same description before and after.
    assert (
        fingerprint(api_base="http://one/v1") == one == fingerprint(api_base="http://one/v1", _c=make("http://one/v1"))
    )


def test_the_query_parameters_of_a_client_are_in_the_space() -> None:
    def make_httpx(**params: Any) -> httpx.Client:
        return httpx.Client(params=params)

    def make_openai(**params: Any) -> Any:
        return openai.OpenAI(base_url="http://one/v1", api_key=SECRET, http_client=make_httpx(**params))

    def make_session(**params: Any) -> requests.Session:
        session = requests.Session()
        session.params = params
        return session

    for make in (make_httpx, make_openai, lambda **params: make_openai(**params).embeddings, make_session):
        for name in ("_client", "http_client", "session"):
            one = fingerprint(**{name: make(task="a")})
            assert one == fingerprint(**{name: make(task="a", token=SECRET)})
            assert len({one, fingerprint(**{name: make(task=["a", "b"])}), fingerprint(**{name: make()})}) == 3
            with pytest.raises(SpaceError, match="depends on the other texts"):
                fingerprint(**{name: make(late_chunking="true")})
    assert fingerprint(http_client=make_httpx()) == fingerprint()


def test_two_endpoints_keep_their_names() -> None:
    assert fingerprint(base_url="http://a", endpoint="http://b") != fingerprint(
        base_url="http://b", endpoint="http://a"
    )


def test_a_loaded_model_needs_a_name() -> None:
    tokenizer = type("Tokenizer", (), {"__module__": "tokenizers.made_up"})()
    assert fingerprint(_tokenizer=tokenizer) == fingerprint()
    nameless = Embedder(_tokenizer=tokenizer, size=3)
    del nameless.model
    with pytest.raises(SpaceError, match=r"Embedder\._tokenizer"):
        describe_embedder(nameless)
    assert describe_embedder(Embedder(inner=nameless))


@dataclass
class Empty:
    batch_size: int = 3
    model: str = "unknown"


def test_an_embedder_that_says_nothing_is_refused() -> None:
    with pytest.raises(SpaceError, match=r"Empty does not say what determines its vectors.*space="):
        describe_embedder(Empty())
    assert describe_embedder(Empty(model="m")).model == "m"
    assert find_model({"model_name": "unknown", "_model": "b"}) == "b"


def test_a_class_whose_name_is_ambiguous_is_refused() -> None:
    class Local(Embedder):
        pass

    script = type("Embedder", (Embedder,), {"__module__": "__main__"})
    for embedder in (Local(), script()):
        for holder in (embedder, Embedder(inner=embedder)):
            with pytest.raises(SpaceError, match=r"is defined in (a function|the script).*space="):
                describe_embedder(holder)


def test_ignored_fields_are_left_out() -> None:
    embedder = Embedder(hook=object(), part=Part(hook=object(), size=1))
    for ignore in (["hook"], ["hook", "part.hook"]):
        assert describe_embedder(embedder, ignore=ignore).extra == {
            "model": "m",
            "part": {"class": f"{__name__}.Part", "size": 1},
        }
    with pytest.raises(SpaceError, match=r"Embedder\.hook"):
        describe_embedder(embedder, ignore=["part.hook"])
    with pytest.raises(SpaceError, match='Embedder has no field "hok"; did you mean "hook"'):
        describe_embedder(embedder, ignore=["hook", "hok"])
    with pytest.raises(TypeError, match=r'ignore must be a list of names, such as \["hook"\]'):
        describe_embedder(embedder, ignore="hook")


def test_settings_that_tie_a_text_to_its_batch_are_refused() -> None:
    for embedder in (Embedder(_late_chunking=True), Embedder(part=[Part(options={"lateChunking": True})], a=object())):
        with pytest.raises(SpaceError, match="depends on the other texts"):
            refuse_tied_settings(embedder)
    with pytest.raises(SpaceError, match="depends on the other texts"):
        describe_embedder(Embedder(part=Part(late_chunking=True)))
    refuse_tied_settings(Embedder(a=object(), late_chunking=False, make=lambda: 1))
    refuse_tied_settings(Embedder(late_chunking=True), ["late_chunking"])
    with pytest.raises(SpaceError, match='no field "late_chunk"; did you mean "late_chunking"'):
        refuse_tied_settings(Embedder(late_chunking=True), ["late_chunk"])


def test_differences_have_a_path_and_both_values() -> None:
    then = {"a": 1, "b": {"c": [1]}, "d": 1}
    assert [change[:3] for change in list_differences(then, {"a": True, "b": {"c": [2]}, "x.client": {}})] == [
        ("a", 1, True),
        ("b.c", [1], [2]),
        ("d", 1, None),
    ]
    assert list_differences(then, {**then, "x.client": {"model": "m"}}) == []
    assert list_differences({**then, "x.client": {"model": "m"}}, then) != []


def test_the_state_of_an_object_has_its_slots() -> None:
    assert read_state(Slots(3)) == {"_size": 3}
