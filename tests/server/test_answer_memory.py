"""The bytes of answers in memory are bounded, also if clients do not read them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from patience import wait_until_async
from serving import Served, serve

from embedonce_server.api.answer_memory import PART_BYTES, AnswerMemory
from embedonce_server.api.api_errors import ApiError

SETTINGS = {"provider": {"type": "ngram", "dimensions": 512}, "tiers": [{"type": "memory"}]}


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("embedonce_server.api.answer_memory.MAX_ANSWERS", 100)
    return 100


async def test_answers_wait_in_their_order_until_there_is_memory(limit: int) -> None:
    memory = AnswerMemory()
    await memory.take(limit)
    done: list[int] = []

    async def take(size: int) -> None:
        await memory.take(size)
        done.append(size)

    tasks = [asyncio.create_task(take(size)) for size in (60, 50, 40, 1)]
    await wait_until_async(lambda: len(memory._waiting) == 4)
    memory.give(limit)
    await tasks[0]
    await asyncio.sleep(0)
    assert done == [60], "a small answer does not overtake a large one"
    tasks[1].cancel()
    await tasks[2]
    memory.give(60)
    await tasks[3]
    assert (done, memory.bytes) == ([60, 40, 1], 41)
    assert not memory._waiting


async def test_answers_without_memory_are_refused_and_hold_none(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedonce_server.api.answer_memory.WAIT_SECONDS", 0)
    memory = AnswerMemory()
    with pytest.raises(ApiError) as refused:
        await memory.take(limit + 1)
    assert (refused.value.status, refused.value.code) == (400, "answer_too_large")
    await memory.take(limit)
    with pytest.raises(ApiError) as refused:
        await memory.take(1)
    assert (refused.value.status, refused.value.code) == (503, "overloaded")
    assert refused.value.headers["retry-after"] == "1"
    assert (memory.bytes, len(memory._waiting)) == (limit, 0)


class SlowClient:
    """Sends one request, and reads the parts of the answer one by one."""

    def __init__(self, served: Served, inputs: list[str]) -> None:
        body = json.dumps({"model": "char-ngram", "input": inputs}).encode()
        headers = {"host": "localhost", "content-type": "application/json", "content-length": str(len(body))}
        self.messages: list[Any] = []
        self.reads = asyncio.Semaphore(0)
        self.task = asyncio.create_task(
            served.send("POST", "/v1/embeddings", [body], headers, receiver=self._receive_answer)
        )

    async def _receive_answer(self, message: Any) -> None:
        await self.reads.acquire()
        self.messages.append(message)


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_answers_are_sent_in_parts_that_are_one_body(tmp_path: Path, encoding: str) -> None:
    async with serve(SETTINGS, tmp_path) as server:
        for count in (1, 2, 64, 65, 300):
            answer = await server.embed([f"text {i % 7}" for i in range(count)], encoding_format=encoding)
            assert len(answer.body) == int(answer.headers["content-length"])
            assert len(answer.vectors) == count
            assert server.service.answers.bytes == 0
    assert len(answer.body) > 2 * PART_BYTES


async def test_answers_count_until_the_clients_have_read_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = ["a"] * 300
    async with serve(SETTINGS, tmp_path) as server:
        memory = server.service.answers
        size = len((await server.embed(inputs)).body)
        monkeypatch.setattr("embedonce_server.api.answer_memory.MAX_ANSWERS", int(size * 1.5))
        monkeypatch.setattr("embedonce_server.api.answer_memory.WAIT_SECONDS", 0)
        slow = SlowClient(server, inputs)
        await wait_until_async(lambda: memory.bytes == size)
        refused = await server.embed(inputs)
        assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (503, "overloaded", "1")
        assert (await server.embed("a")).status == 200, "a small answer still fits"
        assert memory.bytes == size
        slow.reads.release()
        slow.reads.release()
        await wait_until_async(lambda: len(slow.messages) == 2)
        await wait_until_async(lambda: size - 2 * PART_BYTES < memory.bytes < size)
        slow.task.cancel()
        await asyncio.wait([slow.task])
        assert memory.bytes == 0
        assert (await server.embed(inputs)).status == 200


async def test_an_answer_that_never_fits_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedonce_server.api.answer_memory.MAX_ANSWERS", 1000)
    async with serve(SETTINGS, tmp_path) as server:
        answer = await server.embed(["a"] * 10)
        assert (answer.status, answer.error["code"]) == (400, "answer_too_large")
        assert server.service.answers.bytes == 0


async def test_a_failure_while_an_answer_is_encoded_leaves_no_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve(SETTINGS, tmp_path) as server:
        encode, calls = server.service.encoded["float"].encode, iter(range(100))

        def fail(vector: Any) -> bytes:
            if next(calls):
                raise MemoryError
            return encode(vector)

        monkeypatch.setattr(server.service.encoded["float"], "encode", fail)
        assert (await server.embed(["a", "b"])).status == 500
        assert server.service.answers.bytes == 0
