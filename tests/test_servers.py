"""The servers that the tests start answer, come back after a crash, and do not outlive the tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from servers import (
    HOST,
    MemcachedServer,
    PostgresServer,
    RedisClusterServers,
    RedisSentinelServers,
    RedisServer,
    find_free_port,
    find_program,
    send_memcached_line,
    wait_until,
)


def test_no_port_is_returned_twice() -> None:
    assert len({find_free_port() for _ in range(100)}) == 100


def test_redis_answers(redis_server: RedisServer) -> None:
    assert redis_server.call("PING")


def test_redis_comes_back_on_its_port() -> None:
    with RedisServer() as server:
        port = server.port
        server.kill()
        with pytest.raises(ConnectionError):
            server.call("PING")
        server.restart()
        assert (server.port, server.call("PING")) == (port, True)


def test_a_cluster_has_three_masters(redis_cluster: RedisClusterServers) -> None:
    assert redis_cluster.is_complete()
    assert len(redis_cluster.members) == 3


def test_sentinels_name_the_master(redis_sentinel: RedisSentinelServers) -> None:
    assert redis_sentinel.master_port() == redis_sentinel.master.port


def test_postgres_has_pgvector(postgres_server: PostgresServer) -> None:
    found = postgres_server.call("SELECT count(*) FROM pg_available_extensions WHERE name = 'vector'")
    assert found == "1"


def test_postgres_comes_back_with_its_rows() -> None:
    with PostgresServer() as server:
        server.call("CREATE TABLE kept (x int); INSERT INTO kept VALUES (7)")
        server.kill()
        server.restart()
        assert server.call("SELECT x FROM kept") == "7"


def test_two_memcached_answer(memcached_servers: list[str]) -> None:
    answers = [send_memcached_line(address, "version") for address in memcached_servers]
    assert all(answer.startswith("VERSION") for answer in answers)
    assert len(memcached_servers) >= 1


def test_a_paused_server_accepts_and_is_silent() -> None:
    with MemcachedServer() as server:
        server.pause()
        with socket.create_connection((HOST, server.port), timeout=0.2) as connection:
            connection.sendall(b"version\r\n")
            with pytest.raises(TimeoutError):
                connection.recv(1)
        server.resume()
        assert server.call("version").startswith("VERSION")


def test_no_server_outlives_tests_that_were_killed() -> None:
    find_program("redis-server")
    code = (
        "import sys, time; from servers import RedisServer; server = RedisServer().start();"
        " print(server.process.pid, server.folder, flush=True); time.sleep(600)"
    )
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert child.stdout is not None
        pid, folder = child.stdout.readline().split()
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    wait_until(lambda: not Path(folder).exists() and not _runs(int(pid)), "the server is gone")


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
