"""The stores of the fault matrix: real servers behind proxies, and how each fault is injected."""

from __future__ import annotations

import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

from faults.cells import FACES, FAULTS, OPERATIONS, Cell, StoreFault
from servers import (
    HOST,
    START_TIMEOUT,
    MemcachedServer,
    PostgresServer,
    RedisClusterServers,
    RedisSentinelServers,
    RedisServer,
    SentinelServer,
    wait_until,
)

from embedonce.contracts import Backend
from embedonce.testing import FaultProxy, NetworkFault

PASSWORD = "right"

NETWORK: Mapping[str, NetworkFault] = {
    "refused": NetworkFault("refuse"),
    "black hole": NetworkFault("black_hole"),
    "slow": NetworkFault("bandwidth", bytes_per_second=5, direction="replies"),
    "reset mid-reply": NetworkFault("reset", after=3),
    "garbage": NetworkFault("garbage"),
}
NETWORK_METHODS: Mapping[str, str] = {
    "refused": "connecting is refused, and connections are reset",
    "black hole": "nothing gets through, and connections stay open",
    "slow": "replies arrive one byte at a time",
    "reset mid-reply": "each connection is reset after three bytes of a reply",
    "garbage": "replies are random bytes",
}


def causes(*names: str) -> frozenset[str]:
    return frozenset(names)


NO_CAUSES = causes()


def make_network_faults(
    *, ended: frozenset[str], silent: frozenset[str], garbled: frozenset[str]
) -> dict[str, StoreFault]:
    """Return the network faults.

    Each argument holds the possible causes of the errors on one kind of connection. For example, ``ended`` holds the
    causes for a connection that has ended.
    """
    causes_by_fault = (ended, silent, silent, ended, garbled)
    return {
        fault: StoreFault(method, of)
        for (fault, method), of in zip(NETWORK_METHODS.items(), causes_by_fault, strict=True)
    }


class ServerStore:
    """A store of one or more servers, each behind its own proxy."""

    name: ClassVar[str]
    faults: ClassVar[Mapping[str, StoreFault]]
    not_applicable: ClassVar[Mapping[str, str]] = {}
    separate_nodes: ClassVar[int] = 1

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.proxies: list[FaultProxy] = []

    def close(self) -> None:
        self.stack.close()

    def add_proxy(self, port: int) -> FaultProxy:
        proxy = self.stack.enter_context(FaultProxy(HOST, port))
        self.proxies.append(proxy)
        return proxy

    def backend(self, fault: str) -> Backend:
        raise NotImplementedError

    @contextmanager
    def inject(self, fault: str) -> Iterator[None]:
        if fault in NETWORK:
            with self.set_network_fault(NETWORK[fault]):
                yield
        else:
            with getattr(self, fault.replace(" ", "_").replace("-", "_"))():
                yield

    @contextmanager
    def set_network_fault(self, fault: NetworkFault) -> Iterator[None]:
        for proxy in self.proxies:
            proxy.fault = fault
        try:
            yield
        finally:
            for proxy in self.proxies:
                proxy.heal()

    @contextmanager
    def kill(self, *servers: Any) -> Iterator[None]:
        for server in servers:
            server.kill()
        try:
            yield
        finally:
            for server in servers:
                server.restart()


# --- Redis --------------------------------------------------------------------------------------

CONNECTION_ENDED = causes("ConnectionError", "ConnectionResetError")
"""Possible causes of the error after a connection ends. Either redis-py or the socket raises this error."""


