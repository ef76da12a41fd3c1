"""The objects tier: one object per frame in S3, Google Cloud Storage, Azure, or a folder, through obstore.

A batch is one request per key, with many requests at a time. An object store does not expire objects by itself;
``README.md`` says how to free space.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
from annotated_types import Ge, Le
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import LocalStore, MemoryStore, from_url

from embedonce import hookimpl
from embedonce.background import BackgroundLoop
from embedonce.contracts import Capabilities, time_left
from embedonce.errors import CacheClosed, ConfigError, TierError
from embedonce.options import Doc

if TYPE_CHECKING:
    from obstore import UpdateVersion
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

api = 1

G = TypeVar("G")
T = TypeVar("T")

MAX_KEYS = 256
"""Maximum keys per call."""
PAGE_KEYS = 1000
"""Keys per page of a listing."""
GRACE_SECONDS = 0.05
FOLDER_LENGTH = 20
"""Length of the part of a key (``eo1.`` and a scope) that names its object's folder. A store lists whole folders."""

# The tier has a breaker and a timeout. A client that retries for minutes would only hide the problem.
CLIENT: ClientConfig = {"connect_timeout": "5s", "timeout": "60s"}
RETRY: RetryConfig = {"max_retries": 1}

MISSING_BUCKET_CODES = {"NoSuchBucket", "ContainerNotFound", "notFound"}
REFUSED_CODES = {
    "AccessDenied",
    "AuthenticationFailed",
    "ExpiredToken",
    "Forbidden",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "Unauthorized",
}


class ObjectsBackend:
    """Holds each frame as an object. All backends with the same bucket and prefix share their frames."""

    def __init__(
        self,
        *,
        url: Annotated[
            str, Doc("s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///folder, memory://")
        ],
        endpoint: Annotated[
            str | None, Doc("S3: URL of a store other than Amazon's, such as http://host:port.")
        ] = None,
        region: Annotated[str | None, Doc("S3: region of the bucket.")] = None,
        access_key_id: Annotated[
            str | None, Doc("S3: id of the access key. Default: from the environment, as for AWS's tools.")
        ] = None,
        secret_access_key: Annotated[str | None, Doc("S3: the secret that belongs to access_key_id.")] = None,
        concurrency: Annotated[int, Ge(1), Le(1000), Doc("Requests in flight at once per call.")] = 64,
    ) -> None:
        s3 = {
            "endpoint": endpoint,
            "region": region,
            "access_key_id": access_key_id,
            "secret_access_key": secret_access_key,
        }
        self._objects = _Objects(url, {name: value for name, value in s3.items() if value is not None}, concurrency)
        self._background = BackgroundLoop("the objects backend", at_end=_wait_for_threads)
        scope = self._objects.scope
        self.capabilities = Capabilities(
            scope=scope,
            deadline=True,
            fork=False,
            max_batch=MAX_KEYS,
            delete=True,
            scan=True,
            # Taking over an expired lease needs a conditional write, which a folder does not support.
            add=scope == "network",
            twin=True,
            bounded=False,
        )

    def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return the frames of the keys that exist, with one GET per key.

        Raises:
            TierError: the bucket does not exist, or the store refuses the credentials.
        """
        return self._run(self._objects.get_many, keys)

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item, with one PUT each. ``ttl`` is ignored, because the bucket's lifecycle rule frees space."""
        self._run(self._objects.set_many, items)

    def add_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> set[str]:
        """Store the items whose key is absent or older than ``ttl``, and return these keys.

        If several callers try the same key at once, only one gets it.
        """
        return self._run(lambda given: self._objects.add_many(given, ttl), items)

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys, with one DELETE each. A bucket with versioning keeps them as old versions."""
        self._run(self._objects.delete_many, keys)

    def scan(self, prefix: str, /) -> Iterator[str]:
        """Yield the keys that start with ``prefix``, page by page. Keys stored during the scan may be missing."""
        pages = self._objects.list_pages(prefix)
        while True:
            page = self._run(self._objects.read_page, pages)
            if page is None:
                return
            yield from (key for key in page if key.startswith(prefix))

    def twin(self) -> ObjectsTwin:
        """Return an async client of the same store. Any event loop can use it, because obstore itself is async."""
        return ObjectsTwin(self._objects)

    def close(self) -> None:
        """Cancel the calls in flight."""
        self._background.close()

    def _run(self, call: Callable[[G], Coroutine[Any, Any, T]], given: G) -> T:
        return self._background.run(lambda: call(given), time_left())


async def _wait_for_threads() -> None:
    # obstore's threads release their last Python objects shortly after a call has returned. If the program exits in
    # that moment, the interpreter aborts it.
    await asyncio.sleep(GRACE_SECONDS)


class ObjectsTwin:
    """Access to the same store from one event loop."""

    def __init__(self, objects: _Objects) -> None:
        self._objects = objects
        self._closed = False

    async def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return the frames of the keys that exist."""
        self._check_open()
        return await self._objects.get_many(keys)

    async def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item."""
        self._check_open()
        await self._objects.set_many(items)

    async def close(self) -> None:
        """Refuse further calls. The connections stay open, because all event loops share the store."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise CacheClosed("the objects backend's async client is closed")
        self._objects.get_store()


