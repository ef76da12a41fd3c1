"""``embedonce serve`` as processes: signals, reloads, several workers, and the end."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import pty
import re
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from patience import LONG_TIMEOUT, wait_until
from serve_process import ServeProcess, read_answer, write_config

from embedonce import config
from embedonce.testing.servers.openai import OpenAIServer

KEYS = [f"key-of-the-search-team-{number}" for number in range(3)]


@pytest.fixture(scope="module")
def upstream() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


@pytest.fixture
def file(tmp_path: Path, upstream: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration without tenants. The server makes its temporary folder beside it."""
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "run"))
    file = tmp_path / "embedonce.toml"
    write_config(file, upstream.base_url)
    return file


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def reach_both_workers(server: ServeProcess, key: str | None = None) -> dict[str, http.client.HTTPConnection]:
    """Return an open connection to each of two workers."""
    connections: dict[str, http.client.HTTPConnection] = {}

    def reach_another() -> bool:
        connection = server.connect()
        answer = server.embed("a", key=key, connection=connection)
        assert answer.status == 200
        if connections.setdefault(answer.worker, connection) is not connection:
            connection.close()
        return len(connections) == 2

    wait_until(reach_another)
    return connections


def list_run_folders(file: Path) -> list[Path]:
    return list((file.parent / "run").iterdir())


def test_one_worker_reloads_and_ends_while_it_answers(file: Path, upstream: OpenAIServer) -> None:
    state = 'state_dir = "state"'
    write_config(file, upstream.base_url, tenants=[("search", KEYS[0])], serve=state)
    with ServeProcess("--config", file, "--access-log", folder=file.parent) as server:
        assert "1 tenant; each request needs a key" in server.log
        assert server.embed("a", key=KEYS[0]).status == 200
        assert "tenant=search" in server.wait_for_log(r".* 200 .*")[0]

        upstream.misbehave("hang")
        waiting = server.embed_later("b", key=KEYS[0])
        upstream.until_hanging()
        write_config(file, upstream.base_url, tenants=[("search", KEYS[1])], serve=state)
        server.send_signal(signal.SIGHUP)
        server.wait_for_log(r"reloaded \[serve\]")
        assert server.embed("a", key=KEYS[0]).status == 401
        assert server.embed("a", key=KEYS[1]).headers["x-embedonce-cache"] == "hit"
        upstream.heal()
        assert waiting.result().status == 200, "it began with the earlier settings"

        write_config(file, upstream.base_url, tenants=[("search", KEYS[2]), ("search", KEYS[1])], serve="port = -1")
        server.send_signal(signal.SIGHUP)
        server.wait_for_log("the reload failed; the previous settings stay in effect")
        assert f"{file.name}:17:8: port = -1 in [serve]: must be at least 0" in server.log
        assert f"{file.name}:22:8: " in server.log
        assert server.embed("a", key=KEYS[1]).status == 200
        assert server.embed("a", key=KEYS[2]).status == 401

        write_config(
            file, upstream.base_url, tenants=[("search", KEYS[2])], tiers='[[tiers]]\ntype = "memory"\n',
            serve='host = "::1"\nstate_dir = "other"\ndrain_timeout = "60s"',
        )  # fmt: skip
        server.send_signal(signal.SIGHUP)
        server.wait_for_log(
            r"\[\[tiers\]\] and host in \[serve\] and state_dir in \[serve\] have changed; restart the server"
        )

        connection = server.connect()
        assert server.embed("a", key=KEYS[2], connection=connection).status == 200
        upstream.misbehave("hang")
        waiting = server.embed_later("c", key=KEYS[2])
        upstream.until_hanging()
        server.send_signal(signal.SIGTERM)
        server.wait_for_log("stopping: waiting up to 60 s for the current requests")
        connection.request("GET", "/health/ready")
        ready = read_answer(connection)
        assert (ready.status, ready.body["status"], ready.headers["connection"]) == (503, "draining", "close")
        connection.close()
        wait_until(lambda: not server.accepts_connections())
        upstream.heal()
        answer = waiting.result()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert server.wait() == 0
        assert not any(key in server.log for key in KEYS)
    assert list_run_folders(file) == []
    assert (file.parent / "state" / "lock").is_file()
    write_config(file, upstream.base_url)
    with config.open(file) as cache:
        found = cache.for_namespace("search").lookup(["a", "b", "c"])
        assert None not in found.sources, "what was queued at the end was written"