def make_redis_faults(ended: frozenset[str]) -> dict[str, StoreFault]:
    """Return the faults of Redis. ``ended`` contains the possible causes of the error after a connection ends."""
    return {
        # Random bytes may look like the beginning of a reply. Then the client waits for the rest of that reply.
        **make_network_faults(
            ended=ended, silent=causes("timeout"), garbled=causes("InvalidResponse", "timeout") | ended
        ),
        "killed and restarted": StoreFault("kill -9, then started again, empty", ended, is_repeatable=False),
        "out of memory or disk full": StoreFault("`maxmemory 1` without eviction", causes("OOM"), read="serves"),
        "read-only": StoreFault("the server is made a replica", causes("READONLY"), read="serves"),
        "wrong password": StoreFault("the password is changed and connections are ended", ended | causes("WRONGPASS")),
        "evicting": StoreFault(
            "`maxmemory` with `allkeys-random`, and other clients write", NO_CAUSES, read="forgets", write="serves"
        ),
    }


class Redis(ServerStore):
    """One Redis server."""

    name = "redis"
    faults: ClassVar[Mapping[str, StoreFault]] = make_redis_faults(CONNECTION_ENDED)

    def __init__(self) -> None:
        super().__init__()
        self.start()

    def start(self) -> None:
        self.server: Any = self.stack.enter_context(RedisServer(password=PASSWORD))
        self.nodes: list[Any] = [self.server]
        self.proxy = self.add_proxy(self.server.port)

    def backend(self, fault: str) -> Backend:
        from embedonce_backends.redis import RedisBackend

        return RedisBackend(url=self.url(fault))

    def url(self, fault: str) -> str:
        address = self.server.address if fault == "killed and restarted" else self.proxy.url_port
        return f"redis://:{PASSWORD}@{address}/0"

    def killed_and_restarted(self) -> Any:
        return self.kill(self.server)

    def change_settings(self, **settings: str) -> Any:
        return change_settings(self.nodes, settings)

    def out_of_memory_or_disk_full(self) -> Any:
        return self.change_settings(maxmemory="1")

    @contextmanager
    def read_only(self) -> Iterator[None]:
        self.server.call("REPLICAOF", HOST, "1")
        try:
            yield
        finally:
            self.server.call("REPLICAOF", "NO", "ONE")

    @contextmanager
    def wrong_password(self) -> Iterator[None]:
        for node in self.nodes:
            node.call("CONFIG", "SET", "requirepass", "other")
            node.password = "other"
            node.call("CLIENT", "KILL", "TYPE", "normal")
        try:
            yield
        finally:
            for node in self.nodes:
                node.call("CONFIG", "SET", "requirepass", PASSWORD)
                node.password = PASSWORD

    @contextmanager
    def evicting(self) -> Iterator[None]:
        limits = [(node, int(node.call("INFO", "memory")["used_memory"]) + 100_000) for node in self.nodes]
        with ExitStack() as stack:
            for node, limit in limits:
                settings = {"maxmemory": str(limit), "maxmemory-policy": "allkeys-random"}
                stack.enter_context(change_settings([node], settings))
                fill_redis(node)
            yield


def fill_redis(node: Any) -> None:
    """Write to a Redis server until it has evicted more than 1,000 keys."""
    import redis

    with redis.Redis(host=HOST, port=node.port, password=node.password, protocol=2) as client:
        # A cluster node accepts only the keys of its own slots, so all keys have a hash tag of one of these slots.
        tag = next(tag for tag in map(str, range(10_000)) if owns_slot_of(client, tag))
        with client.pipeline(transaction=False) as pipeline:
            for number in range(2_000):
                pipeline.set(f"{{{tag}}}{number}", bytes(1_000), ex=60)
            pipeline.execute()
        assert int(client.info("stats")["evicted_keys"]) > 1_000


def owns_slot_of(client: Any, tag: str) -> bool:
    import redis

    try:
        client.get(f"{{{tag}}}")
    except redis.ResponseError:  # MOVED
        return False
    return True


