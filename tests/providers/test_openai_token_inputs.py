"""Lists of token numbers in place of texts."""

from __future__ import annotations

import pytest

from embedonce import Cache, TextRefused
from embedonce.testing import OpenAIServer
from embedonce_backends.memory import MemoryBackend
from embedonce_providers.openai import OpenAIProvider

MODEL = "text-embedding-3-small"


def make(server: OpenAIServer, **options: object) -> OpenAIProvider:
    return OpenAIProvider(model=MODEL, base_url=server.base_url, api_key="any", token_inputs=True, **options)  # type: ignore[arg-type]


def test_token_numbers_are_sent_as_lists_and_cached() -> None:
    with OpenAIServer() as server, Cache(make(server), [MemoryBackend()]) as cache:
        found = cache.fetch(["[1,2,3]", "[4]"])
        assert found.vectors[0].tolist() == server.vector_of([1, 2, 3]).tolist()
        assert found.vectors[1].tolist() == server.vector_of([4]).tolist()
        assert found.computed.tokens == 4
        assert cache.fetch(["[4]"]).sources == ["memory"]


def test_token_numbers_have_a_space_of_their_own() -> None:
    with OpenAIServer() as server:
        plain = OpenAIProvider(model=MODEL, base_url=server.base_url, api_key="any")
        tokens = make(server)
        assert plain.space("document").fingerprint() != tokens.space("document").fingerprint()
        assert plain.space("document").extra is None
        plain.close()
        tokens.close()


@pytest.mark.parametrize("text", ["a text", "[]", "[1.5]", "[true]", "[-1]", "5", "[[1]]", '["1"]', "[1", "null"])
def test_other_texts_fail_alone(text: str) -> None:
    with OpenAIServer() as server, Cache(make(server), []) as cache:
        found = cache.fetch(["[1]", text])
        assert list(found.failed) == [1]
        assert isinstance(found.failed[1], TextRefused)


def test_tokens_are_counted_without_a_tokenizer() -> None:
    with OpenAIServer() as server:
        provider = make(server)
        assert provider.count_exact_tokens(["[1,2,3]", "[7]"], "document") == [3, 1]
        assert provider.count_tokens("[1,2,3]") == 3
        provider.close()


def test_prefixes_cannot_be_put_before_token_numbers() -> None:
    with OpenAIServer() as server, pytest.raises(ValueError, match="token_inputs"):
        make(server, prefixes={"query": "query: "})
