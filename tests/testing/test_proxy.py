"""Every fault of the proxy does what its name says, in front of an echo server and of a real Redis."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from embedonce.testing import FaultProxy, NetworkFault
from embedonce.testing.proxy import CAN_SHARE_PORT

FAR = 60.0
SHORT = 0.2


class Echo(socketserver.BaseRequestHandler):
    """Sends back everything that it receives, until the client ends the connection."""

    def handle(self) -> None:
        try:
            while data := self.request.recv(2**16):
                self.server.received.append(data)  # type: ignore[attr-defined]
                self.request.sendall(data)
        except OSError:
            pass


class TcpServer(socketserver.ThreadingTCPServer):
    daemon_threads = True


class UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


@contextmanager
def run_server(server: Any) -> Iterator[Any]:
    server.received = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def echo() -> Iterator[Any]:
    with run_server(TcpServer(("127.0.0.1", 0), Echo)) as server:
        yield server


@pytest.fixture
def proxy(echo: Any) -> Iterator[FaultProxy]:
    with FaultProxy(*echo.server_address) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[socket.socket]:
    with connect(proxy) as client:
        yield client


def connect(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(proxy.address, timeout=FAR)


def ask(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    return read(client, len(data))


def read(client: socket.socket, size: int) -> bytes:
    """Read ``size`` bytes, or fewer if the connection ends."""
    got = b""
    while len(got) < size and (part := client.recv(size - len(got))):
        got += part
    return got


def is_silent(client: socket.socket) -> bool:
    """Return whether nothing arrives for a moment."""
    client.settimeout(SHORT)
    try:
        client.recv(1)
    except TimeoutError:
        return True
    finally:
        client.settimeout(FAR)
    return False


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + FAR
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_without_a_fault_everything_gets_through(proxy: FaultProxy) -> None:
    clients = [connect(proxy) for _ in range(5)]
    large = bytes(range(256)) * 2**13
    for number, client in enumerate(clients):
        assert ask(client, b"%d" % number) == b"%d" % number
        sender = threading.Thread(target=client.sendall, args=(large,))
        sender.start()
        assert read(client, len(large)) == large
        sender.join()
    assert (proxy.accepted, proxy.connections) == (5, 5)
    for client in clients:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        client.close()
    wait_until(lambda: proxy.connections == 0)


def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with run_server(UnixServer(path, Echo)), FaultProxy(path) as proxy, connect(proxy) as client:
        assert ask(client, b"hello") == b"hello"


def test_latency(proxy: FaultProxy, client: socket.socket) -> None:
    proxy.fault = NetworkFault("latency", seconds=FAR * 10)
    client.sendall(b"hello")
    assert is_silent(client)
    proxy.fault = NetworkFault("latency", seconds=0.05)
    start = time.monotonic()
    assert read(client, 5) == b"hello"
    assert ask(client, b"again") == b"again"
    assert time.monotonic() - start >= 0.1


def test_bandwidth_drips(proxy: FaultProxy, client: socket.socket) -> None:
    proxy.fault = NetworkFault("bandwidth", bytes_per_second=40, direction="replies")
    start = time.monotonic()
    client.sendall(b"0123456789")
    assert read(client, 3) == b"012"
    assert time.monotonic() - start >= 0.06
    proxy.heal()
    assert read(client, 7) == b"3456789"


def test_a_black_hole_swallows_and_delivers_late(proxy: FaultProxy, client: socket.socket, echo: Any) -> None:
    proxy.fault = NetworkFault("black_hole")
    with connect(proxy) as another:
        for one in (client, another):
            one.sendall(b"hello")
            assert is_silent(one)
        assert echo.received == []
        proxy.heal()
        for one in (client, another):
            assert read(one, 5) == b"hello"


def test_a_black_hole_in_one_direction(proxy: FaultProxy, client: socket.socket, echo: Any) -> None:
    proxy.fault = NetworkFault("black_hole", direction="replies")
    client.sendall(b"hello")
    wait_until(lambda: echo.received == [b"hello"])
    assert is_silent(client)


def test_refuse(proxy: FaultProxy, client: socket.socket) -> None:
    assert ask(client, b"hello") == b"hello"
    before = proxy.address
    proxy.fault = NetworkFault("refuse")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    if CAN_SHARE_PORT:
        with socket.socket() as another, pytest.raises(OSError, match="in use"):
            another.bind(before)  # no other program can get the port meanwhile
    proxy.heal()
    assert proxy.address == before
    with connect(proxy) as another:
        assert ask(another, b"hello") == b"hello"


def test_reset(proxy: FaultProxy, client: socket.socket) -> None:
    assert ask(client, b"hello") == b"hello"
    proxy.fault = NetworkFault("reset")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with pytest.raises(ConnectionResetError), connect(proxy) as another:
        another.recv(1)
    wait_until(lambda: proxy.connections == 0)


def test_reset_in_mid_reply(proxy: FaultProxy, client: socket.socket) -> None:
    assert ask(client, b"hello") == b"hello"
    proxy.fault = NetworkFault("reset", after=3)
    client.sendall(b"hello")
    with pytest.raises(ConnectionResetError):
        read(client, 5)
    with connect(proxy) as another:
        assert ask(another, b"ab") == b"ab"


@pytest.mark.parametrize("after", [None, 0, 1, 4])
def test_cut_in_mid_reply(proxy: FaultProxy, client: socket.socket, after: int | None) -> None:
    assert ask(client, b"hello") == b"hello"
    proxy.fault = NetworkFault("cut", after=after)
    client.sendall(b"hello")
    assert read(client, 5) == b"hello"[: after or 0]
    with connect(proxy) as another:
        another.sendall(b"world")
        assert read(another, 5) == b"world"[: after or 0]
    proxy.heal()
    with connect(proxy) as another:
        assert ask(another, b"world") == b"world"


def test_garbage(proxy: FaultProxy, client: socket.socket, echo: Any) -> None:
    sent = b"hello" * 20
    proxy.fault = NetworkFault("garbage", after=5)
    got = ask(client, sent)
    assert (got[:5], len(got)) == (b"hello", 100)
    assert got != sent
    assert b"".join(echo.received) == sent
    proxy.heal()
    assert ask(client, sent) == sent


def test_half_open(proxy: FaultProxy, client: socket.socket) -> None:
    assert ask(client, b"hello") == b"hello"
    proxy.fault = NetworkFault("half_open")
    client.sendall(b"anybody there?")
    assert is_silent(client)
    with connect(proxy) as another:
        assert ask(another, b"hello") == b"hello"
    proxy.heal()
    assert is_silent(client)
    client.close()
    wait_until(lambda: proxy.connections == 0)


def test_a_server_that_is_down_shows_as_a_reset() -> None:
    with socket.socket() as down:
        down.bind(("127.0.0.1", 0))  # the socket has the port, but does not listen
        with FaultProxy(*down.getsockname()) as proxy, pytest.raises(ConnectionResetError), connect(proxy) as client:
            client.recv(1)


def test_close_ends_everything(echo: Any) -> None:
    proxy = FaultProxy(*echo.server_address)
    proxy.fault = NetworkFault("black_hole")
    with connect(proxy) as client:
        client.sendall(b"hello")
        proxy.close()
        proxy.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    with pytest.raises(RuntimeError, match="closed"):
        proxy.heal()


def test_many_connections_under_changing_faults(proxy: FaultProxy) -> None:
    """Every reply is what the client sent, or its beginning."""
    faults = [None, *(NetworkFault(kind, after=3, seconds=0.001) for kind in ("latency", "cut", "reset", "half_open"))]
    stop = threading.Event()
    wrong: list[bytes] = []

    def work(number: int) -> None:
        while not stop.is_set():
            sent = b"%d says hello" % number
            try:
                with closing(connect(proxy)) as client:
                    client.settimeout(SHORT)
                    got = ask(client, sent)
            except OSError:
                continue
            if not sent.startswith(got):
                wrong.append(got)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(50):
        proxy.fault = faults[turn % len(faults)]
    stop.set()
    proxy.heal()
    for thread in threads:
        thread.join(FAR)
    assert wrong == []
    with connect(proxy) as client:
        assert ask(client, b"hello") == b"hello"


@pytest.mark.parametrize("kind", ["black_hole", "refuse", "reset", "cut", "garbage", "half_open"])
def test_a_real_redis(redis_server: Any, kind: Any) -> None:
    redis = pytest.importorskip("redis")
    is_silent = kind in ("black_hole", "half_open")
    error = redis.RedisError if kind == "garbage" else redis.TimeoutError if is_silent else redis.ConnectionError
    key = f"embedonce-proxy-{uuid.uuid4()}"
    with FaultProxy("127.0.0.1", redis_server.port) as proxy:
        timeout = SHORT if is_silent else FAR
        client = redis.Redis.from_url(f"redis://{proxy.url_port}/0", socket_timeout=timeout, retry=None)

        def works() -> bool:
            try:
                client.set(key, "1", ex=100)
                return bool(client.get(key) == b"1")
            except redis.TimeoutError:  # a busy machine may take longer
                client.connection_pool.disconnect()
                return False

        try:
            wait_until(works)
            proxy.fault = NetworkFault(kind)
            with pytest.raises(error):
                client.get(key)
            proxy.heal()
            client.connection_pool.disconnect()
            wait_until(works)
        finally:
            client.close()
