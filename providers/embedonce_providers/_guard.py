"""Reads the answers of an endpoint before a vendor's client does.

An answer may be small on the network and unpack to gigabytes, may point to another host, and may repeat a key. The
hooks of this module, for an httpx client, raise an error for an answer that is too large and for a redirect, and remove
keys from answers. The clients may be those of httpx or httpx2.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from typing import Any
from urllib.parse import urljoin, urlsplit

from embedonce import ProviderError
from embedonce.contracts import note_lost_request
from embedonce.event_loops import async_deadline

from ._reasons import CREDENTIALS, HIDDEN

BASE_BYTES = 64 * 1024
"""Bytes of an answer that are always accepted."""
BYTES_PER_NUMBER = 64
"""Bytes of an answer that are accepted for each number of each vector. JSON with indentation needs the most."""
MAX_DIMENSIONS = 16_384
"""Number of dimensions that is assumed if the configuration does not set it."""
MAX_ERROR_BYTES = 1024 * 1024
"""Bytes that are read of an answer with an error status."""
MIN_SECRET = 6
"""Minimum number of characters of a secret that is removed from answers. Removing a shorter one could remove ordinary
words."""
GRACES = 2
"""How often a step of an async attempt gets its timeout again because other tasks blocked the event loop. Giving the
attempt up would mean paying for the same texts again."""

ACCEPT_ENCODING = "gzip, deflate"
"""Compressions whose output can be limited while it is read."""

_ERROR = "embedonce_error"
_texts: ContextVar[int] = ContextVar("embedonce_texts_of_request", default=1)


@contextmanager
def expect_vectors(texts: int) -> Iterator[None]:
    """Record that each request in the ``with`` block asks for the vectors of at most ``texts`` texts."""
    token = _texts.set(texts)
    try:
        yield
    finally:
        _texts.reset(token)


class Guard:
    """Reads the answers of one endpoint: as a response hook of a blocking client, and in ``send`` of an async client.

    Args:
        dimensions: number of dimensions of the vectors, or None if it is not known.
        timeout: maximum number of seconds in which an answer is read.
        list_secrets: function that returns the keys that the endpoint may repeat.
        raises: whether the guard raises an error. Otherwise it notes the error, because the client would repeat the
            request after an exception. :func:`find_error` then returns the error.
    """

    def __init__(
        self,
        *,
        dimensions: int | None,
        timeout: float,
        list_secrets: Callable[[], Iterable[str | None]],
        raises: bool,
    ) -> None:
        self._dimensions = dimensions or MAX_DIMENSIONS
        self._timeout = timeout
        self._list_secrets = list_secrets
        self._raises = raises

    def read(self, response: Any) -> None:
        """Read the answer, for a blocking client.

        Raises:
            ProviderError: the answer is a redirect, is too large, or is compressed in another way than asked for.
        """
        try:
            body = self._start(response, time.monotonic() + self._timeout)
            for chunk in response.stream:
                body.add(chunk)
        except ProviderError as error:
            response.close()
            self._fail(response, error)
        else:
            response.close()
            self._set_content(response, body.content)

    def make_client(self, client_class: type[Any], **options: Any) -> Any:
        """Make a blocking client, such as an ``httpx.Client``, whose answers this guard reads."""
        hooks = options.pop("event_hooks", {})
        hooks = {**hooks, "response": [self.read, *hooks.get("response", ())]}

        def send(client: Any, request: Any, **other: Any) -> Any:
            with _note_if_lost():
                return client_class.send(client, request, **other)

        return type("GuardedClient", (client_class,), {"send": send})(event_hooks=hooks, **options)

    def make_async_client(self, client_class: type[Any], **options: Any) -> Any:
        """Make an async client, such as an ``httpx.AsyncClient``, whose answers this guard reads.

        The client's own timeouts also end an attempt whose answer has arrived while another task blocked the event
        loop. So they are replaced: the time until the answer begins and the time to read it are limited to ``timeout``
        seconds each, and time in which the loop was blocked does not count. The client raises its ``ReadTimeout``.
        """

        async def send(client: Any, request: Any, *, stream: bool = False, **other: Any) -> Any:
            request.extensions = {**request.extensions, "timeout": {}}
            with _note_if_lost():
                async with self._limit(request):
                    response = await client_class.send(client, request, stream=True, **other)
                try:
                    await self._aread(response)
                    if not stream:
                        await response.aread()
                except BaseException:
                    await response.aclose()
                    raise
            return response

        return type("GuardedAsyncClient", (client_class,), {"send": send})(**options)

    @asynccontextmanager
    async def _limit(self, request: Any) -> AsyncGenerator[None, None]:
        try:
            async with async_deadline(self._timeout, graces=GRACES):
                yield
        except TimeoutError as error:
            raise _make_timeout(request) from error

    async def _aread(self, response: Any) -> None:
        """Async twin of :meth:`read`."""
        try:
            body = self._start(response, math.inf)
            async with self._limit(response.request):
                async for chunk in response.stream:
                    body.add(chunk)
        except ProviderError as error:
            await response.aclose()
            self._fail(response, error)
        else:
            await response.aclose()
            self._set_content(response, body.content)

    def _start(self, response: Any, end: float) -> _Body:
        status = response.status_code
        if 300 <= status < 400 and "location" in response.headers:
            message = _explain_redirect(response)
            del response.headers["location"]  # the client would read it, and fail if it is no URL
            raise ProviderError(message)
        limit = BASE_BYTES + _texts.get() * self._dimensions * BYTES_PER_NUMBER
        if status >= 400:
            limit = min(limit, MAX_ERROR_BYTES)
        return _Body(response, limit, end)

    def _fail(self, response: Any, error: ProviderError) -> None:
        if self._raises:
            raise error
        response.extensions[_ERROR] = error
        self._set_content(response, b"")

    def _set_content(self, response: Any, content: bytes) -> None:
        """Give the client an answer with this content, without keys."""
        if response.status_code >= 400:
            content = self._mask(content, response.request.headers)
        for name in ("content-encoding", "content-length", "transfer-encoding"):
            response.headers.pop(name, None)
        fresh = type(response)(200, content=content)
        response.stream = fresh.stream
        response.is_closed = response.is_stream_consumed = False

    def _mask(self, content: bytes, headers: Mapping[str, str]) -> bytes:
        text = content.decode("utf-8", "replace")
        sent = [headers.get(name) for name in ("authorization", "api-key", "x-goog-api-key")]
        secrets = {part for value in [*self._list_secrets(), *sent] if value for part in (value, value.split()[-1])}
        for secret in sorted(secrets, key=len, reverse=True):
            if len(secret) >= MIN_SECRET:
                text = text.replace(secret, HIDDEN)
        return CREDENTIALS.sub(HIDDEN, text).encode("utf-8", "replace")


class _Body:
    """The content of one answer, as far as it has been read."""

    def __init__(self, response: Any, limit: int, end: float) -> None:
        self._response = response
        self._limit = limit
        self._end = end
        self._chunks: list[bytes] = []
        self._size = 0
        encoding = response.headers.get("content-encoding", "").strip().lower()
        if encoding in ("", "identity"):
            self._decoder = None
        elif encoding in ("gzip", "x-gzip", "deflate"):
            self._decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, as the first bytes say
        else:
            raise ProviderError(
                "the endpoint compresses its answers with a method that was not asked for; nothing was stored. Make it "
                "obey the request's Accept-Encoding, or use gzip"
            )

    @property
    def content(self) -> bytes:
        return b"".join(self._chunks)

    def add(self, chunk: bytes) -> None:
        """Add a chunk as it was received.

        Raises:
            ProviderError: the content is too large, or cannot be unpacked.
            TimeoutException: the time is over. It is the exception of the response's own package.
        """
        if time.monotonic() > self._end:
            raise _make_timeout(self._response.request)
        if self._decoder is not None:
            try:
                chunk = self._decoder.decompress(chunk, self._limit - self._size + 1)
            except zlib.error:
                raise ProviderError("the endpoint's compressed answer is damaged; nothing was stored") from None
        self._size += len(chunk)
        self._chunks.append(chunk)
        if self._size <= self._limit:
            return
        if self._response.status_code >= 400:
            raise ProviderError(
                f"the endpoint answered with status {self._response.status_code} and an error of more than "
                f"{self._limit:,} bytes; check base_url"
            )
        raise ProviderError(
            f"the endpoint's answer for {_texts.get():,} text(s) is larger than {self._limit:,} bytes; it "
            "was not read further, and nothing was stored. Check base_url. If the vectors have more than "
            f"{MAX_DIMENSIONS:,} dimensions, set dimensions"
        )


@contextmanager
def _note_if_lost() -> Iterator[None]:
    """Note a request that gets no answer in time, because the client may repeat it, and each one may be charged."""
    try:
        yield
    except BaseException as error:
        is_timeout = any("Timeout" in kind.__name__ for kind in type(error).__mro__)
        is_sent = not any(word in type(error).__name__ for word in ("Connect", "Pool"))
        is_ended = not isinstance(error, Exception)  # the call was cancelled
        if is_ended or (is_timeout and is_sent):
            note_lost_request()
        raise


def _make_timeout(request: Any) -> Exception:
    """Return a ReadTimeout of the request's own package, which the vendor's client knows."""
    package = __import__(type(request).__module__.partition(".")[0])
    error: Exception = package.ReadTimeout("the answer did not arrive in time", request=request)
    return error


def find_error(response: Any) -> ProviderError | None:
    """Return the error that a guard has noted for an answer, or None."""
    extensions = getattr(response, "extensions", None)
    error = extensions.get(_ERROR) if isinstance(extensions, dict) else None
    return error if isinstance(error, ProviderError) else None


def _explain_redirect(response: Any) -> str:
    """Return a message that names the scheme and the host of a redirect, but no path, query or credentials."""
    place = "an invalid URL"
    with suppress(ValueError):
        target = urlsplit(urljoin(str(response.request.url), response.headers["location"]))
        host = "".join(c for c in target.hostname or "" if c.isprintable())[:100]
        port = "" if target.port is None else f":{target.port}"
        place = f"{target.scheme[:20]}://{host}{port}" if host else place
    return (
        f"the endpoint answered with status {response.status_code}, a redirect to {place}. "
        "embedonce does not follow it, because texts and keys would go to a place that the configuration does not "
        "name; set base_url to the right URL"
    )