@contextmanager
def change_settings(nodes: list[Any], settings: Mapping[str, str]) -> Iterator[None]:
    """Change settings of Redis servers, and restore them at the end."""
    before = [(node, key, node.call("CONFIG", "GET", key)) for node in nodes for key in settings]
    for node in nodes:
        for key, value in settings.items():
            node.call("CONFIG", "SET", key, value)
    try:
        yield
    finally:
        for node, key, value in before:
            found = value[key] if isinstance(value, dict) else value[1]
            node.call("CONFIG", "SET", key, found)


@contextmanager
def forbid_writes(nodes: list[Any]) -> Iterator[None]:
    """Take away the permission to write, and restore it at the end."""
    for node in nodes:
        node.call("ACL", "SETUSER", "default", "-@write")
    try:
        yield
    finally:
        for node in nodes:
            node.call("ACL", "SETUSER", "default", "+@all")


class Cluster(Redis):
    """A Redis cluster of three nodes, which announce the proxies as their addresses."""

    name = "cluster"
    faults: ClassVar[Mapping[str, StoreFault]] = {
        **make_redis_faults(CONNECTION_ENDED | causes("NodeDown")),
        "killed and restarted": StoreFault(
            "one node of three: kill -9, then started again, empty",
            CONNECTION_ENDED | causes("NodeDown", "ClusterDownError"),
            read="partly",
            write="partly",
            is_repeatable=False,
        ),
        "read-only": StoreFault("an ACL takes away the permission to write", causes("NOPERM"), read="serves"),
    }

    def start(self) -> None:
        servers = self.stack.enter_context(RedisClusterServers(password=PASSWORD))
        self.servers = servers
        self.nodes = servers.members
        for node in self.nodes:
            proxy = self.add_proxy(node.port)
            node.options = (*node.options, "--cluster-announce-port", str(proxy.address[1]))
            node.options = (*node.options, "--cluster-announce-bus-port", str(node.bus))
            node.call("CONFIG", "SET", "cluster-announce-bus-port", str(node.bus))
            node.call("CONFIG", "SET", "cluster-announce-port", str(proxy.address[1]))
        ports = {proxy.address[1] for proxy in self.proxies}
        wait_until(
            lambda: all(self.list_announced_ports(node) == ports for node in self.nodes),
            "the nodes announce the proxies",
        )

    def list_announced_ports(self, node: Any) -> set[int]:
        return {int(port) for shard in node.call("CLUSTER", "SLOTS") for _, port, *_ in shard[2:]}

    def url(self, fault: str) -> str:
        del fault
        return f"redis+cluster://:{PASSWORD}@{self.proxies[0].url_port},{self.proxies[1].url_port}"

    @contextmanager
    def killed_and_restarted(self) -> Iterator[None]:
        with self.kill(self.nodes[0]):
            yield
        wait_until(self.servers.is_complete, "the cluster is complete again")

    def read_only(self) -> Any:
        return forbid_writes(self.nodes)


class Sentinel(Redis):
    """A master behind a proxy; a sentinel announces the proxy.

    The fault ``killed and restarted`` uses another master, which has a replica.
    """

    name = "sentinel"
    faults: ClassVar[Mapping[str, StoreFault]] = {
        **make_redis_faults(CONNECTION_ENDED),
        "killed and restarted": StoreFault(
            "the master: kill -9; the replica becomes the master", CONNECTION_ENDED, is_repeatable=False
        ),
    }

    def start(self) -> None:
        self.server = self.stack.enter_context(RedisServer(password=PASSWORD))
        self.nodes = [self.server]
        self.proxy = self.add_proxy(self.server.port)
        sentinel = SentinelServer(self.proxy.address[1], "embeddings", 1)
        sentinel.configuration = (
            f"bind {HOST}\n"
            f"dir {sentinel.folder}\n"
            f"sentinel monitor embeddings {HOST} {self.proxy.address[1]} 1\n"
            f"sentinel auth-pass embeddings {PASSWORD}\n"
            "sentinel down-after-milliseconds embeddings 600000\n"
        )
        self.sentinel = self.stack.enter_context(sentinel)
        self.set: RedisSentinelServers | None = None

    def url(self, fault: str) -> str:
        if fault != "killed and restarted":
            return f"redis+sentinel://:{PASSWORD}@{self.sentinel.address}/embeddings/0"
        if self.set is not None:
            self.set.close()
        self.set = self.stack.enter_context(RedisSentinelServers())
        return self.set.url

    @contextmanager
    def killed_and_restarted(self) -> Iterator[None]:
        assert self.set is not None
        self.set.master.kill()
        yield
        self.set.allow_failover()


