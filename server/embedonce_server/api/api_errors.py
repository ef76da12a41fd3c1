"""Errors in OpenAI's form, with statuses that OpenAI's clients understand."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from embedonce import (
    CacheClosed,
    DriftError,
    EmbedonceError,
    ProviderError,
    ReplayMiss,
    SpaceError,
    TextError,
    TextRefused,
    TierError,
)
from embedonce.errors import ErrorInAnswer
from embedonce.provider_errors import read_status, read_wait

INVALID = "invalid_request_error"
UPSTREAM = "upstream_error"

_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_MAX_POSITIONS = 20
"""Number of positions that a message lists."""

_MAX_CAUSES = 8

MAX_WAIT = 24 * 3600.0
"""Most seconds of a Retry-After that come from an upstream."""

_RETRIED = frozenset({408, 409, 425, 429})
"""Statuses below 500 after which a client may send the same request again."""

_INVALID_ANSWERS = (
    (", a redirect to ", "the endpoint answered with a redirect; the administrator must correct base_url"),
    (" is not JSON", "the endpoint's answer is not JSON; the administrator must check base_url"),
    (" bytes; it was not read further", "the endpoint's answer is too large"),
    (" bytes; check base_url", "the endpoint's answer is too large"),
    ("compress", "the endpoint's answer is compressed in a way that cannot be read"),
    (" no vector for ", "it has no vector for a text"),
    ("dimension", "its vectors have the wrong number of dimensions"),
    ("values that are not numbers", "it has values that are not numbers"),
    ("only embeddings that are neither ", "it has values that are not numbers"),
    (" NaN or infinity", "it has NaN or infinity"),
    (" a vector of zeros", "it has a vector of zeros"),
    (" cannot be rounded ", "it has a vector that cannot be rounded"),
    (" none was stored", "it does not have exactly one vector per text"),
    ("one vector per text", "it does not have exactly one vector per text"),
    (" which vector belongs to which text", "it does not show which vector belongs to which text"),
)
"""Words of the messages about invalid answers, and what clients are told. A message itself may have parts of an answer,
which may repeat texts or name internal addresses."""

_REFUSALS = (
    (re.compile(r"an empty text has no embedding"), "an empty text has no embedding"),
    (re.compile(r"a text has more than (\d+) tokens"), "more than {} tokens"),
    (re.compile(r"a text has more tokens than the endpoint accepts"), "more tokens than the model accepts"),
    (re.compile(r"a text has no word that the model knows"), "no word that the model knows"),
    (re.compile(r"with token_inputs, each text must be"), "no list of token numbers"),
)
"""Beginnings of the messages about refused texts, and what clients are told."""


class ApiError(Exception):
    """A request that is answered with an error. The message has no text of the request, and no secret."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
        **details: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.details = details
        self.model = ""
        """Name of the served model that the request asked for, if it is known."""
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after)))

    def to_body(self) -> bytes:
        """Return the body of the answer: ``{"error": {"message", "type", "param", "code", …}}``."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code, **self.details}
        return orjson.dumps({"error": error})


def make_stopping() -> ApiError:
    """Return the answer to a request that the server cannot answer, because it stops."""
    return ApiError(503, "the server is stopping", kind="server_error", code="stopping", retry_after=1)


def list_positions(positions: list[int]) -> str:
    """Return positions for a message, such as ``0, 4 and 7``. A long list is cut."""
    shown = [str(position) for position in positions[:_MAX_POSITIONS]]
    if len(positions) > _MAX_POSITIONS:
        return f"{', '.join(shown)} and {len(positions) - _MAX_POSITIONS} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def explain_failures(failed: Mapping[int, Exception], count: int, *, is_stored: bool) -> ApiError:
    """Return the answer to a request of which some inputs failed. ``count`` is the number of its inputs.

    ``is_stored`` says whether the vectors of the other inputs are hits when the same request comes again. An error that
    concerns the whole request comes before an error of a single input.
    """
    for error in failed.values():
        if isinstance(error, ApiError):  # a limit of the server itself
            return error
    whole = [position for position, error in failed.items() if not _is_of_input(error)]
    first = min(whole or failed)
    error = failed[first]
    same = sorted(position for position, error in failed.items() if type(error) is type(failed[first]))
    return _explain(error, same, count, others_kept=is_stored and len(failed) < count)


def explain_error(error: EmbedonceError, count: int) -> ApiError:
    """Return the answer to a request of ``count`` inputs that failed as a whole."""
    return _explain(error, list(range(count)), count, others_kept=False)


def _is_of_input(error: Exception) -> bool:
    return isinstance(error, TextError | TextRefused)


def _explain(error: Exception, positions: list[int], count: int, *, others_kept: bool) -> ApiError:
    is_one = len(positions) == 1
    where = "the input" if count == 1 else f"input{'' if is_one else 's'} {list_positions(positions)}"
    be = "is" if is_one else "are"
    kept = " The vectors of the other inputs are stored, so a repeated request does not pay for them." * others_kept
    if isinstance(error, TextError):
        return ApiError(400, f"{where} {be} not valid Unicode, because of a lone surrogate.{kept}", param="input")
    if isinstance(error, TextRefused):
        return ApiError(400, f"{where} cannot be embedded: {_describe(error)}.{kept}", param="input")
    if isinstance(error, ReplayMiss):
        message = f'{where} {be} not in the cache, and mode = "replay" computes nothing'
        return ApiError(404, message, param="input", code="not_cached", positions=positions)
    if isinstance(error, SpaceError):
        return ApiError(400, f"{error}")
    status = read_status(error)
    if status in (401, 403):
        message = (
            f"the endpoint of the model refused the server's own key with status {status}; the administrator of this "
            f"server must correct api_key of the model.{kept}"
        )
        wait = _read_wait(error, status)
        return ApiError(status, message, kind=UPSTREAM, code="upstream_unauthorized", retry_after=wait)
    if status is not None:
        what = f"an error (code {status})" if isinstance(error, ErrorInAnswer) else f"status {status}"
        return ApiError(
            status,
            f"the endpoint of the model answered with {what} for {where}.{kept}",
            kind="rate_limit_error" if status == 429 else UPSTREAM,
            code=_read_code(error),
            retry_after=_read_wait(error, status),
        )
    if is_timeout(error):
        return ApiError(504, f"the model did not answer in time for {where}.{kept}", kind=UPSTREAM, code="timeout")
    if isinstance(error, DriftError):
        message = "the model has changed: it no longer returns the vectors that are stored; tell the administrator"
        return ApiError(502, message, kind=UPSTREAM, code="drift")
    if isinstance(error, ErrorInAnswer):
        code = _read_code(error)
        shown = "" if code is None else f" (code {code})"
        return ApiError(
            502, f"the model's answer for {where} contains an error{shown}.{kept}", kind=UPSTREAM, code=code
        )
    if isinstance(error, ProviderError):
        message = f"the model's answer for {where} was refused: {describe_invalid_answer(error)}.{kept}"
        return ApiError(502, message, kind=UPSTREAM)
    if isinstance(error, TierError):
        tier = "a tier" if error.tier is None else f'tier "{error.tier}"'
        message = f'{tier} failed, and its on_error is "raise"'
        return ApiError(503, message, kind="server_error", code="tier_error", retry_after=1)
    if isinstance(error, CacheClosed):
        return make_stopping()
    name = type(error).__name__
    if is_connection_error(error):
        message = f"the server cannot reach the endpoint of the model ({name}); try again later.{kept}"
    else:
        message = f"the model could not be called for {where} ({name}).{kept}"
    return ApiError(502, message, kind=UPSTREAM)


def is_timeout(error: Exception) -> bool:
    """Return whether a call of a provider took too long. Clients of HTTP have timeouts of their own."""
    return isinstance(error, TimeoutError) or _has_name(error, "Timeout")


def is_connection_error(error: Exception) -> bool:
    """Return whether a provider's endpoint could not be reached."""
    return isinstance(error, ConnectionError) or _has_name(error, "Connect")


