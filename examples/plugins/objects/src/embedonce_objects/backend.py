"""The objects tier: one object per frame in S3, Google Cloud Storage, Azure, or a folder, through obstore.

A batch is as many requests as it has keys, many at a time. ``README.md`` tells how space is freed, since
an object store does not forget by itself.
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

KEYS = 256
"""Keys of one call."""
LISTED = 1000
"""Keys of one page of a listing."""
GRACE_SECONDS = 0.05
FOLDER = 20
"""Characters of a key that name the folder of its object: ``eo1.`` and a scope. A store lists by whole folders."""

# The breaker and the timeout are the tier's: a client that tries again for minutes would only hide what is wrong.
CLIENT: ClientConfig = {"connect_timeout": "5s", "timeout": "60s"}
RETRY: RetryConfig = {"max_retries": 1}

NO_BUCKET = {"NoSuchBucket", "ContainerNotFound", "notFound"}
REFUSED = {
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
    """Holds each frame as an object; whoever has the same bucket and prefix shares them."""

    def __init__(
        self,
        *,
        url: Annotated[
            str, Doc("s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///folder, memory://")
        ],
        endpoint: Annotated[str | None, Doc("S3: where a store other than Amazon's is, as http://host:port.")] = None,
        region: Annotated[str | None, Doc("S3: region of the bucket.")] = None,
        access_key_id: Annotated[str | None, Doc("S3: who asks; else from the environment, as AWS's tools do.")] = None,
        secret_access_key: Annotated[str | None, Doc("S3: the key of access_key_id.")] = None,
        concurrency: Annotated[int, Ge(1), Le(1000), Doc("Requests of one call at once.")] = 64,
    ) -> None:
        s3 = {
            "endpoint": endpoint,
            "region": region,
            "access_key_id": access_key_id,
            "secret_access_key": secret_access_key,
        }
        self._objects = _Objects(url, {name: value for name, value in s3.items() if value is not None}, concurrency)
        self._background = BackgroundLoop("the objects backend", at_end=_let_go)
        scope = self._objects.scope
        self.capabilities = Capabilities(
            scope=scope,
            deadline=True,
            fork=False,
            max_batch=KEYS,
            delete=True,
            scan=True,
            # A lease that has run out is taken over by a conditional write, which a folder does not have.
            add=scope == "network",
            twin=True,
            bounded=False,
        )

    def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return what is there, by one GET per key.

        Raises:
            TierError: the bucket is not there, or the credentials are refused.
        """
        return self._run(self._objects.get_many, keys)

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item, by one PUT each. ``ttl`` does nothing: the bucket's lifecycle rule frees space."""
        self._run(self._objects.set_many, items)

    def add_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> set[str]:
        """Store the items whose key is absent, or older than ``ttl``, and return those keys; one caller gets each."""
        return self._run(lambda given: self._objects.add_many(given, ttl), items)

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys, by one DELETE each. A bucket that keeps versions keeps them."""
        self._run(self._objects.delete_many, keys)

    def scan(self, prefix: str, /) -> Iterator[str]:
        """Yield the keys that start with ``prefix``, page by page. What is stored meanwhile may be missing."""
        pages = self._objects.pages(prefix)
        while True:
            page = self._run(self._objects.page, pages)
            if page is None:
                return
            yield from (key for key in page if key.startswith(prefix))

    def twin(self) -> ObjectsTwin:
        """Return an async client of the same store: obstore's own is asynchronous."""
        return ObjectsTwin(self._objects)

    def close(self) -> None:
        """End what is under way."""
        self._background.close()

    def _run(self, call: Callable[[G], Coroutine[Any, Any, T]], given: G) -> T:
        return self._background.run(lambda: call(given), time_left())


async def _let_go() -> None:
    # obstore's threads let go of their last Python objects a moment after a call has returned. A program that ends in
    # that moment is aborted by the interpreter.
    await asyncio.sleep(GRACE_SECONDS)