def test_two_workers_share_the_port_and_are_replaced_when_they_die(file: Path, upstream: OpenAIServer) -> None:
    with ServeProcess("--config", file, "--workers", "2", folder=file.parent) as server:
        assert "2 workers" in server.log
        assert "tenants:  none; no key needed" in server.log
        server.embed("a")
        connections = reach_both_workers(server)
        before = server.workers
        assert sorted(before) == [1, 2]

        upstream.misbehave("hang", times=2)
        waiting = [server.embed_later(f"of {i}", connection=c) for i, c in enumerate(connections.values())]
        upstream.until_hanging()
        upstream.until_hanging()
        server.send_signal(signal.SIGKILL, before[1])
        server.wait_for_log(rf"worker 1 \(process {before[1]}\) was ended by SIGKILL; starting it again")
        server.wait_for_log(r"worker 1 \(process \d+\) is ready", times=2)
        upstream.heal()
        errors = [future.exception() for future in waiting]
        assert [error is None or isinstance(error, OSError) for error in errors] == [True, True]
        (survivor,) = (future for future, error in zip(waiting, errors, strict=True) if error is None)
        assert survivor.result().status == 200
        for connection in connections.values():
            connection.close()
        assert server.workers[1] != before[1]
        assert server.workers[2] == before[2]

        # A worker that starts later has the settings of the last reload, and the tiers of the start.
        write_config(
            file, upstream.base_url, tenants=[("search", KEYS[0])], tiers='[[tiers]]\ntype = "memory"\n',
            serve='state_dir = "state"',
        )  # fmt: skip
        server.send_signal(signal.SIGHUP)
        server.wait_for_log(r"reloaded \[serve\]")
        server.wait_for_log(r"\[\[tiers\]\] and state_dir in \[serve\] have changed; restart the server")
        file.write_text("[serve")
        server.send_signal(signal.SIGHUP)
        server.wait_for_log("the reload failed; the previous settings stay in effect")
        server.send_signal(signal.SIGTERM, server.workers[2])
        server.wait_for_log(rf"worker 2 \(process {before[2]}\) ended with exit code 0; starting it again")
        server.wait_for_log(r"worker 2 \(process \d+\) is ready", times=2)
        answers = {}
        wait_until(lambda: answers.update({(a := server.embed("a")).worker: a.status}) or len(answers) == 2)
        assert set(answers.values()) == {401}
        server.embed("d", key=KEYS[0])
        server.send_signal(signal.SIGINT)
        assert server.wait() == 130
        assert not any(is_alive(pid) for pid in (*before.values(), *server.workers.values()))
    assert list_run_folders(file) == []
    write_config(file, upstream.base_url)
    with config.open(file) as cache:
        assert cache.for_namespace("search").lookup(["d"]).sources == ["disk"]


def test_all_workers_refuse_a_former_tenant_and_answer_its_current_requests(file: Path, upstream: OpenAIServer) -> None:
    tenants = [("search", KEYS[0]), ("former", KEYS[1])]
    state = 'state_dir = "state"'
    write_config(file, upstream.base_url, tenants=tenants, serve=state)
    with ServeProcess("--config", file, "--workers", "2", folder=file.parent) as server:
        connections = reach_both_workers(server, KEYS[1])
        upstream.misbehave("hang", times=2)
        waiting = [
            server.embed_later(f"of former {i}", key=KEYS[1], connection=connection)
            for i, connection in enumerate(connections.values())
        ]
        upstream.until_hanging()
        upstream.until_hanging()
        write_config(file, upstream.base_url, tenants=tenants[:1], serve=state)
        server.send_signal(signal.SIGHUP)
        server.wait_for_log(r"reloaded \[serve\]")
        refused = reach_both_workers(server, KEYS[0])
        for connection in refused.values():
            answer = server.embed("a", key=KEYS[1], connection=connection)
            assert (answer.status, answer.body["error"]["code"]) == (401, "invalid_api_key")
            connection.close()
        assert not any(one.done() for one in waiting)
        upstream.heal()
        assert [one.result().status for one in waiting] == [200, 200]
        assert {one.result().worker for one in waiting} == set(connections)
        for worker, connection in connections.items():
            answer = server.embed("a", key=KEYS[1], connection=connection)
            assert (answer.status, answer.worker) == (401, worker)
            connection.close()