# --- Postgres -----------------------------------------------------------------------------------

DISK_FULL_TRIGGER = """
CREATE OR REPLACE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION USING ERRCODE = 'disk_full', MESSAGE = 'no space left on device'; END $$;
CREATE OR REPLACE TRIGGER full_disk BEFORE INSERT ON public.embedonce EXECUTE FUNCTION full_disk();
"""


class Postgres(ServerStore):
    """Postgres, with a role that has a password."""

    name = "postgres"
    faults: ClassVar[Mapping[str, StoreFault]] = {
        **make_network_faults(
            ended=causes("OperationalError"),
            silent=causes("timeout"),
            garbled=causes("DatabaseError", "OperationalError", "timeout"),
        ),
        "killed and restarted": StoreFault(
            "kill -9 of all its processes, then started again", causes("OperationalError"), is_repeatable=False
        ),
        "out of memory or disk full": StoreFault("a trigger raises `disk_full`", causes("DiskFull"), read="serves"),
        "read-only": StoreFault(
            "`default_transaction_read_only` is set", causes("ReadOnlySqlTransaction"), read="serves"
        ),
        "wrong password": StoreFault(
            "the password is changed and sessions are ended", causes("AdminShutdown", "InvalidPassword")
        ),
    }
    not_applicable: ClassVar[Mapping[str, str]] = {"evicting": "Postgres evicts nothing; it deletes only expired rows"}

    def __init__(self) -> None:
        super().__init__()
        self.server = self.stack.enter_context(PostgresServer())
        hba = self.server.data / "pg_hba.conf"
        hba.write_text(f"host all app 127.0.0.1/32 scram-sha-256\n{hba.read_text()}")
        self.server.call(
            f"CREATE ROLE app LOGIN PASSWORD '{PASSWORD}'; GRANT CREATE ON SCHEMA public TO app;"
            "CREATE EXTENSION IF NOT EXISTS vector"
        )
        self.server.reload()
        self.proxy = self.add_proxy(self.server.port)

    def backend(self, fault: str) -> Backend:
        from embedonce_backends.postgres import PostgresBackend

        address = self.server.address if fault == "killed and restarted" else self.proxy.url_port
        return PostgresBackend(url=f"postgresql://app:{PASSWORD}@{address}/postgres")

    @contextmanager
    def killed_and_restarted(self) -> Iterator[None]:
        self.server.kill_all()
        try:
            yield
        finally:
            (self.server.data / "postmaster.pid").unlink(missing_ok=True)
            self.server.restart()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Make transactions read-only by default, including those of open sessions."""
        self.set_read_only("on")
        try:
            yield
        finally:
            self.set_read_only("off")

    def set_read_only(self, value: str) -> None:
        self.server.call(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
        self.server.call("SELECT pg_reload_conf()")
        wait_until(lambda: self.server.call("SHOW default_transaction_read_only") == value, "the setting applies")

    @contextmanager
    def run_sql_around(self, before: str, after: str) -> Iterator[None]:
        self.server.call(before)
        try:
            yield
        finally:
            self.server.call(after)

    def out_of_memory_or_disk_full(self) -> Any:
        return self.run_sql_around(DISK_FULL_TRIGGER, "DROP TRIGGER full_disk ON public.embedonce")

    @contextmanager
    def wrong_password(self) -> Iterator[None]:
        self.server.call("ALTER ROLE app PASSWORD 'other'")
        sessions = "FROM pg_stat_activity WHERE usename = 'app'"
        self.server.call(f"SELECT count(pg_terminate_backend(pid)) {sessions}")
        wait_until(lambda: self.server.call(f"SELECT count(*) {sessions}") == "0", "the sessions have ended")
        try:
            yield
        finally:
            self.server.call(f"ALTER ROLE app PASSWORD '{PASSWORD}'")


# --- memcached ----------------------------------------------------------------------------------


MEMCACHED_ENDED = causes("ConnectionRefusedError", "ConnectionResetError", "MemcacheUnexpectedCloseError", "NodeDown")
MEMCACHED_SILENT = causes("NodeDown", "timeout")


class Memcached(ServerStore):
    """Two memcached nodes; each fault affects both."""

    name = "memcached"
    separate_nodes = 2
    faults: ClassVar[Mapping[str, StoreFault]] = {
        **make_network_faults(ended=MEMCACHED_ENDED, silent=MEMCACHED_SILENT, garbled=MEMCACHED_SILENT),
        "killed and restarted": StoreFault(
            "both nodes: kill -9, then started again, empty", MEMCACHED_ENDED, is_repeatable=False
        ),
        "out of memory or disk full": StoreFault(
            "both nodes are full and were started with `-M`",
            causes("OutOfMemory"),
            read="serves",
            is_repeatable=False,
        ),
        "evicting": StoreFault(
            "other clients fill both nodes", NO_CAUSES, read="forgets", write="serves", is_repeatable=False
        ),
    }
    not_applicable: ClassVar[Mapping[str, str]] = {
        "read-only": "memcached has no such state",
        "wrong password": "the tier has no password: memcached is kept private by its network",
    }

    def __init__(self) -> None:
        super().__init__()
        self.servers = [self.stack.enter_context(MemcachedServer()) for _ in range(2)]
        self.addresses = [self.add_proxy(server.port).url_port for server in self.servers]
        self.small: list[MemcachedServer] = []

    def backend(self, fault: str) -> Backend:
        from embedonce_backends.memcached import MemcachedBackend

        addresses = self.addresses
        if fault == "killed and restarted":
            addresses = [server.address for server in self.servers]
        elif fault in ("out of memory or disk full", "evicting"):
            options = ("-m", "2", *(("-M",) if fault != "evicting" else ()))
            for server in self.small:
                server.close()
            self.small = [self.stack.enter_context(MemcachedServer(*options)) for _ in range(2)]
            addresses = [server.address for server in self.small]
        return MemcachedBackend(servers=addresses)

    def killed_and_restarted(self) -> Any:
        return self.kill(*self.servers)

    @contextmanager
    def out_of_memory_or_disk_full(self) -> Iterator[None]:
        for server in self.small:
            for size in (200, 250, 300, 350, 400):
                fill_memcached(server, size)
        try:
            yield
        finally:
            for server in self.small:
                server.call("flush_all")

    @contextmanager
    def evicting(self) -> Iterator[None]:
        for server in self.small:
            fill_memcached(server, 1_200, 6_000)
        yield


def fill_memcached(server: MemcachedServer, size: int, max_values: int = 30_000) -> None:
    """Store values of the same size until the node refuses a value, or has ``max_values`` values."""
    from pymemcache.client.base import Client
    from pymemcache.exceptions import MemcacheServerError

    client = Client((HOST, server.port), default_noreply=False)
    try:
        for start in range(0, max_values, 500):
            client.set_many({f"{size}.{start + number}": bytes(size) for number in range(500)}, noreply=False)
    except MemcacheServerError:
        pass
    finally:
        client.close()


# --- disk ---------------------------------------------------------------------------------------

WRITER = """
import sqlite3, sys, time
with sqlite3.connect(sys.argv[1], isolation_level=None) as other:
    other.execute("BEGIN IMMEDIATE")
    other.execute("DELETE FROM Cache")
    print("writing", flush=True)
    time.sleep(60)
