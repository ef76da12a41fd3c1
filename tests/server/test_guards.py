"""Which requests are let in: Host, Origin, content type and doubled headers; and what Cache-Control says."""

from __future__ import annotations

import pytest

from embedonce_server.api.api_errors import ApiError, list_positions
from embedonce_server.api.cache_control import DEFAULT, CacheControl, read_cache_control
from embedonce_server.api.guards import HostGuard, check_json, check_sender, is_loopback, read_headers
from embedonce_server.api.incoming import BodyMemory, read_body


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8080",
        "app.localhost",
        "127.0.0.1",
        "127.8.8.8:80",
        "[::1]",
        "[::1]:8080",
        "embeddings.internal:443",
    ],
)
def test_loopback_names_and_allowed_hosts_are_let_in(host: str) -> None:
    guard = HostGuard(["embeddings.internal"])
    for _ in range(2):
        guard.check(host.encode())


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "evil.example",
        "localhost.evil.example",
        "evil-localhost",
        "127.0.0.1.evil.example",
        "10.0.0.1",
        "[::2]",
        "0.0.0.0",
        "embeddings.internal.evil.example",
        "evil.example:127.0.0.1",
        "evil@localhost.example",
        "localhost:1@evil.example",
        "localhost:evil",
        "localhost:1:2",
        "localhost:",
        "localhost/evil",
        "localhost evil.example",
        "[::1]evil.example",
        "[::1",
        "::1",
        "evil.example:[::1]",
        "\xff",
    ],
)
def test_other_hosts_are_refused(host: str | None) -> None:
    guard = HostGuard(["embeddings.internal"])
    for _ in range(2):
        with pytest.raises(ApiError) as refused:
            guard.check(None if host is None else host.encode("latin-1"))
        assert refused.value.status == 403
        assert refused.value.code == "host_not_allowed"
        assert "add it there and reload" in str(refused.value)


def test_a_host_is_repeated_only_if_it_is_short_and_plain() -> None:
    for host, shown in [
        (b"evil.example:80", 'the Host "evil.example" is not in allowed_hosts'),
        (b"<b>evil</b>", "the Host of the request is not"),
        (b"e" * 101, "the Host of the request is not"),
    ]:
        with pytest.raises(ApiError, match=shown) as refused:
            HostGuard([]).check(host)
        assert len(str(refused.value)) < 200


def test_the_memo_of_hosts_is_bounded() -> None:
    guard = HostGuard([])
    for port in range(1000):
        guard.check(b"localhost:%d" % port)
    assert len(guard.admitted) < 1000


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", "127.1.2.3"])
def test_loopback_names(name: str) -> None:
    assert is_loopback(name)


@pytest.mark.parametrize("name", ["", "0.0.0.0", "::", "example.com", "localhost.example.com", "127.0.0.1.example.com"])
def test_other_names_are_not_loopback(name: str) -> None:
    assert not is_loopback(name)


def test_the_origin_must_be_the_server_itself() -> None:
    hosts = HostGuard([])
    check_sender(hosts, {b"host": b"localhost:8080"})
    check_sender(hosts, {b"host": b"localhost:8080", b"origin": b"http://localhost:8080"})
    for origin in (b"null", b"http://localhost:9090", b"https://evil.example", b"", b"file://", b"localhost:8080"):
        with pytest.raises(ApiError) as refused:
            check_sender(hosts, {b"host": b"localhost:8080", b"origin": origin})
        assert refused.value.status == 403


@pytest.mark.parametrize(
    "kind",
    [
        b"application/json",
        b"application/json; charset=utf-8",
        b'Application/JSON;charset="UTF-8"',
        b"application/json;",
    ],
)
def test_json_is_accepted(kind: bytes) -> None:
    check_json({b"content-type": kind})


@pytest.mark.parametrize(
    "kind",
    [
        b"text/plain",
        b"",
        b"application/jsonp",
        b"application/json; charset=utf-16",
        b"multipart/form-data",
        b"text/json",
        None,
    ],
)
def test_other_types_are_refused(kind: bytes | None) -> None:
    with pytest.raises(ApiError) as refused:
        check_json({} if kind is None else {b"content-type": kind})
    assert refused.value.status == 415


def test_compressed_bodies_are_refused() -> None:
    check_json({b"content-type": b"application/json", b"content-encoding": b"identity"})
    with pytest.raises(ApiError):
        check_json({b"content-type": b"application/json", b"content-encoding": b"gzip"})


def test_all_lines_of_a_list_are_read() -> None:
    pairs = [(b"cache-control", b"no-store"), (b"host", b"localhost"), (b"cache-control", b"max-age=0")]
    for lines in (pairs, pairs[::-1]):
        assert read_cache_control(read_headers(lines)[b"cache-control"]) == CacheControl(no_store=True)
    kind = (b"content-type", b"application/json")
    for encodings in ((b"gzip", b"identity"), (b"identity", b"gzip"), (b"identity, gzip",)):
        with pytest.raises(ApiError, match="Content-Encoding"):
            check_json(read_headers([kind, *((b"content-encoding", encoding) for encoding in encodings)]))
    check_json(read_headers([kind, *[(b"content-encoding", b"identity")] * 3]))


def test_doubled_headers_are_refused_if_they_matter() -> None:
    assert read_headers([(b"accept", b"a"), (b"accept", b"b")]) == {b"accept": b"a, b"}
    for name in (b"host", b"authorization", b"content-type", b"origin", b"api-key"):
        with pytest.raises(ApiError, match=name.decode()):
            read_headers([(name, b"a"), (name, b"a")])


@pytest.mark.parametrize(
    ("header", "control"),
    [
        (None, DEFAULT),
        (b"", DEFAULT),
        (b"max-age=0", DEFAULT),
        (b"no-store", CacheControl(no_store=True)),
        (b"No-Cache , no-store", CacheControl(no_store=True, no_cache=True)),
        (b"only-if-cached, max-stale=5", CacheControl(only_if_cached=True)),
        (b'no-cache="x"', CacheControl(no_cache=True)),
        (b'a="b, only-if-cached, c", no-store', CacheControl(no_store=True)),
        (b'a="b\\", only-if-cached', DEFAULT),
    ],
)
def test_directives_of_cache_control(header: bytes | None, control: CacheControl) -> None:
    assert read_cache_control(header) == control


def test_directives_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ApiError):
        read_cache_control(b"no-cache, only-if-cached")


def test_lists_of_positions_are_short() -> None:
    assert list_positions([4]) == "4"
    assert list_positions([0, 4, 7]) == "0, 4 and 7"
    assert len(list_positions(list(range(2048)))) < 100


@pytest.mark.parametrize("coding", [b"gzip, chunked", b"deflate", b"identity", b""])
async def test_bodies_in_another_transfer_coding_are_refused(coding: bytes) -> None:
    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"{}"}

    memory = BodyMemory()
    with pytest.raises(ApiError) as refused:
        await read_body(memory, {b"transfer-encoding": coding}, receive, 1000)
    assert refused.value.status == 501
    assert await read_body(memory, {b"transfer-encoding": b"Chunked"}, receive, 1000) == b"{}"
    assert memory.bytes == 2
