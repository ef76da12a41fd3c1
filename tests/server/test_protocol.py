"""Connections are bounded in bytes, time and number, and HTTP/1.1 that is not clear is refused."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patience import wait_until
from raw_http import PATIENT, Client, SmallApp, ThreadedServer, make_request, run_server
from uvicorn import Config

from embedonce_server.api.answer_memory import MAX_ANSWERS, WAIT_SECONDS
from embedonce_server.api.incoming import MAX_BODIES
from embedonce_server.connections.protocol import BoundedProtocol, Limits, Phase, WorkerState

SHORT = 0.05
"""Seconds of a time limit that a test waits for."""


@pytest.fixture(scope="module")
def shared() -> Iterator[ThreadedServer]:
    with run_server() as server:
        yield server


@pytest.fixture
def client(shared: ThreadedServer) -> Iterator[Client]:
    with shared.connect() as client:
        yield client


def read_error(client: Client) -> tuple[int, str]:
    """Return the status and the code of an error, after which the connection must end."""
    status, headers, body = client.read_answer()
    assert headers["connection"] == "close"
    error = json.loads(body)["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert client.read_to_end() == b""
    return status, error["code"]


# --- what must work -----------------------------------------------------------------------------


def test_one_connection_answers_many_requests(client: Client) -> None:
    for number in range(3):
        client.send(make_request("POST", "/echo", "content-length: 3", body=b"ab%d" % number))
        status, headers, body = client.read_answer()
        assert (status, body) == (200, b"ab%d" % number)
        assert "connection" not in headers


@pytest.mark.parametrize("size", [0, 1, 8191, 8192, 8193, 300_000])
def test_bodies_of_every_size_arrive_whole(client: Client, size: int) -> None:
    body = bytes(i % 251 for i in range(size))
    client.send(make_request("POST", "/echo", f"content-length: {size}", body=body))
    assert client.read_answer()[2] == body


def test_a_chunked_body_arrives_whole_and_its_trailers_are_no_headers(client: Client, shared: ThreadedServer) -> None:
    client.send(make_request("POST", "/echo", "transfer-encoding: chunked"))
    client.send(b"3;name=value\r\nabc\r\n2\r\nde\r\n0\r\nauthorization: Bearer x\r\n\r\n")
    assert client.read_answer()[2] == b"abcde"
    assert [name for name, _ in shared.app.scopes[-1]["headers"]] == [b"host", b"transfer-encoding"]


def test_pipelined_requests_are_answered_in_order(client: Client) -> None:
    count = 3000
    requests = b"".join(make_request("POST", "/echo", "content-length: 6", body=b"%06d" % i) for i in range(count))
    client.send(requests)
    assert [client.read_answer()[2] for _ in range(count)] == [b"%06d" % i for i in range(count)]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_requests_are_understood_however_their_bytes_arrive(shared: ThreadedServer, data: st.DataObject) -> None:
    bodies = data.draw(
        st.lists(st.binary(max_size=40) | st.binary(min_size=9000, max_size=9000), min_size=1, max_size=5)
    )
    upgrade = ("connection: upgrade", "upgrade: h2c")
    requests = b""
    for content in bodies:
        extra = upgrade if data.draw(st.booleans()) else ()
        if data.draw(st.booleans()):
            chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (content[:7], content[7:]) if part)
            requests += make_request("POST", "/echo", "transfer-encoding: chunked", *extra, body=chunks + b"0\r\n\r\n")
        else:
            requests += make_request("POST", "/echo", f"content-length: {len(content)}", *extra, body=content)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(requests)), max_size=6)))
    with shared.connect() as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start, end in zip([0, *cuts], [*cuts, len(requests)], strict=True):
            client.send(requests[start:end])
        assert [client.read_answer()[2] for _ in bodies] == bodies


def test_few_pipelined_requests_are_in_memory_while_the_first_is_answered(shared: ThreadedServer) -> None:
    with shared.connect() as client:
        shared.app.release.clear()
        client.get("/hold")
        wait_until(lambda: shared.app.holding == 1)
        (connection,) = (c for c in list(shared.server.state.connections) if c.client == client.socket.getsockname())
        client.socket.settimeout(0.2)
        client.send_until_refused(make_request("GET", "/") * 1000, 1000)  # 40 MB
        assert 0 < len(connection.pipeline) < 500
        assert len(connection._held) < 1 << 20
        client.socket.settimeout(60)
        shared.app.release.set()
        assert [client.read_answer()[2] for _ in range(10)] == [b"ok"] * 10


def test_a_request_for_another_protocol_is_answered_as_any_other(client: Client) -> None:
    upgrade = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAoAAAAAIAAAAA")
    first = make_request("POST", "/echo", *upgrade, "content-length: 3", body=b"abc")
    websocket = make_request("GET", "/", "connection: upgrade", "upgrade: websocket", "sec-websocket-version: 13")
    client.send(first + websocket + make_request("POST", "/echo", "content-length: 1", body=b"d"))
    assert [client.read_answer()[2] for _ in range(3)] == [b"abc", b"ok", b"d"]


def test_data_after_a_request_that_closes_the_connection_are_ignored(client: Client) -> None:
    client.send(make_request("GET", "/", "connection: close") + make_request("GET", "/"))
    status, headers, _ = client.read_answer()
    assert (status, headers["connection"]) == (200, "close")
    assert client.read_to_end() == b""


def test_a_client_may_ask_before_it_sends_the_body(client: Client) -> None:
    client.send(make_request("POST", "/echo", "content-length: 3", "expect: 100-continue"))
    assert client.read_answer()[0] == 100
    client.send(b"abc")
    assert client.read_answer()[2] == b"abc"
    client.get("/")
    assert client.read_answer()[0] == 200


def test_a_connection_ends_if_the_client_asked_and_is_refused(client: Client) -> None:
    """Otherwise the next request could be taken for the body that was not sent."""
    client.send(make_request("POST", "/early", "content-length: 3", "expect: 100-continue"))
    assert client.read_answer()[0] == 413
    assert client.read_to_end() == b""


def test_a_connection_stays_open_if_a_refused_body_arrives_soon(client: Client) -> None:
    client.send(make_request("POST", "/early", "content-length: 3"))
    assert client.read_answer()[0] == 413
    client.send(b"abc" + make_request("GET", "/"))
    assert client.read_answer()[0] == 200


def test_curl_sends_large_bodies(shared: ThreadedServer, tmp_path: Path) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    (tmp_path / "body").write_bytes(b"x" * 2_000_000)
    url = "http://{}:{}/echo".format(*shared.place)
    expect = ["-H", "expect: 100-continue"]
    done = subprocess.run(
        [curl, "-sS", "--data-binary", f"@{tmp_path}/body", *expect, "-o", tmp_path / "answer", url], check=True
    )
    assert done.returncode == 0
    assert (tmp_path / "answer").read_bytes() == b"x" * 2_000_000


def test_the_application_hears_that_a_client_is_gone(shared: ThreadedServer) -> None:
    before, listening = shared.app.disconnected, shared.app.listening
    with shared.connect() as client:
        client.get("/gone")
        wait_until(lambda: shared.app.listening == listening + 1)
    wait_until(lambda: shared.app.disconnected == before + 1)


# --- requests that are not clear ----------------------------------------------------------------

UNCLEAR = {
    "content-length and transfer-encoding": make_request(
        "POST", "/echo", "content-length: 4", "transfer-encoding: chunked", body=b"0\r\n\r\n"
    ),
    "transfer-encoding and content-length": make_request(
        "POST", "/echo", "transfer-encoding: chunked", "content-length: 4", body=b"0\r\n\r\n"
    ),
    "two lengths": make_request("POST", "/echo", "content-length: 3", "content-length: 4", body=b"abcd"),
    "one length twice": make_request("POST", "/echo", "content-length: 3", "content-length: 3", body=b"abc"),
    "a list of lengths": make_request("POST", "/echo", "content-length: 3, 3", body=b"abc"),
    "a negative length": make_request("POST", "/echo", "content-length: -3", body=b"abc"),
    "a length with a sign": make_request("POST", "/echo", "content-length: +3", body=b"abc"),
    "a length that is too large": make_request("POST", "/echo", f"content-length: {2**64}", body=b"abc"),
    "an unknown transfer-encoding": make_request("POST", "/echo", "transfer-encoding: xchunked", body=b"0\r\n\r\n"),
    "chunked is not the last": make_request("POST", "/echo", "transfer-encoding: chunked, gzip", body=b"0\r\n\r\n"),
    "bare line feeds": b"GET / HTTP/1.1\nhost: x\n\n",
    "a bare line feed in the headers": b"GET / HTTP/1.1\r\nhost: x\nother: y\r\n\r\n",
    "a bare carriage return": b"GET / HTTP/1.1\r\nhost: x\rother: y\r\n\r\n",
    "a folded header": b"GET / HTTP/1.1\r\nhost: x\r\nother: y\r\n z\r\n\r\n",
    "a NUL in a value": b"GET / HTTP/1.1\r\nhost: x\x00y\r\n\r\n",
    "a NUL in a name": b"GET / HTTP/1.1\r\nho\x00st: x\r\n\r\n",
    "a space before the colon": b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length : 3\r\n\r\nabc",
    "a space before a name": b"GET / HTTP/1.1\r\n host: x\r\n\r\n",
    "a chunk's size with a sign": make_request("POST", "/echo", "transfer-encoding: chunked", body=b"+3\r\nabc\r\n"),
    "a chunk without its end": make_request("POST", "/echo", "transfer-encoding: chunked", body=b"3\r\nabcX\r\n"),
    "a chunk with a bare line feed": make_request("POST", "/echo", "transfer-encoding: chunked", body=b"3\nabc\r\n"),
    "a tunnel": b"CONNECT example.com:443 HTTP/1.1\r\nhost: x\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "another version": b"GET / HTTP/3.7\r\nhost: x\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + b"\x00" * 64,
    "bytes beyond ASCII in the path": b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
    "no path": b"GET  HTTP/1.1\r\nhost: x\r\n\r\n",
}


@pytest.mark.parametrize("request_", UNCLEAR.values(), ids=UNCLEAR)
def test_a_request_that_is_not_clear_is_refused(client: Client, request_: bytes) -> None:
    client.send(request_ + make_request("GET", "/"))
    assert read_error(client) == (400, "invalid_http")


def test_an_invalid_request_is_refused_after_the_answers_to_earlier_ones(shared: ThreadedServer) -> None:
    with shared.connect() as client:
        shared.app.release.clear()
        client.send(make_request("GET", "/hold") + make_request("GET", "/") + b"\x00\r\n\r\n")
        wait_until(lambda: shared.app.holding == 1)
        client.get("/")  # discarded
        shared.app.release.set()
        assert [client.read_answer()[2] for _ in range(2)] == [b"ok", b"ok"]
        assert read_error(client) == (400, "invalid_http")


def test_a_queued_request_whose_body_is_invalid_is_refused_in_its_turn(shared: ThreadedServer) -> None:
    with shared.connect() as client:
        shared.app.release.clear()
        client.send(make_request("GET", "/hold") + make_request("POST", "/echo", "transfer-encoding: chunked"))
        client.send(b"zz\r\n")
        wait_until(lambda: shared.app.holding == 1)
        shared.app.release.set()
        assert client.read_answer()[2] == b"ok"
        assert read_error(client) == (400, "invalid_http")


# --- size ---------------------------------------------------------------------------------------


def test_unfinished_headers_are_refused(client: Client, shared: ThreadedServer) -> None:
    client.send(b"GET / HTTP/1.1\r\nhost: x\r\nlong: ")
    client.send_until_refused(b"x" * 100_000, 100)
    assert shared.server.state.refused["headers_too_large"] > 0
    # So much data may follow that the connection is reset before the client reads the answer.
    assert client.read_to_end()[:13] in (b"HTTP/1.1 431 ", b"")


@pytest.mark.parametrize("size", [60_000, 64_000])
def test_headers_just_below_the_limit_are_accepted(client: Client, size: int) -> None:
    client.get("/", f"long: {'x' * size}")
    assert client.read_answer()[0] == 200


@pytest.mark.parametrize("size", [65_536, 70_000, 80_000])
def test_headers_beyond_the_limit_are_refused(client: Client, size: int) -> None:
    client.get("/", f"long: {'x' * size}")
    assert read_error(client) == (431, "headers_too_large")


def test_many_headers_are_refused(client: Client) -> None:
    client.get("/", *(f"a{i}: b" for i in range(99)))
    assert client.read_answer()[0] == 200
    client.get("/", *(f"a{i}: b" for i in range(100)))
    assert read_error(client) == (431, "too_many_headers")


@pytest.mark.parametrize("size", [8193, 100_000])
def test_a_long_path_is_refused(client: Client, size: int) -> None:
    client.get("/" + "x" * (size - 1))
    assert read_error(client) == (414, "target_too_long")


def test_a_path_just_below_the_limit_is_accepted(client: Client) -> None:
    client.get("/" + "x" * 8191)
    assert client.read_answer()[0] == 200


@pytest.mark.parametrize(
    "flood", [b"1;" + b"x" * 100_000, b"0\r\n" + b"name: value\r\n" * 10_000, b"0\r\nname: " + b"x" * 100_000]
)
def test_a_body_with_much_that_is_not_content_is_refused(client: Client, flood: bytes) -> None:
    """Names of chunks and trailers have no place in the size of the body, which the application bounds."""
    client.send(make_request("POST", "/echo", "transfer-encoding: chunked") + flood)
    assert read_error(client) == (400, "overhead_too_large")


def test_the_page_has_the_limits() -> None:
    page = (Path(__file__).parents[2] / "docs/serve.md").read_text().partition("### Limits of connections")[2]
    limits = Limits()
    for row in (
        f"| connections per worker | {limits.connections:,} |",
        f"| path and query | {limits.target // 1024} KiB |",
        f"| headers | {limits.head // 1024} KiB in all, {limits.headers} headers |",
        f"| time until the headers are complete | {limits.head_seconds:g} s |",
        f"| time until the body is complete | {limits.body_seconds:g} s |",
        f"| pause in a body | {limits.pause_seconds:g} s |",
        f"| time without progress while a client does not read its answer | {limits.unread_seconds:g} s |",
        f"| time between two requests on a connection | {limits.idle_seconds:g} s |",
        f"| bytes of a chunked body between two parts of its content | {limits.head // 1024} KiB |",
        f"| bytes of bodies in memory per worker | {MAX_BODIES >> 20} MiB |",
        f"{MAX_ANSWERS >> 20} MiB; an answer waits up to {WAIT_SECONDS:g} s |",
    ):
        assert row in page


# --- time ---------------------------------------------------------------------------------------


def test_slow_headers_are_refused() -> None:
    with run_server(replace(PATIENT, head_seconds=SHORT)) as server, server.connect() as client:
        client.send(b"GET / HTTP/1.1\r\nhost:")
        assert read_error(client) == (408, "slow_headers")


def test_headers_that_keep_arriving_slowly_are_refused() -> None:
    with run_server(replace(PATIENT, head_seconds=SHORT)) as server, server.connect() as client:
        client.send(b"GET / HTTP/1.1\r\n")
        client.send_until_refused(b"a: b\r\n", 3)
        assert read_error(client) == (408, "slow_headers")


def test_a_connection_without_a_request_ends() -> None:
    with run_server(replace(PATIENT, head_seconds=SHORT)) as server, server.connect() as client:
        assert client.read_to_end() == b""


def test_an_idle_connection_ends() -> None:
    with run_server(replace(PATIENT, idle_seconds=SHORT)) as server, server.connect() as client:
        client.get("/")
        assert client.read_answer()[0] == 200
        assert client.read_to_end() == b""


@pytest.mark.parametrize("limit", ["body_seconds", "pause_seconds"])
def test_a_slow_body_is_refused_and_the_application_hears_that(limit: str) -> None:
    with run_server(replace(PATIENT, **{limit: SHORT})) as server, server.connect() as client:
        client.send(make_request("POST", "/echo", "content-length: 10", body=b"abc"))
        assert read_error(client) == (408, "slow_body")
        wait_until(lambda: server.app.disconnected == 1)


def test_a_body_that_arrives_after_its_answer_is_not_awaited_for_long() -> None:
    with run_server(replace(PATIENT, discard_seconds=SHORT)) as server, server.connect() as client:
        client.send(make_request("POST", "/early", "content-length: 10", body=b"abc"))
        assert client.read_answer()[0] == 413
        assert client.read_to_end() == b""


def test_time_does_not_count_while_the_server_does_not_read() -> None:
    """The client waits for the server then, not the server for the client."""
    with run_server(replace(PATIENT, head_seconds=SHORT, pause_seconds=SHORT)) as server, server.connect() as client:
        client.send(make_request("GET", "/hold") + make_request("GET", "/") + b"GET / HTTP/1.1\r\n")
        wait_until(lambda: server.app.holding == 1)
        loops = 3 * SHORT / server.server.state.limits.sweep_seconds
        sweeps = server.server.sweeps
        wait_until(lambda: server.server.sweeps > sweeps + loops)
        server.app.release.set()
        assert client.read_answer()[0] == 200
        assert client.read_answer()[0] == 200
        client.send(b"host: x\r\n\r\n")
        assert client.read_answer()[0] == 200


def test_a_client_that_does_not_read_its_answer_is_dropped() -> None:
    with run_server(replace(PATIENT, unread_seconds=SHORT)) as server, server.connect() as client:
        client.get("/big/50000000")
        wait_until(lambda: server.server.state.refused["unread_answer"] == 1)
        server.wait_for_connections(0)


def test_a_client_that_reads_slowly_keeps_its_connection() -> None:
    class Transport:
        unread = 0
        is_aborted = False

        def get_extra_info(self, name: str, default: object = None) -> object:
            return default

        def get_write_buffer_size(self) -> int:
            return self.unread

        def is_closing(self) -> bool:
            return False

        def abort(self) -> None:
            self.is_aborted = True

    loop = asyncio.new_event_loop()
    config = Config(SmallApp(), ws="none", lifespan="off", interface="asgi3", log_config=None)
    connection = BoundedProtocol(config, WorkerState(replace(PATIENT, unread_seconds=30.0)), {}, loop)
    transport: Any = Transport()
    connection.connection_made(transport)
    connection._phase = Phase.ANSWER
    for second, unread in enumerate([900, 500, 499, 499, 300, 0, 500, 500, 500]):
        transport.unread = unread
        connection.check_time(20.0 * second, 20.0)
        assert not transport.is_aborted or second == 8
    assert transport.is_aborted, "it has read nothing for 40 seconds"
    transport.is_aborted, transport.unread = False, 500
    for second in range(10, 20):  # the answer comes in parts, and the client reads each of them
        connection.pause_writing()
        connection.resume_writing()
        connection.check_time(20.0 * second, 20.0)
    assert not transport.is_aborted
    connection.pause_writing()
    for second in range(20, 23):
        connection.check_time(20.0 * second, 20.0)
    assert transport.is_aborted
    loop.close()


def test_a_client_that_reads_no_answers_to_pipelined_requests_is_dropped() -> None:
    with run_server(replace(PATIENT, unread_seconds=SHORT)) as server, server.connect() as client:
        client.socket.settimeout(0.2)
        client.send_until_refused(make_request("GET", "/big/100000") * 100, 10)
        wait_until(lambda: server.server.state.refused["unread_answer"] == 1)
        server.wait_for_connections(0)


# --- number -------------------------------------------------------------------------------------


def test_connections_beyond_the_limit_are_refused(tmp_path: Path) -> None:
    private = tmp_path / "private.sock"
    with run_server(replace(PATIENT, connections=2), private) as server:
        with server.connect() as first, server.connect():
            server.wait_for_connections(2)
            with server.connect() as third, Client(str(private)) as sibling:
                sibling.get("/")
                assert sibling.read_answer()[0] == 200, "other workers can always connect"
                third.get("/")
                status, headers, body = third.read_answer()
                assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
                assert json.loads(body)["error"]["code"] == "too_many_connections"
            first.get("/")
            assert first.read_answer()[0] == 200
        server.wait_for_connections(0)
        with server.connect() as fourth:
            fourth.get("/")
            assert fourth.read_answer()[0] == 200


def test_very_many_connections_are_dropped_at_once() -> None:
    with run_server(replace(PATIENT, connections=1)) as server:
        clients = [server.connect() for _ in range(2)]
        server.wait_for_connections(2)
        with server.connect() as surplus:
            assert surplus.read_to_end() == b""
        for client in clients:
            client.socket.close()


# --- the drain ----------------------------------------------------------------------------------


def test_a_drain_answers_what_is_under_way_and_closes_the_connections() -> None:
    with run_server() as server:
        with server.connect() as held, server.connect() as begun, server.connect() as idle:
            held.get("/hold")
            begun.send(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nab")
            idle.get("/")
            assert idle.read_answer()[0] == 200
            wait_until(lambda: server.app.holding == 1 and len(server.app.scopes) == 3)
            server.begin_drain(60.0)
            wait_until(lambda: server.server.state.is_draining)
            idle.get("/")  # an idle connection stays open as long as another request is under way
            status, headers, _ = idle.read_answer()
            assert (status, headers["connection"]) == (200, "close")
            begun.send(b"c")
            status, headers, body = begun.read_answer()
            assert (status, body) == (200, b"abc")
            server.app.release.set()
            status, headers, _ = held.read_answer()
            assert (status, headers["connection"]) == (200, "close")
        server.join()
        with pytest.raises(ConnectionRefusedError):
            server.connect()


def test_a_drain_cuts_off_requests_at_its_deadline(caplog: pytest.LogCaptureFixture) -> None:
    with run_server() as server, server.connect() as client:
        client.get("/hold")
        wait_until(lambda: server.app.holding == 1)
        server.begin_drain(0.05)
        server.join()
        assert server.app.cancelled == 1
        assert client.read_to_end()[:13] in (b"", b"HTTP/1.1 500 ")
        assert "1 request was cut off, because it took" in caplog.text


def test_the_private_socket_is_for_this_user_only(tmp_path: Path) -> None:
    private = tmp_path / "private.sock"
    with run_server(private=private):
        assert private.stat().st_mode & 0o777 == 0o600