"""


class Disk:
    """A folder on this host."""

    name = "disk"
    separate_nodes = 1
    faults: ClassVar[Mapping[str, StoreFault]] = {
        "black hole": StoreFault("another process holds the write lock", causes("timeout"), read="serves"),
        "garbage": StoreFault(
            "the files are overwritten with random bytes; later their folder is emptied",
            causes("DatabaseError", "corrupt"),
            read="partly",
            write="partly",
            is_repeatable=False,
        ),
        "killed and restarted": StoreFault(
            "kill -9 of a process that is writing", NO_CAUSES, read="serves", write="serves"
        ),
        "out of memory or disk full": StoreFault("no file may grow (`RLIMIT_FSIZE`)", causes("OSError"), read="serves"),
        "evicting": StoreFault(
            "another client writes more than `max_bytes`",
            NO_CAUSES,
            read="forgets",
            write="serves",
            is_repeatable=False,
        ),
    }
    not_applicable: ClassVar[Mapping[str, str]] = {
        "refused": "a file has no listener",
        "slow": "a file is not read byte by byte, and a test cannot make a disk slow for a while",
        "reset mid-reply": "there is no connection",
        "read-only": "an open file stays writable; a write to a file that was opened read-only fails as on a full disk",
        "wrong password": "the disk tier has no password",
    }

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="embedonce-faults-"))
        self.number = 0

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def path(self) -> Path:
        return self.folder / str(self.number)

    def backend(self, fault: str) -> Backend:
        from embedonce_backends.disk import DiskBackend

        self.number += 1
        return DiskBackend(path=self.path, max_bytes=2**20 if fault == "evicting" else 2**26)

    @contextmanager
    def inject(self, fault: str) -> Iterator[None]:
        with getattr(self, fault.replace(" ", "_").replace("-", "_"))():
            yield

    @contextmanager
    def black_hole(self) -> Iterator[None]:
        other = sqlite3.connect(
            self.path / "cache.db", isolation_level=None, check_same_thread=False, timeout=START_TIMEOUT
        )
        try:
            other.execute("BEGIN IMMEDIATE")
            yield
        finally:
            other.close()

    @contextmanager
    def garbage(self) -> Iterator[None]:
        random_bytes = random.Random(0).randbytes
        for name in ("cache.db", "cache.db-wal"):
            file = self.path / name
            if file.exists():
                file.write_bytes(random_bytes(max(20_000, file.stat().st_size)))
        yield
        for file in self.path.iterdir():
            file.unlink()

    @contextmanager
    def killed_and_restarted(self) -> Iterator[None]:
        command = [sys.executable, "-c", WRITER, str(self.path / "cache.db")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline()
            writer.kill()
            writer.wait(START_TIMEOUT)
        yield

    @contextmanager
    def out_of_memory_or_disk_full(self) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # The limit is at least 32 KiB, because SQLite's index of the WAL has that size from the beginning.
        max_bytes = max(2**15, (self.path / "cache.db-wal").stat().st_size)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    @contextmanager
    def evicting(self) -> Iterator[None]:
        from embedonce_backends.disk import DiskBackend

        other = DiskBackend(path=self.path, max_bytes=2**20)
        other._has_warned = True  # the tier's own backend also evicts entries, and logs the warning
        for turn in range(4):
            other.set_many({f"eo1.{turn:x}.{number}": bytes(1_000) for number in range(500)}, None)
        other.close()
        yield


STORES: Mapping[str, Any] = {store.name: store for store in (Redis, Cluster, Sentinel, Postgres, Memcached, Disk)}

CELLS = [
    Cell(name, fault, operation, face)
    for name, store in STORES.items()
    for fault in FAULTS
    if fault in store.faults
    for operation in OPERATIONS
    for face in FACES
]