class _Objects:
    """The store and its operations, for the blocking and the async interface."""

    def __init__(self, url: str, s3: Mapping[str, str], concurrency: int) -> None:
        parts = urlsplit(url)
        self.place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        """The URL without its parts that may be secret."""
        self.scope: Literal["process", "host", "network"]
        self._concurrency = concurrency
        self._store: ObjectStore | None = None
        self._folder: Path | None = None
        if s3 and parts.scheme not in ("s3", "s3a"):
            raise ConfigError(f"{', '.join(s3)}: valid only with a url that starts with s3://; remove it")
        if parts.scheme == "file":
            self.scope = "host"
            self._folder = _parse_folder(url)
        elif parts.scheme == "memory":
            self.scope = "process"
            self._store = MemoryStore()
        else:
            self.scope = "network"
            self._store = self._make_remote_store(url, s3)

    def _make_remote_store(self, url: str, s3: Mapping[str, str]) -> ObjectStore:
        # obstore refuses plain HTTP by default. An endpoint that starts with http:// asks for it.
        is_plain = s3.get("endpoint", "").startswith("http://")
        client: ClientConfig = {**CLIENT, "allow_http": True} if is_plain else CLIENT
        try:
            return from_url(url, client_options=client, retry_config=RETRY, **s3)  # type: ignore[call-overload, no-any-return]
        except (BaseError, ValueError):
            raise ConfigError(
                f"{self.place} is not a valid url of an object store; use s3://bucket/prefix, gs://bucket/prefix, "
                "az://container/prefix, file:///folder or memory://"
            ) from None  # the original message repeats the url, which may hold secrets

    def get_store(self) -> ObjectStore:
        """Return the client.

        Raises:
            TierError: this process was forked from one that has used obstore.
            ConfigError: the folder cannot be created.
        """
        time_left()
        _check_process()
        if self._store is None:
            try:
                self._store = LocalStore(self._folder, mkdir=True)
            except (BaseError, OSError) as error:
                raise ConfigError(f"{self.place}: cannot create the folder ({str(error).splitlines()[0]})") from None
        return self._store

    async def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        store, found = self.get_store(), dict[str, bytes]()

        async def get(key: str) -> None:
            try:
                answer = await obstore.get_async(store, _object_path(key))
                found[key] = (await answer.bytes_async()).to_bytes()
            except FileNotFoundError as error:
                if _find_code(error) in MISSING_BUCKET_CODES:
                    raise

        await self._for_each(set(keys), get)
        return found

    async def set_many(self, items: Mapping[str, bytes]) -> None:
        store = self.get_store()

        async def put(key: str) -> None:
            await obstore.put_async(store, _object_path(key), items[key], use_multipart=False)

        await self._for_each(items, put)

    async def add_many(self, items: Mapping[str, bytes], ttl: float | None) -> set[str]:
        store, added = self.get_store(), set[str]()

        async def add(key: str) -> None:
            try:
                await obstore.put_async(store, _object_path(key), items[key], mode="create")
                added.add(key)
            except AlreadyExistsError:
                if ttl is not None and await self._take_over(
                    store, _object_path(key), items[key], timedelta(seconds=ttl)
                ):
                    added.add(key)

        await self._for_each(items, add)
        return added

    async def _take_over(self, store: ObjectStore, path: str, value: bytes, ttl: timedelta) -> bool:
        """Replace an object if it is older than ``ttl``, and return whether this succeeded before another process."""
        try:
            found = await obstore.head_async(store, path)
            if datetime.now(UTC) - found["last_modified"] < ttl:
                return False
            if_unchanged: UpdateVersion = {"e_tag": found["e_tag"]}
            if found["version"] is not None:
                if_unchanged["version"] = found["version"]
            await obstore.put_async(store, path, value, mode=if_unchanged)
        except (FileNotFoundError, PreconditionError):
            return False
        return True

    async def delete_many(self, keys: Sequence[str]) -> None:
        store = self.get_store()

        async def delete(key: str) -> None:
            try:
                await obstore.delete_async(store, _object_path(key))
            except FileNotFoundError as error:
                if _find_code(error) in MISSING_BUCKET_CODES:
                    raise

        await self._for_each(set(keys), delete)

    def list_pages(self, prefix: str) -> Any:
        """Return the listing of the folder that holds the keys with this prefix, or of all folders."""
        folder = prefix[:FOLDER_LENGTH] if len(prefix) >= FOLDER_LENGTH else None
        return obstore.list(self.get_store(), folder, chunk_size=PAGE_KEYS)

    async def read_page(self, pages: Any) -> list[str] | None:
        """Return the keys of the next page, None after the last page."""
        try:
            found = await anext(pages, None)
        except BaseError as error:
            raise self._translate(error) from None
        return None if found is None else [one["path"].rpartition("/")[2] for one in found]

    async def _for_each(self, keys: Iterable[str], call: Callable[[str], Awaitable[None]]) -> None:
        """Run ``call`` for every key, ``concurrency`` at a time. The first failure cancels the others."""
        names = list(keys)
        remaining = iter(names)

        async def work() -> None:
            for key in remaining:
                await call(key)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(names))):
                    group.create_task(work())
        except BaseExceptionGroup as failed:
            raise self._translate(failed.exceptions[0]) from None

    def _translate(self, error: BaseException) -> BaseException:
        """Return an exception that says what is wrong and what to do. It repeats only the code of a server's answer."""
        if not isinstance(error, BaseError | OSError):
            return error
        code = _find_code(error)
        if code in MISSING_BUCKET_CODES:
            return TierError(f"{self.place}: the bucket does not exist; create it, or correct the url")
        if code in REFUSED_CODES:
            return TierError(f"{self.place}: the store refuses the credentials ({code}); check them")
        if "error sending request" in str(error):
            return TierError(f"{self.place}: the store is unreachable; check the url and the network")
        return TierError(f"{self.place}: {type(error).__name__}{f' ({code})' if code else ''}")


def _object_path(key: str) -> str:
    return f"{key[:FOLDER_LENGTH]}/{key}"


def _parse_folder(url: str) -> Path:
    parts = urlsplit(url)
    folder = Path(unquote(parts.path))
    if parts.netloc or not folder.is_absolute():
        raise ConfigError(f'{url}: the folder must be an absolute path, such as "file:///var/cache/vectors"')
    return folder


def _find_code(error: BaseException) -> str | None:
    """Return the error code in a server's answer, or else the name of its HTTP status."""
    message = str(error)
    found = re.search(r"<Code>(\w+)</Code>", message) or re.search(r'"reason": "(\w+)"', message)
    found = found or re.search(r"status code: \d+ (\w+)", message)
    return found[1] if found else None


_used_in: int | None = None


def _check_process() -> None:
    """Raise an error in a forked child: obstore's threads exist only in the parent, so a call would wait for ever."""
    global _used_in
    _used_in = _used_in or os.getpid()
    if _used_in != os.getpid():
        raise TierError(
            "the objects tier was used before this process was forked, and obstore does not work in a forked process; "
            'start processes with spawn (multiprocessing.set_start_method("spawn")), or fork before the first use'
        )


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    """Return this module's backend by name."""
    return {"objects": ObjectsBackend}
