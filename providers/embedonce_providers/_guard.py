"""Reads the answers of an endpoint before a vendor's client does.

An answer may be small on the network and unpack to gigabytes, may point to another host, and may repeat a key. The
hooks of this module, for an httpx client, raise an error for an answer that is too large and for a redirect, and remove
keys from answers.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from urllib.parse import urljoin, urlsplit

from embedonce import ProviderError

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
    """The hooks of a client for one endpoint.

    Args:
        dimensions: number of dimensions of the vectors, or None if it is not known.
        timeout: maximum number of seconds in which an answer is read.
        list_secrets: function that returns the keys that the endpoint may repeat.
        raises: whether the hooks raise an error. Otherwise they note it, because the client would repeat the request
            after an exception. :func:`find_error` then returns the error.
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
            body = self._start(response)
            for chunk in response.stream:
                body.add(chunk)
        except ProviderError as error:
            response.close()
            self._fail(response, error)
        else:
            response.close()
            self._set_content(response, body.content)

    async def aread(self, response: Any) -> None:
        """Async twin of :meth:`read`."""
        try:
            body = self._start(response)
            async for chunk in response.stream:
                body.add(chunk)
        except ProviderError as error:
            await response.aclose()
            self._fail(response, error)
        else:
            await response.aclose()
            self._set_content(response, body.content)

    def _start(self, response: Any) -> _Body:
        status = response.status_code
        if 300 <= status < 400 and "location" in response.headers:
            message = _explain_redirect(response)
            del response.headers["location"]  # the client would read it, and fail if it is no URL
            raise ProviderError(message)
        limit = BASE_BYTES + _texts.get() * self._dimensions * BYTES_PER_NUMBER
        if status >= 400:
            limit = min(limit, MAX_ERROR_BYTES)
        return _Body(response, limit, time.monotonic() + self._timeout)

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
            package = __import__(type(self._response).__module__.partition(".")[0])
            raise package.ReadTimeout("the answer did not arrive in time", request=self._response.request)
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


def find_error(response: Any) -> ProviderError | None:
    """Return the error that a guard has noted for an answer, or None."""
    extensions = getattr(response, "extensions", None)
    error = extensions.get(_ERROR) if isinstance(extensions, dict) else None
    return error if isinstance(error, ProviderError) else None


def _explain_redirect(response: Any) -> str:
    """Return a message that names the scheme and the host of a redirect, but no path, query or credentials."""
    target = urlsplit(urljoin(str(response.request.url), response.headers["location"]))
    try:
        port = "" if target.port is None else f":{target.port}"
    except ValueError:
        port = ""
    host = "".join(c for c in target.hostname or "another place" if c.isprintable())[:100]
    return (
        f"the endpoint answered with status {response.status_code}, a redirect to {target.scheme[:20]}://{host}{port}. "
        "embedonce does not follow it, because texts and keys would go to a place that the configuration does not "
        "name; set base_url to the right URL"
    )