def _has_name(error: Exception, part: str) -> bool:
    return any(part in kind.__name__ for kind in type(error).__mro__)


def _describe(error: TextRefused) -> str:
    """Return the reason of a refusal. A provider's own message may contain a text, so only known reasons are shown."""
    for begin, shown in _REFUSALS:
        if found := begin.match(str(error)):
            return shown.format(*found.groups())
    return "the model refuses it"


def describe_invalid_answer(error: ProviderError) -> str:
    """Return why an answer was refused, in words that do not come from the answer."""
    message = str(error)
    return next((shown for words, shown in _INVALID_ANSWERS if words in message), "it is invalid")


def _read_wait(error: Exception, status: int) -> float | None:
    """Return the seconds that an upstream asks to wait, or None.

    Many endpoints say in every answer when a limit is reset. After a status that a client does not retry, only
    ``Retry-After`` counts.
    """
    is_retried = status >= 500 or status in _RETRIED
    seconds = read_wait(error) if is_retried or _has_retry_after(error) else None
    return None if seconds is None else min(seconds, MAX_WAIT)


def _has_retry_after(error: Exception) -> bool:
    found = [getattr(getattr(one, "response", None), "headers", None) for one in _list_causes(error)]
    return any(isinstance(headers, Mapping) and "retry-after" in headers for headers in found)


def _list_causes(error: Exception) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from. An error may be its own cause, so the number is bounded."""
    current: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if current is None:
            return
        yield current
        current = current.__cause__


def _read_code(error: Exception) -> str | None:
    """Return the code of an upstream's error, such as ``insufficient_quota``, if it looks like a code."""
    codes = [getattr(one, "code", None) for one in _list_causes(error)]
    return next((code for code in codes if isinstance(code, str) and _CODE.fullmatch(code)), None)


def render(error: ApiError) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Return the body and the headers of an answer."""
    body = error.to_body()
    pairs = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    pairs += [(name.encode(), value.encode("latin-1")) for name, value in error.headers.items()]
    return body, pairs