def test_a_worker_that_hangs_delays_no_reload_and_is_replaced(file: Path, upstream: OpenAIServer) -> None:
    state = 'state_dir = "state"'
    write_config(file, upstream.base_url, tenants=[("search", KEYS[0])], serve=state)
    code = "import embedonce_server.processes.supervisor as s; s.ANSWER_SECONDS = 1.0"
    with ServeProcess("--config", file, "--workers", "2", folder=file.parent, code=code) as server:
        before = server.workers
        server.send_signal(signal.SIGSTOP, before[1])
        write_config(file, upstream.base_url, tenants=[("search", KEYS[1])], serve=state)
        server.send_signal(signal.SIGHUP)
        server.wait_for_log(rf"worker 1 \(process {before[1]}\) has not answered within 1 s; killing it")
        server.wait_for_log(r"reloaded \[serve\]")
        server.wait_for_log(rf"worker 1 \(process {before[1]}\) was ended by SIGKILL; starting it again")
        server.wait_for_log(r"worker 1 \(process \d+\) is ready", times=2)
        for connection in reach_both_workers(server, KEYS[1]).values():
            assert server.embed("a", key=KEYS[0], connection=connection).status == 401
            connection.close()

        # With no worker that answers, the reload follows as soon as one is ready.
        for pid in server.workers.values():
            server.send_signal(signal.SIGSTOP, pid)
        write_config(file, upstream.base_url, tenants=[("search", KEYS[2])], serve=state)
        server.send_signal(signal.SIGHUP)
        server.wait_for_log("the reload follows once a worker has started")
        server.wait_for_log(r"reloaded \[serve\]", times=2)
        wait_until(lambda: not is_alive(before[2]))
        for connection in reach_both_workers(server, KEYS[2]).values():
            assert server.embed("a", key=KEYS[1], connection=connection).status == 401
            connection.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_whose_log_nobody_reads_answers_and_ends(file: Path, workers: int) -> None:
    with ServeProcess("--config", file, "--access-log", "--workers", str(workers), folder=file.parent) as server:
        assert server.process.stderr is not None
        fcntl.fcntl(server.process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        server.may_read.clear()
        with closing(server.connect()) as connection:
            for _ in range(300):  # more lines than the pipe and the reader's buffer hold
                connection.request("GET", "/health/live")
                assert read_answer(connection).status == 200
        server.send_signal(signal.SIGTERM)
        assert server.process.wait(LONG_TIMEOUT) == 0
        assert len(server.lines) < 100


@pytest.mark.parametrize("signals", [1, 2])
def test_a_server_whose_event_loop_is_blocked_ends(file: Path, upstream: OpenAIServer, signals: int) -> None:
    write_config(file, upstream.base_url, serve='drain_timeout = "0s"' if signals == 1 else "")
    code = """
import sys, time
from embedonce_server.processes import lone_worker, worker
async def block(self):
    print("blocked", file=sys.stderr)
    while True:
        time.sleep(1)
lone_worker.LoneWorker.watch = block
worker.END_MARGIN = 0.1
"""
    server = ServeProcess("--config", file, folder=file.parent, code=code)
    try:
        server.wait_for_log("blocked")
        server.send_signal(signal.SIGTERM)
        if signals == 2:
            server.send_signal(signal.SIGINT)
        # Python handles the signals that wait in the order of their numbers.
        assert server.wait() in ([1] if signals == 1 else [128 + signal.SIGTERM, 128 + signal.SIGINT])
    finally:
        server.close()
    assert ("the worker has not ended within drain_timeout; ending it now" in server.log) == (signals == 1)
    assert list_run_folders(file) == []


def test_workers_end_if_their_supervisor_is_killed(file: Path, upstream: OpenAIServer) -> None:
    with ServeProcess("--config", file, "--workers", "2", folder=file.parent) as server:
        upstream.misbehave("hang")
        waiting = server.embed_later("k")
        upstream.until_hanging()
        server.send_signal(signal.SIGKILL)
        server.wait_for_log("the supervisor has ended, so this worker stops", times=2)
        upstream.heal()
        assert waiting.result().status == 200
        assert server.wait() == -signal.SIGKILL
        wait_until(lambda: not any(map(is_alive, server.workers.values())))
    assert list_run_folders(file) == []


@pytest.mark.parametrize(("workers", "first"), [(1, signal.SIGINT), (1, signal.SIGTERM), (2, signal.SIGTERM)])
def test_a_second_signal_ends_the_server_at_once(
    file: Path, upstream: OpenAIServer, workers: int, first: signal.Signals
) -> None:
    with ServeProcess("--config", file, "--workers", str(workers), folder=file.parent) as server:
        upstream.misbehave("hang")
        waiting = server.embed_later(f"second signal {workers} {first.name}")
        upstream.until_hanging()
        server.send_signal(first)
        server.wait_for_log("stopping")
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM
        upstream.heal()
        assert isinstance(waiting.exception(), OSError)
    assert list_run_folders(file) == []


def test_requests_are_cut_off_at_the_drain_timeout(file: Path, upstream: OpenAIServer) -> None:
    write_config(file, upstream.base_url, serve='drain_timeout = "0.1s"')
    with ServeProcess("--config", file, folder=file.parent) as server:
        upstream.misbehave("hang")
        waiting = server.embed_later("cut off")
        upstream.until_hanging()
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        upstream.heal()
        answer = waiting.result()
        assert (answer.status, answer.body["error"]["code"]) == (503, "stopping")
        assert answer.headers["connection"] == "close"
        assert "1 request was cut off, because it took" in server.log
        assert "Traceback" not in server.log


def test_the_server_ends_with_its_terminal(file: Path) -> None:
    ours, theirs = pty.openpty()
    server = ServeProcess("--config", file, folder=file.parent, stdin=theirs)
    os.close(theirs)
    with server:
        os.close(ours)
        server.send_signal(signal.SIGHUP)
        assert server.wait() == 0
        assert "reloaded" not in server.log


def test_one_error_ends_the_start_of_several_workers(file: Path, upstream: OpenAIServer) -> None:
    (file.parent / "vectors").write_text("not a folder")
    server = ServeProcess("--config", file, "--workers", "3", folder=file.parent)
    assert server.wait() == 2
    assert server.log.count("error: ") == 1
    assert "vectors" in server.log
    assert "listening" not in server.log
    assert list_run_folders(file) == []


def test_a_worker_that_hangs_while_it_starts_is_killed(file: Path) -> None:
    code = "import embedonce_server.processes.supervisor as s; s.START_SECONDS = 0.01"
    server = ServeProcess("--config", file, "--workers", "2", folder=file.parent, code=code)
    assert server.wait() == 2
    assert re.search(r"worker \d \(process \d+\) has not answered within 0.01 s; killing it", server.log)
    assert re.search(r"error: worker \d was ended by SIGKILL before it was ready", server.log)
    assert list_run_folders(file) == []


def test_tenants_of_two_servers_need_two_state_folders(file: Path, upstream: OpenAIServer) -> None:
    write_config(file, upstream.base_url, tenants=[("search", KEYS[0])], serve='state_dir = "state"')
    with ServeProcess("--config", file, folder=file.parent):
        other = ServeProcess("--config", file, folder=file.parent)
        assert other.wait() == 1
        assert "set another state_dir" in other.log


def test_the_default_configuration_is_served_without_a_file(tmp_path: Path) -> None:
    with ServeProcess(folder=tmp_path) as server:
        assert "No configuration found: using a memory tier, a disk tier in your cache folder," in server.log
        connection = server.connect()
        body = json.dumps({"model": "char-ngram", "input": "a"})
        connection.request("POST", "/v1/embeddings", body, {"content-type": "application/json"})
        assert read_answer(connection).status == 200
        connection.close()