class ObjectsTwin:
    """The same store for one event loop."""

    def __init__(self, objects: _Objects) -> None:
        self._objects = objects
        self._closed = False

    async def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return what is there."""
        self._check_open()
        return await self._objects.get_many(keys)

    async def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item."""
        self._check_open()
        await self._objects.set_many(items)

    async def close(self) -> None:
        """Do nothing but refuse further calls: connections belong to the store, which every loop shares."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise CacheClosed("the objects backend's async client is closed")
        self._objects.store()


class _Objects:
    """The store and what is asked of it, for both faces."""

    def __init__(self, url: str, s3: Mapping[str, str], concurrency: int) -> None:
        parts = urlsplit(url)
        self.place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        """The url without what may be secret in it."""
        self.scope: Literal["process", "host", "network"]
        self._concurrency = concurrency
        self._store: ObjectStore | None = None
        self._folder: Path | None = None
        if s3 and parts.scheme not in ("s3", "s3a"):
            raise ConfigError(f"{', '.join(s3)}: only for an url that begins with s3://")
        if parts.scheme == "file":
            self.scope = "host"
            self._folder = _folder(url)
        elif parts.scheme == "memory":
            self.scope = "process"
            self._store = MemoryStore()
        else:
            self.scope = "network"
            self._store = self._remote(url, s3)

    def _remote(self, url: str, s3: Mapping[str, str]) -> ObjectStore:
        # obstore refuses plain http unless told; an endpoint that says so is being told.
        plain = s3.get("endpoint", "").startswith("http://")
        client: ClientConfig = {**CLIENT, "allow_http": True} if plain else CLIENT
        try:
            return from_url(url, client_options=client, retry_config=RETRY, **s3)  # type: ignore[call-overload, no-any-return]
        except (BaseError, ValueError):
            raise ConfigError(
                f"{self.place} is no place for objects; one is like s3://bucket/prefix, gs://bucket/prefix, "
                "az://container/prefix, file:///folder or memory://"
            ) from None  # its own text repeats what it was given

    def store(self) -> ObjectStore:
        """Return the client.

        Raises:
            TierError: the process that this one was forked from has used it.
        """
        time_left()
        _check_process()
        if self._store is None:
            try:
                self._store = LocalStore(self._folder, mkdir=True)
            except (BaseError, OSError) as error:
                raise ConfigError(f"{self.place}: the folder cannot be made ({str(error).splitlines()[0]})") from None
        return self._store

    async def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        store, found = self.store(), dict[str, bytes]()

        async def get(key: str) -> None:
            try:
                answer = await obstore.get_async(store, _path(key))
                found[key] = (await answer.bytes_async()).to_bytes()
            except FileNotFoundError as error:
                if _code(error) in NO_BUCKET:
                    raise

        await self._each(set(keys), get)
        return found

    async def set_many(self, items: Mapping[str, bytes]) -> None:
        store = self.store()

        async def put(key: str) -> None:
            await obstore.put_async(store, _path(key), items[key], use_multipart=False)

        await self._each(items, put)

    async def add_many(self, items: Mapping[str, bytes], ttl: float | None) -> set[str]:
        store, added = self.store(), set[str]()

        async def add(key: str) -> None:
            try:
                await obstore.put_async(store, _path(key), items[key], mode="create")
                added.add(key)
            except AlreadyExistsError:
                if ttl is not None and await self._take_over(store, _path(key), items[key], timedelta(seconds=ttl)):
                    added.add(key)

        await self._each(items, add)
        return added

    async def _take_over(self, store: ObjectStore, path: str, value: bytes, ttl: timedelta) -> bool:
        """Replace an object that is older than ``ttl``, unless somebody else does."""
        try:
            there = await obstore.head_async(store, path)
            if datetime.now(UTC) - there["last_modified"] < ttl:
                return False
            unchanged: UpdateVersion = {"e_tag": there["e_tag"]}
            if there["version"] is not None:
                unchanged["version"] = there["version"]
            await obstore.put_async(store, path, value, mode=unchanged)
        except (FileNotFoundError, PreconditionError):
            return False
        return True

    async def delete_many(self, keys: Sequence[str]) -> None:
        store = self.store()

        async def delete(key: str) -> None:
            try:
                await obstore.delete_async(store, _path(key))
            except FileNotFoundError as error:
                if _code(error) in NO_BUCKET:
                    raise

        await self._each(set(keys), delete)

    def pages(self, prefix: str) -> Any:
        """Return the listing of the folder that holds keys with this prefix, or of all."""
        folder = prefix[:FOLDER] if len(prefix) >= FOLDER else None
        return obstore.list(self.store(), folder, chunk_size=LISTED)

    async def page(self, pages: Any) -> list[str] | None:
        """Return the keys of the next page, None after the last."""
        try:
            found = await anext(pages, None)
        except BaseError as error:
            raise self._explained(error) from None
        return None if found is None else [one["path"].rpartition("/")[2] for one in found]

    async def _each(self, keys: Iterable[str], call: Callable[[str], Awaitable[None]]) -> None:
        """Call it for every key, ``concurrency`` at a time; the first failure ends the others."""
        names = list(keys)
        left = iter(names)

        async def work() -> None:
            for key in left:
                await call(key)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(names))):
                    group.create_task(work())
        except BaseExceptionGroup as failed:
            raise self._explained(failed.exceptions[0]) from None

    def _explained(self, error: BaseException) -> BaseException:
        """Return the exception that says what is wrong and what to do; of what a server sent it repeats a code."""
        if not isinstance(error, BaseError | OSError):
            return error
        code = _code(error)
        if code in NO_BUCKET:
            return TierError(f"{self.place}: there is no such bucket; make it, or correct the url")
        if code in REFUSED:
            return TierError(f"{self.place}: the store refuses these credentials ({code})")
        if "error sending request" in str(error):
            return TierError(f"{self.place}: the store cannot be reached")
        return TierError(f"{self.place}: {type(error).__name__}{f' ({code})' if code else ''}")


def _path(key: str) -> str:
    return f"{key[:FOLDER]}/{key}"


def _folder(url: str) -> Path:
    parts = urlsplit(url)
    folder = Path(unquote(parts.path))
    if parts.netloc or not folder.is_absolute():
        raise ConfigError(f'{url}: a folder is given from the root on, as in "file:///var/cache/vectors"')
    return folder


def _code(error: BaseException) -> str | None:
    """Return the code in a server's answer, else its HTTP status."""
    said = str(error)
    found = re.search(r"<Code>(\w+)</Code>", said) or re.search(r'"reason": "(\w+)"', said)
    found = found or re.search(r"status code: \d+ (\w+)", said)
    return found[1] if found else None


_used_in: int | None = None


def _check_process() -> None:
    """Refuse to go on in a forked child: obstore's threads are the parent's, and a call would wait for ever."""
    global _used_in
    _used_in = _used_in or os.getpid()
    if _used_in != os.getpid():
        raise TierError(
            "the objects tier was used before this process was forked, and obstore cannot go on in it; "
            'start processes with spawn (multiprocessing.set_start_method("spawn")), or fork before the first use'
        )


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    """Name this file's backend."""
    return {"objects": ObjectsBackend}
