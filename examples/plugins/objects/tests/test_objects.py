"""The objects backend passes the contract on a folder, in memory and on S3, and behaves as its README says."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import traceback
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import obstore
import pytest
from conftest import BUCKET, CREDENTIALS, S3
from embedonce_objects.backend import ObjectsBackend

from embedonce.contracts import deadline
from embedonce.errors import CacheClosed, ConfigError, TierError
from embedonce.testing import BackendContract, NetworkFault, Recipe

key = BackendContract.key


class TestFolder(BackendContract):
    examples = 5

    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.urls: dict[Any, str] = {}

    def make(self) -> ObjectsBackend:
        return self.at(Path(tempfile.mkdtemp(dir=self.folder)).as_uri())

    def at(self, url: str) -> ObjectsBackend:
        backend = ObjectsBackend(url=url)
        self.urls[backend] = url
        return backend

    def reopen(self, backend: ObjectsBackend) -> ObjectsBackend:
        return self.at(self.urls[backend])

    def recipe(self, backend: ObjectsBackend) -> Recipe:
        return Recipe(ObjectsBackend, {"url": self.urls[backend]})


class TestMemory(BackendContract):
    examples = 10

    def make(self) -> ObjectsBackend:
        return ObjectsBackend(url="memory://")


class TestS3(BackendContract):
    examples = 3
    prefixes = count()

    @pytest.fixture(autouse=True)
    def on_a_server(self, s3: S3) -> None:
        self.s3 = s3
        self.options: dict[Any, dict[str, Any]] = {}

    def make(self) -> ObjectsBackend:
        return self.at(self.s3.options(f"contract-{next(self.prefixes)}"))

    def at(self, options: dict[str, Any]) -> ObjectsBackend:
        backend = ObjectsBackend(**options, concurrency=8)
        self.options[backend] = options
        return backend

    def reopen(self, backend: ObjectsBackend) -> ObjectsBackend:
        return self.at(self.options[backend])

    def recipe(self, backend: ObjectsBackend) -> Recipe:
        return Recipe(ObjectsBackend, self.options[backend])

    def stall(self, backend: ObjectsBackend) -> AbstractContextManager[object]:
        return inject(self.s3, NetworkFault("black_hole"))


@contextmanager
def inject(s3: S3, fault: NetworkFault) -> Iterator[None]:
    s3.proxy.fault = fault
    try:
        yield
    finally:
        s3.proxy.heal()


@contextmanager
def open_backend(**options: Any) -> Iterator[ObjectsBackend]:
    backend = ObjectsBackend(**options)
    try:
        yield backend
    finally:
        backend.close()


def traceback_of(call: Any, *arguments: Any) -> str:
    """Return the complete traceback of the TierError that a call raises, as a log would show it."""
    with pytest.raises(TierError) as caught:
        call(*arguments)
    return "".join(traceback.format_exception(caught.value))


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["get", "set", "add", "delete", "scan"])
def test_a_missing_bucket_is_an_error_and_not_a_miss(s3: S3, operation: str) -> None:
    with open_backend(**{**s3.options(""), "url": "s3://nowhere/v1"}) as missing:
        calls: dict[str, Any] = {
            "get": lambda: missing.get_many([key(1)]),
            "set": lambda: missing.set_many({key(1): b"one"}, None),
            "add": lambda: missing.add_many({key(1): b"one"}, 60.0),
            "delete": lambda: missing.delete_many([key(1)]),
            "scan": lambda: list(missing.scan("")),
        }
        assert "s3://nowhere/v1: the bucket does not exist; create it, or correct the url" in traceback_of(
            calls[operation]
        )


@pytest.fixture
def strict(s3: S3) -> Iterator[None]:
    """Make the server check credentials."""

    def skip_checks(requests: int) -> None:
        request = urllib.request.Request(
            f"{s3.server}/moto-api/reset-auth", str(requests).encode(), {"Content-Type": "text/plain"}, method="POST"
        )
        urllib.request.urlopen(request).close()

    skip_checks(0)
    yield
    skip_checks(10**9)


def test_wrong_credentials_are_named_and_not_shown(s3: S3, prefix: str, strict: None) -> None:
    with open_backend(**s3.options(prefix)) as wrong:
        for call in (lambda: wrong.get_many([key(1)]), lambda: wrong.set_many({key(1): b""}, None)):
            found = traceback_of(call)
            assert f"s3://{BUCKET}/{prefix}: the store refuses the credentials (InvalidAccessKeyId)" in found
            assert CREDENTIALS["secret_access_key"] not in found
        assert "refuses the credentials" in traceback_of(lambda: list(wrong.scan("")))
        assert CREDENTIALS["secret_access_key"] not in repr(wrong) + str(vars(wrong))


def test_a_server_that_is_down_is_named(s3: S3, prefix: str) -> None:
    with open_backend(**s3.options(prefix)) as down, inject(s3, NetworkFault("refuse")):
        assert f"s3://{BUCKET}/{prefix}: the store is unreachable" in traceback_of(down.get_many, [key(1)])


def test_one_failure_ends_the_batch(s3: S3, prefix: str) -> None:
    with open_backend(**s3.options(prefix), concurrency=2) as backend_of_two:
        backend_of_two.set_many({key(n): b"there" for n in range(20)}, None)
        with inject(s3, NetworkFault("cut", after=300)), pytest.raises(TierError):
            backend_of_two.get_many([key(n) for n in range(20)])
        assert len(backend_of_two.get_many([key(n) for n in range(20)])) == 20


def test_writes_and_listings_keep_to_the_deadline(s3: S3, prefix: str) -> None:
    with open_backend(**s3.options(prefix)) as silent:
        silent.set_many({key(1): b"one"}, None)
        with inject(s3, NetworkFault("black_hole")):
            for call in (
                lambda: silent.set_many({key(2): b"two"}, None),
                lambda: silent.add_many({key(2): b"two"}, 60.0),
                lambda: silent.delete_many([key(3)]),
                lambda: list(silent.scan("")),
            ):
                with deadline(0.1), pytest.raises(TimeoutError):
                    call()
        assert silent.get_many([key(1)]) == {key(1): b"one"}


def test_invalid_urls_are_refused() -> None:
    for url in ("nope://x", "vectors", "s3:bucket", ""):
        with pytest.raises(ConfigError, match="is not a valid url of an object store"):
            ObjectsBackend(url=url)
    with pytest.raises(ConfigError, match="must be an absolute path"):
        ObjectsBackend(url="file://vectors")
    with pytest.raises(ConfigError, match="region: valid only with a url that starts with s3://"):
        ObjectsBackend(url="memory://", region="us-east-1")
    with pytest.raises(ConfigError) as caught:
        ObjectsBackend(url="nope://user:a-secret@host/path?sig=a-secret")
    assert "a-secret" not in str(caught.value)


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with open_backend(url=(tmp_path / "file" / "vectors").as_uri()) as impossible:
        for _ in range(2):
            with pytest.raises(ConfigError, match="vectors: cannot create the folder"):
                impossible.get_many([key(1)])


# --- leases ---------------------------------------------------------------------------------------


def test_an_expired_lease_is_taken_over_once(s3: S3, prefix: str) -> None:
    """The server's time has whole seconds. A ttl of -1 s has expired at once, whatever the server's clock says."""
    with open_backend(**s3.options(prefix)) as one, open_backend(**s3.options(prefix)) as two:
        assert one.add_many({key(1): b"one"}, 3600.0) == {key(1)}
        assert two.add_many({key(1): b"two"}, 3600.0) == set()
        assert two.add_many({key(1): b"two"}, None) == set()
        assert one.get_many([key(1)]) == {key(1): b"one"}
        assert two.add_many({key(1): b"two"}, -1.0) == {key(1)}
        assert one.get_many([key(1)]) == {key(1): b"two"}


def test_a_lease_that_another_takes_over_first_is_lost(s3: S3, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_backend(**s3.options(prefix)) as one, open_backend(**s3.options(prefix)) as two:
        one.add_many({key(1): b"first"}, 3600.0)
        head = obstore.head_async

        async def head_and_replace(*arguments: Any) -> Any:
            found = await head(*arguments)
            await asyncio.to_thread(two.set_many, {key(1): b"two"}, None)
            return found

        monkeypatch.setattr(obstore, "head_async", head_and_replace)
        assert one.add_many({key(1): b"one"}, -1.0) == set()
        assert one.get_many([key(1)]) == {key(1): b"two"}


def test_only_a_network_store_has_leases(tmp_path: Path) -> None:
    for url in (tmp_path.as_uri(), "memory://"):
        with open_backend(url=url) as local:
            assert not local.capabilities.add


# --- names ----------------------------------------------------------------------------------------


def test_each_scope_has_its_own_folder(tmp_path: Path) -> None:
    with open_backend(url=tmp_path.as_uri()) as folder:
        folder.set_many({key(1): b"frame"}, None)
    assert (tmp_path / key(1)[:20] / key(1)).read_bytes() == b"frame"


def test_prefixes_are_separate(s3: S3, prefix: str) -> None:
    with open_backend(**s3.options(f"{prefix}/a")) as a, open_backend(**s3.options(f"{prefix}/ab")) as ab:
        a.set_many({key(1): b"a"}, None)
        assert list(ab.scan("")) == []
        assert list(a.scan("")) == [key(1)]


def test_a_listing_can_have_many_pages(tmp_path: Path) -> None:
    with open_backend(url=tmp_path.as_uri()) as folder:
        everything = {key(number): b"" for number in range(2500)}
        for start in range(0, 2500, 250):
            folder.set_many(dict(list(everything.items())[start : start + 250]), None)
        assert sorted(folder.scan("eo1.")) == sorted(everything)


def test_the_backend_ends_with_its_last_reference() -> None:
    before = {*threading.enumerate()}
    made = ObjectsBackend(url="memory://")
    made.get_many([key(1)])
    (thread,) = (one for one in {*threading.enumerate()} - before if one.name == "embedonce: the objects backend")
    del made
    thread.join(60)
    assert not thread.is_alive()


def test_a_closed_backend_lists_nothing() -> None:
    made = ObjectsBackend(url="memory://")
    made.close()
    with pytest.raises(CacheClosed):
        list(made.scan(""))
