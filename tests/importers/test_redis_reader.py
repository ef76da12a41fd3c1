"""The importers' client of Redis reads one server or a cluster, in time, and shows no secret."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optional
import pytest
import redis
from importers.redis_sources import make_database, pause
from redis.cluster import RedisCluster
from servers import Certificates, RedisClusterServers, RedisServer

from embedonce.contracts import deadline
from embedonce.errors import ConfigError, SourceError, TierTimeout
from embedonce.testing.contracts.support import run_in_fork
from embedonce_importers._redis import BATCH_KEYS, WRONG_TYPE, RedisReader, parse_url

pytestmark = optional.needs("redis")

PASSWORD = "p/w:@#?ü"
READ_COMMANDS = ("+get", "+mget", "+hmget", "+hlen", "+scan", "+hscan", "+select", "+cluster|slots", "+command")


@pytest.fixture
def open_reader() -> Iterator[Callable[[str], RedisReader]]:
    """Return a function that makes a reader; all are closed at the end."""
    readers: list[RedisReader] = []

    def open_one(url: str) -> RedisReader:
        readers.append(RedisReader(url))
        return readers[-1]

    yield open_one
    for reader in readers:
        reader.close()
        reader.close()


@pytest.mark.parametrize(
    ("url", "for_redis", "name"),
    [
        ("redis://h", "redis://h", "redis://h:6379/0"),
        (" redis://h:1/2 ", "redis://h:1/2", "redis://h:1/2"),
        ("redis://h?db=3", "redis://h?db=3", "redis://h:6379/3"),
        ("valkey://h", "redis://h", "redis://h:6379/0"),
        ("valkeys+cluster://h", "rediss://h", "rediss+cluster://h:6379/0"),
        ("redis://u:p@h", "redis://u:p@h", "redis://h:6379/0"),
        ("redis://:p%2F@[::1]:5/1", "redis://:p%2F@[::1]:5/1", "redis://[::1]:5/1"),
        ("rediss://h?ssl_ca_certs=/a.pem", "rediss://h?ssl_ca_certs=/a.pem", "rediss://h:6379/0"),
        ("unix:///a/b", "unix:///a/b", "unix:///a/b?db=0"),
        ("unix://:p@/a?db=2", "unix://:p@/a?db=2", "unix:///a?db=2"),
        ("redis+cluster://h:1", "redis://h:1", "redis+cluster://h:1/0"),
        ("rediss+cluster://u:p@h", "rediss://u:p@h", "rediss+cluster://h:6379/0"),
    ],
)
def test_urls_are_parsed(url: str, for_redis: str, name: str) -> None:
    assert parse_url(url) == (for_redis, "+cluster" in url, (), name)


def test_the_url_of_a_cluster_may_have_several_hosts() -> None:
    place = parse_url("redis+cluster://u:p@a,[::1]:2,c:3")
    assert place == ("redis://u:p@a", True, (("::1", 2), ("c", 3)), "redis+cluster://a:6379,[::1]:2,c:3/0")


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "unknown scheme"),
        ("h:6379", "unknown scheme"),
        ("http://h", "unknown scheme"),
        ("unix+cluster:///a", "unknown scheme"),
        ("redis+sentinel://h/s", "address of the master"),
        ("redis://", "no host"),
        ("redis://:secret@", "no host"),
        ("unix://", "no socket path"),
        ("redis://a,b", "several hosts"),
        ("redis+cluster://a:1,b:c", "invalid host or port"),
        ("redis+cluster://a:1,", "invalid host or port"),
        ("unix://h/a", "no socket path"),
        ("redis+cluster://h/1", "only database 0"),
        ("redis://h/name", "invalid database"),
        ("redis://h/0/secret", "invalid database"),
        ("redis://u:secret/@h", "invalid host or port"),
        ("redis://u:secret#x@h", "invalid host or port"),
        ("redis://[secret", "invalid host or port"),
        ("redis://h#secret", "fragment"),
        ("redis://h?secret=secret", "may have db"),
        ("redis://h?ssl_ca_certs=secret", "may have db"),
        ("redis://h?username=secret", "may have db"),
        ("rediss://h?ssl_cert_reqs=none", "certificate is always checked"),
    ],
)
def test_invalid_urls_are_refused_without_being_quoted(url: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        parse_url(url)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_values_fields_and_hashes_are_read_in_batches(
    redis_server: RedisServer, open_reader: Callable[[str], RedisReader]
) -> None:
    count = 2 * BATCH_KEYS + 1
    url = make_database(redis_server)
    with redis.Redis.from_url(url) as client:
        client.mset({f"s{n}": f"v{n}" for n in range(count)})
        with client.pipeline() as pipeline:
            for n in range(count):
                pipeline.hset(f"h{n}", mapping={"a": f"a{n}", "b": f"b{n}"})
            pipeline.execute()
        client.hset("large", mapping={f"f{n}": f"v{n}" for n in range(count)})
    reader = open_reader(url)
    everything = range(count)
    assert reader.get_values([b"s%d" % n for n in everything]) == [b"v%d" % n for n in everything]
    assert reader.get_values([]) == []
    assert reader.get_values([b"s1", b"absent", b"h1", b"s1"]) == [b"v1", None, None, b"v1"]
    rows = reader.get_fields([b"h%d" % n for n in everything], ["b", "c"])
    assert rows == [[b"b%d" % n, None] for n in everything]
    assert reader.get_fields([b"s1", b"absent"], ["a"]) == [WRONG_TYPE, [None]]
    assert reader.get_fields_of(b"large", [b"f%d" % n for n in everything]) == [b"v%d" % n for n in everything]
    pages = list(reader.scan_fields(b"large"))
    assert dict(item for page in pages for item in page) == {b"f%d" % n: b"v%d" % n for n in everything}
    assert len(pages) > 1
    keys = [key for page in reader.scan_keys(b"h", "hash") for key in page]
    assert sorted(keys) == sorted(b"h%d" % n for n in everything)
    assert reader.sample_keys(b"l", "hash") == ([b"large"], True)
    assert reader.count_fields(b"large") == count
    assert reader.count_fields(b"absent") == 0


def test_a_prefix_is_no_pattern(redis_server: RedisServer, open_reader: Callable[[str], RedisReader]) -> None:
    url = make_database(redis_server)
    prefix = r"*?[a]^\-"
    with redis.Redis.from_url(url) as client:
        client.mset({prefix + "x": "1", "a": "1", "x" + prefix: "1", "xyaz": "1"})
    reader = open_reader(url)
    assert list(reader.scan_keys(prefix.encode(), "string")) == [[(prefix + "x").encode()]]
    assert reader.sample_keys(prefix.encode(), "string") == ([(prefix + "x").encode()], True)


def test_a_sample_of_a_large_database_is_bounded(
    redis_server: RedisServer, open_reader: Callable[[str], RedisReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = make_database(redis_server)
    with redis.Redis.from_url(url) as client:
        client.mset({f"k{n}": "" for n in range(5000)})
    monkeypatch.setattr("embedonce_importers._redis.SAMPLE_PAGES", 2)
    reader = open_reader(url)
    assert reader.sample_keys(b"absent", "string") == ([], False)
    keys, has_all = reader.sample_keys(b"k", "string")
    assert len(keys) >= 1000
    assert not has_all


def test_a_server_that_hangs_is_left_at_the_deadline(open_reader: Callable[[str], RedisReader]) -> None:
    with RedisServer() as server:
        server.call("SET", "a", "1")
        connected = open_reader(server.url)
        assert connected.get_values([b"a"]) == [b"1"]
        calls: list[Callable[[RedisReader], object]] = [
            lambda reader: reader.get_values([b"a"]),
            lambda reader: reader.get_fields([b"a"], ["f"]),
            lambda reader: reader.count_fields(b"a"),
            lambda reader: reader.sample_keys(b"", "string"),
            lambda reader: list(reader.scan_fields(b"a")),
        ]
        with pause(server):
            for call in calls:
                for reader in (connected, open_reader(server.url)):
                    with pytest.raises(TierTimeout, match="did not answer in time"), deadline(0.05):
                        call(reader)
            with pytest.raises(SourceError, match="did not answer in time"), connected.explain_errors(), deadline(0.05):
                connected.get_values([b"a"])
        assert connected.get_values([b"a", b"b"]) == [b"1", None]  # and not the reply to an earlier call


def test_a_server_that_was_restarted_is_read_again(open_reader: Callable[[str], RedisReader]) -> None:
    with RedisServer() as server:
        reader = open_reader(server.url)
        assert reader.get_values([b"a"]) == [None]
        server.kill()
        with pytest.raises(redis.ConnectionError):
            reader.get_values([b"a"])
        with pytest.raises(SourceError, match="check url, and that the server runs"), reader.explain_errors():
            reader.get_values([b"a"])
        server.restart()
        server.call("SET", "a", "1")
        assert reader.get_values([b"a"]) == [b"1"]


def test_threads_and_forked_children_have_their_own_connections(
    redis_server: RedisServer, open_reader: Callable[[str], RedisReader]
) -> None:
    url = make_database(redis_server)
    with redis.Redis.from_url(url) as client:
        client.mset({f"k{n}": f"v{n}" for n in range(8)})
    reader = open_reader(url)
    wrong: list[object] = []

    def read(number: int, times: int = 20) -> None:
        for _ in range(times):
            found = reader.get_values([b"k%d" % number])
            wrong.extend(value for value in found if value != b"v%d" % number)

    def child() -> None:
        read(7)
        assert not wrong
        reader.close()

    threads = [threading.Thread(target=read, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if hasattr(os, "fork"):
        run_in_fork(child, "a reader that was used before the fork", meanwhile=lambda: read(6))
    read(5)
    assert not wrong


def test_the_read_commands_that_the_documentation_names_are_enough(
    open_reader: Callable[[str], RedisReader],
) -> None:
    with RedisServer() as server:
        server.call("ACL", "SETUSER", "reader", "on", f">{PASSWORD}", "~own:*", "-@all", *READ_COMMANDS)
        server.call("SET", "own:a", "1")
        server.call("HSET", "own:h", "f", "1")
        server.call("HSET", "other", "a text", "1")
        url = f"redis://reader:p%2Fw%3A%40%23%3F%C3%BC@{server.address}/0"
        reader = open_reader(url)
        assert reader.get_values([b"own:a"]) == [b"1"]
        assert reader.get_fields([b"own:h"], ["f"]) == [[b"1"]]
        assert list(reader.scan_keys(b"own:", "hash")) == [[b"own:h"]]
        assert list(reader.scan_fields(b"own:h")) == [[(b"f", b"1")]]
        assert reader.count_fields(b"own:h") == 1
        with pytest.raises(redis.exceptions.NoPermissionError) as caught:
            reader.get_fields_of(b"other", [b"a text"])
        assert "a text" not in str(caught.value)
        with pytest.raises(SourceError, match="may not read the store; it needs the commands"), reader.explain_errors():
            reader.get_values([b"other"])
        wrong = open_reader(f"redis://reader:a-secret@{server.address}")
        with pytest.raises(SourceError, match="refused the login") as refused, wrong.explain_errors():
            wrong.get_values([b"own:a"])
        assert "a-secret" not in f"{refused.value!r} {refused.value.__cause__!r}"


def test_no_text_is_in_the_error_of_a_server_that_does_not_know_a_command(
    open_reader: Callable[[str], RedisReader],
) -> None:
    with RedisServer("--rename-command", "HMGET", "") as server:
        reader = open_reader(server.url)
        with pytest.raises(SourceError, match="does not know a command") as caught:
            reader.get_fields_of(b"embeddings", [b"a private text"])
        assert "private" not in str(caught.value)
        assert caught.value.__suppress_context__


def test_tls_and_unix_sockets_work(tmp_path: Path, open_reader: Callable[[str], RedisReader]) -> None:
    certificates = Certificates(tmp_path)
    with RedisServer(tls=certificates) as server:
        server.call("SET", "a", "1")
        ca = f"?ssl_ca_certs={certificates.authority}"
        assert open_reader(f"rediss://127.0.0.1:{server.tls_port}{ca}").get_values([b"a"]) == [b"1"]
        assert open_reader(f"unix://{server.socket}").get_values([b"a"]) == [b"1"]
        unknown = open_reader(f"rediss://127.0.0.1:{server.tls_port}")
        with pytest.raises(SourceError, match="CERTIFICATE_VERIFY_FAILED"), unknown.explain_errors():
            unknown.get_values([b"a"])
        plain = open_reader(f"rediss://{server.address}{ca}")
        with pytest.raises(SourceError, match="write redis instead of rediss"), plain.explain_errors(), deadline(0.1):
            plain.get_values([b"a"])


# --- clusters -------------------------------------------------------------------------------------


@pytest.fixture
def cluster_client(redis_cluster: RedisClusterServers) -> Iterator[Any]:
    redis_cluster.flush()
    client = RedisCluster.from_url(redis_cluster.url.replace("+cluster", ""))
    yield client
    client.close()


def test_a_cluster_is_read(
    redis_cluster: RedisClusterServers, cluster_client: Any, open_reader: Callable[[str], RedisReader]
) -> None:
    for n in range(30):
        cluster_client.set(f"s{n}", f"v{n}")
        cluster_client.hset(f"h{n}", "f", f"v{n}")
    reader = open_reader(redis_cluster.url.replace("//", "//127.0.0.1:1,"))  # nothing listens at the first address
    assert reader.get_values([*(b"s%d" % n for n in range(30)), b"absent", b"h1"]) == [
        *(b"v%d" % n for n in range(30)),
        None,
        None,
    ]
    assert reader.get_fields([b"h1", b"s1", b"h2"], ["f"]) == [[b"v1"], WRONG_TYPE, [b"v2"]]
    listed = [key for page in reader.scan_keys(b"h", "hash") for key in page]
    assert sorted(listed) == sorted(b"h%d" % n for n in range(30))
    assert len(reader.sample_keys(b"h", "hash")[0]) == 30
    assert reader.get_fields_of(b"h1", [b"f", b"g"]) == [b"v1", None]
    assert list(reader.scan_fields(b"h1")) == [[(b"f", b"v1")]]


def test_the_read_commands_that_the_documentation_names_are_enough_in_a_cluster(
    redis_cluster: RedisClusterServers, cluster_client: Any, open_reader: Callable[[str], RedisReader]
) -> None:
    for node in redis_cluster.members:
        node.call("ACL", "SETUSER", "reader", "on", ">pw", "~own:*", "-@all", *READ_COMMANDS)
    cluster_client.hset("own:h", "f", "1")
    reader = open_reader(redis_cluster.url.replace("//", "//reader:pw@"))
    assert reader.get_values([b"own:a", b"own:b"]) == [None, None]
    assert reader.get_fields([b"own:h"], ["f"]) == [[b"1"]]
    assert list(reader.scan_keys(b"own:", "hash")) == [[b"own:h"]]
    assert list(reader.scan_fields(b"own:h")) == [[(b"f", b"1")]]
    assert reader.count_fields(b"own:h") == 1
    with pytest.raises(SourceError, match="may not read the store"), reader.explain_errors():
        reader.get_values([b"other"])


def test_the_url_of_a_cluster_and_of_one_server_are_told_apart(
    redis_server: RedisServer, redis_cluster: RedisClusterServers, open_reader: Callable[[str], RedisReader]
) -> None:
    as_server = open_reader(redis_cluster.url.replace("+cluster", ""))
    calls: list[Callable[[RedisReader], object]] = [
        lambda reader: reader.get_values([b"a", b"b", b"c"]),
        lambda reader: reader.get_fields([b"a", b"b", b"c"], ["f"]),
    ]
    for call in calls:
        with pytest.raises(SourceError, match=r"write the url as redis\+cluster://host:port"):
            call(as_server)
        with pytest.raises(SourceError, match="write the url as redis://host:port"):
            call(open_reader(f"redis+cluster://{redis_server.url.split('/')[2]}"))


def test_a_cluster_of_which_a_node_hangs_is_left_at_the_deadline(
    redis_cluster: RedisClusterServers, cluster_client: Any, open_reader: Callable[[str], RedisReader]
) -> None:
    reader = open_reader(redis_cluster.url)
    keys = [b"s%d" % n for n in range(30)]
    assert reader.get_values(keys) == [None] * 30
    with pause(redis_cluster.members[1]), pytest.raises(TierTimeout), deadline(0.2):
        reader.get_values(keys)
    cluster_client.set("s1", "1")
    assert reader.get_values([b"s1", b"s2"]) == [b"1", None]


def test_no_node_of_a_cluster_can_be_reached(open_reader: Callable[[str], RedisReader]) -> None:
    reader = open_reader("redis+cluster://user:a-secret@127.0.0.1:1")
    with pytest.raises(SourceError, match=r"127\.0\.0\.1:1") as caught, reader.explain_errors():
        reader.get_values([b"a"])
    assert "a-secret" not in str(caught.value)
