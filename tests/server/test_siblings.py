"""Workers that ask each other: erasures, statistics and metrics of all of them, and who is trusted."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import serve_process as processes
import uvicorn
from patience import wait_until, wait_until_async
from prometheus_client.parser import text_string_to_metric_families
from serving import ADMIN_KEY, Answer, Served
from worker_pairs import Worker, serve_workers

from embedonce import Cache
from embedonce_server.connections.http_server import WorkerServer
from embedonce_server.operations import erasures

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}


def settings(folder: Path) -> dict[str, Any]:
    return {
        "provider": {"type": "ngram", "price": "1 USD / 1K tokens"},
        "tiers": [{"type": "memory"}, {"type": "disk", "path": str(folder / "disk")}],
        "serve": {"admin_key": ADMIN_KEY},
    }


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[list[Worker]]:
    async with serve_workers(settings(tmp_path), tmp_path) as workers:
        yield workers


def read_metric(answer: Answer, name: str, **labels: str) -> float:
    """Return the sum of the samples with these labels."""
    assert answer.status == 200
    return sum(
        sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def scrape(worker: Served) -> Answer:
    return await worker.call("GET", "/metrics")


async def test_a_scrape_of_any_worker_shows_an_answer_that_came_before_it(pair: list[Worker]) -> None:
    for expected in range(1, 7):
        asked, scraped = pair[expected % 2], pair[expected // 2 % 2]
        assert (await asked.embed(f"text {expected % 3}")).status == 200
        answer = await scrape(scraped)
        assert read_metric(answer, "embed_serve_requests_total", status="200") == expected
        assert read_metric(answer, "embed_serve_request_seconds_count", endpoint="/v1/embeddings") == expected
        hits = read_metric(answer, "embed_serve_hits_total")
        assert hits + read_metric(answer, "embed_serve_computed_total") == expected
        assert read_metric(answer, "embed_cache_hits_total") == hits
    assert read_metric(await scrape(pair[0]), "embed_cache_misses_total") == 3


async def test_a_killed_worker_keeps_what_it_has_copied_and_is_shown_as_down(pair: list[Worker]) -> None:
    first, second = pair
    await second.embed("a")
    await scrape(first)
    await second.stop_listening()
    answer = await scrape(first)
    assert read_metric(answer, "embed_serve_requests_total") == 1
    assert read_metric(answer, "embed_serve_worker_up", worker="1") == 1
    assert read_metric(answer, "embed_serve_worker_up", worker="2") == 0


async def test_a_worker_copies_its_counters_without_a_scrape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedonce_server.operations.metrics.COPY_SECONDS", 0.001)
    async with serve_workers(settings(tmp_path), tmp_path) as (first, second):
        await second.embed("a")
        copies = 0
        copy = second.app.metrics.copy

        def count_copy() -> None:
            nonlocal copies
            copy()
            copies += 1

        monkeypatch.setattr(second.app.metrics, "copy", count_copy)
        while not copies:
            await asyncio.sleep(0.001)
        await second.stop_listening()
        assert read_metric(await scrape(first), "embed_serve_requests_total") == 1


async def test_forget_clears_the_memory_of_the_other_workers(pair: list[Worker]) -> None:
    for worker in pair:
        await worker.embed(["private", "kept"])
    answer = await pair[0].call("POST", "/admin/forget", {"input": ["private"]}, ADMIN)
    assert (answer.status, answer.json["workers"]) == (200, [1, 2])
    for worker in pair:
        explained = await worker.call("POST", "/admin/explain", {"input": "private"}, ADMIN)
        assert explained.json["tiers"] == {"memory": "miss", "disk": "miss"}
        explained = await worker.call("POST", "/admin/explain", {"input": "kept"}, ADMIN)
        assert explained.json["tiers"] == {"memory": "hit", "disk": "hit"}


async def test_a_text_with_a_lone_surrogate_is_forgotten_in_all_workers(tmp_path: Path) -> None:
    async with serve_workers({**settings(tmp_path), "key": {"normalize": ["surrogates"]}}, tmp_path) as workers:
        for worker in workers:
            await worker.embed("cut \ud83d")
        answer = await workers[0].call("POST", "/admin/forget", {"input": ["cut \ud83d"]}, ADMIN)
        assert (answer.status, answer.json["workers"]) == (200, [1, 2])
        for worker in workers:
            assert (await worker.embed("cut \ud83d", headers={"cache-control": "only-if-cached"})).status == 404


async def test_forget_reaches_vector_spaces_that_only_another_worker_knows(pair: list[Worker]) -> None:
    await pair[1].embed("private", dimensions=64)
    assert (await pair[0].call("POST", "/admin/forget", {"input": "private"}, ADMIN)).status == 200
    answer = await pair[1].embed("private", dimensions=64, headers={"cache-control": "only-if-cached"})
    assert answer.status == 404


async def test_purge_counts_and_clears_the_memory_of_all_workers(pair: list[Worker]) -> None:
    for worker in pair:
        await worker.embed(["a", "b"])
    fields = {"version": "v1"}
    answer = await pair[0].call("POST", "/admin/purge", fields, ADMIN)
    assert answer.json["dry_run"]
    assert answer.json["removed"] == {"memory": 4, "disk": 2}
    answer = await pair[0].call("POST", "/admin/purge", {**fields, "dry_run": False}, ADMIN)
    assert answer.json["removed"] == {"memory": 4, "disk": 2}
    for worker in pair:
        assert (await worker.embed("a", headers={"cache-control": "only-if-cached"})).status == 404


@pytest.mark.parametrize(
    ("path", "fields"), [("forget", {"input": "a"}), ("purge", {"version": "v1", "dry_run": False})]
)
async def test_an_erasure_names_a_worker_that_does_not_answer(
    pair: list[Worker], path: str, fields: dict[str, Any]
) -> None:
    await pair[1].stop_listening()
    answer = await pair[0].call("POST", f"/admin/{path}", fields, ADMIN)
    assert answer.status == 503
    assert answer.error["code"] == "erase_incomplete"
    assert list(answer.error["workers"]) == ["2"]


async def test_stats_add_up_the_workers_and_name_those_that_are_missing(pair: list[Worker]) -> None:
    for worker in pair:
        await worker.embed(["a", "b"])
    stats = (await pair[0].call("GET", "/admin/stats", headers=ADMIN)).json
    assert [worker["worker"] for worker in stats["workers"]] == [1, 2]
    assert (stats["requested"], stats["found"], stats["missing_workers"]) == (4, 2, {})
    assert stats["providers"]["ngram"]["texts"] == 2
    await pair[1].stop_listening()
    stats = (await pair[0].call("GET", "/admin/stats", headers=ADMIN)).json
    assert [worker["worker"] for worker in stats["workers"]] == [1]
    assert list(stats["missing_workers"]) == ["2"]


async def test_a_worker_that_hangs_is_missing_after_the_deadline(pair: list[Worker]) -> None:
    first, second = pair
    await second.stop_listening()
    path = second.service.run.get_socket(2)
    path.unlink()
    released = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await released.wait()
        writer.close()

    async with await asyncio.start_unix_server(hang, str(path)):
        [answer] = await first.service.siblings.call("POST", "/siblings/metrics", timeout=0.01)
        released.set()
    assert answer.error == "no answer within 0.01 s"


async def test_an_erasure_asks_a_worker_that_does_not_answer_only_once(pair: list[Worker]) -> None:
    first, second = pair
    await second.stop_listening()
    path = second.service.run.get_socket(2)
    path.unlink()
    requests: list[bytes] = []

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readline())
        writer.close()

    async with await asyncio.start_unix_server(hang_up, str(path)):
        answer = await first.call("POST", "/admin/forget", {"input": "a"}, ADMIN)
    assert requests == [b"POST /siblings/forget HTTP/1.1\r\n"]
    assert list(answer.error["workers"]) == ["2"]


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200 OK\r\n\r\n", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}"]
)
async def test_an_answer_that_is_cut_off_is_an_error(pair: list[Worker], answer: bytes) -> None:
    first, second = pair
    await second.stop_listening()
    path = second.service.run.get_socket(2)
    path.unlink()

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_unix_server(cut, str(path)):
        [found] = await first.service.siblings.call("POST", "/siblings/metrics", timeout=10.0)
    assert found.error is not None
    assert found.error.startswith("it could not be reached")


def test_counts_of_real_workers_survive_one_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "embedonce.toml").write_text('[provider]\ntype = "ngram"\n\n[[tiers]]\ntype = "memory"\n')
    options = ("--config", "embedonce.toml", "--workers", "2")
    # The variable is for programs that use prometheus_client themselves. The server has a folder of its own.
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "missing")}
    with processes.ServeProcess(*options, folder=tmp_path, env=environment) as server:

        def request(method: str, path: str, body: Any = None) -> processes.Answer:
            connection = server.connect()
            try:
                connection.request(method, path, body and json.dumps(body), {"content-type": "application/json"})
                answer = connection.getresponse()
                return processes.Answer(answer.status, dict(answer.getheaders()), answer.read())
            finally:
                connection.close()

        def count(name: str, **labels: str) -> float:
            answer = request("GET", "/metrics")
            return read_metric(Answer(answer.status, answer.headers, answer.body), name, **labels)

        asked: list[str] = []

        def ask() -> None:
            answer = request("POST", "/v1/embeddings", {"model": "char-ngram", "input": "a"})
            assert answer.status == 200
            asked.append(answer.worker)

        wait_until(lambda: ask() or len(set(asked)) == 2)
        # Each scrape is answered by one of the workers, and shows the requests to both.
        assert [count("embed_serve_requests_total") for _ in range(8)] == [len(asked)] * 8
        server.send_signal(signal.SIGKILL, server.workers[1])
        server.wait_for_log(r"worker 1 \(process \d+\) is ready", times=2)
        ask()
        assert count("embed_serve_requests_total") == len(asked)
        assert count("embed_serve_worker_up") == 2
        assert count("embed_cache_hits_total") + count("embed_cache_misses_total") == len(asked)


async def test_a_worker_can_be_reached_by_others_before_it_answers_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen, seen = uvicorn.Server.startup, []

    async def listen_for_clients(self: WorkerServer, sockets: Any = None) -> None:
        seen.append(self._private is not None and self._private.exists())
        await listen(self, sockets)

    monkeypatch.setattr(uvicorn.Server, "startup", listen_for_clients)
    async with serve_workers(settings(tmp_path), tmp_path):
        assert seen == [True, True]


# --- who is trusted ---------------------------------------------------------------------------

PATHS = ("metrics", "stats", "forget", "purge")


@pytest.mark.parametrize("path", PATHS)
async def test_a_client_cannot_use_the_paths_of_siblings(pair: list[Worker], path: str) -> None:
    socket = str(pair[0].service.run.get_socket(1))
    unknown = await pair[0].call("POST", "/unknown", {}, ADMIN)
    pretences: list[dict[str, str]] = [{}, ADMIN, {"x-forwarded-for": "unix:"}, {"x-forwarded-host": socket}]
    for headers in pretences:
        answer = await pair[0].call("POST", f"/siblings/{path}", {}, headers)
        assert (answer.status, answer.body) == (404, unknown.body)


@pytest.mark.parametrize("server", [None, ("127.0.0.1", None), ("other.sock", None), ("127.0.0.1", 8080)])
async def test_only_the_address_of_the_own_socket_is_trusted(pair: list[Worker], server: Any) -> None:
    siblings = pair[0].service.siblings
    assert not siblings.has_sent({"server": server})
    assert not siblings.has_sent({"server": (str(pair[0].service.run.get_socket(2)), None)})
    assert siblings.has_sent({"server": (str(pair[0].service.run.get_socket(1)), None)})


async def test_only_the_owner_can_open_the_socket(pair: list[Worker]) -> None:
    path = pair[0].service.run.get_socket(1)
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


async def test_the_admin_paths_need_their_key_on_the_socket_too(pair: list[Worker]) -> None:
    [answer] = await pair[0].service.siblings.call("GET", "/admin/stats", timeout=10.0)
    assert answer.error is not None
    assert answer.body["error"]["code"] == "invalid_api_key"


async def test_requests_of_siblings_are_not_counted(pair: list[Worker]) -> None:
    await scrape(pair[0])
    answer = await scrape(pair[0])
    assert read_metric(answer, "embed_serve_request_seconds_count") == 1  # the first scrape
    assert read_metric(answer, "embed_serve_requests_in_progress") == 0


async def test_forget_removes_copies_of_what_a_worker_stored_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve_workers(settings(tmp_path), tmp_path, 3) as (first, second, third):
        models = list(third.service.generation.models)
        forget, has_stored = erasures._forget, asyncio.Event()
        done: list[object] = []

        async def forget_late(base: Cache, erasure: Any) -> Any:
            if erasure.models == models and not has_stored.is_set():
                # The second worker has erased. The third one still stores the text, and the second one copies it.
                await wait_until_async(lambda: len(done) == 2)
                await third.embed("private")
                assert (await second.embed("private")).cache[0] == "hit"
                has_stored.set()
            incomplete = await forget(base, erasure)
            done.append(erasure)
            return incomplete

        monkeypatch.setattr(erasures, "_forget", forget_late)
        answer = await first.call("POST", "/admin/forget", {"input": "private"}, ADMIN)
        assert (answer.status, has_stored.is_set()) == (200, True)
        for worker in (first, second, third):
            assert (await worker.embed("private", headers={"cache-control": "only-if-cached"})).status == 404
