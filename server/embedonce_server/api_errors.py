"""Errors in OpenAI's form, with statuses that OpenAI's clients understand."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import orjson

from embedonce import (
    CacheClosed,
    DriftError,
    ProviderError,
    ReplayMiss,
    SpaceError,
    TextError,
    TextRefused,
    TierError,
)
from embedonce.provider_errors import read_status, read_wait

INVALID = "invalid_request_error"
UPSTREAM = "upstream_error"

_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_MAX_POSITIONS = 20
"""Number of positions that a message lists."""


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


def list_positions(positions: list[int]) -> str:
    """Return positions for a message, such as ``0, 4 and 7``. A long list is cut."""
    shown = [str(position) for position in positions[:_MAX_POSITIONS]]
    if len(positions) > _MAX_POSITIONS:
        return f"{', '.join(shown)} and {len(positions) - _MAX_POSITIONS} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def explain_failures(failed: Mapping[int, Exception], count: int) -> ApiError:
    """Return the answer to a request of which some inputs failed. ``count`` is the number of its inputs.

    An error that concerns the whole request comes before an error of a single input.
    """
    whole = [position for position, error in failed.items() if not _is_of_input(error)]
    first = min(whole or failed)
    same = sorted(position for position, error in failed.items() if type(error) is type(failed[first]))
    return _explain(failed[first], same, count, others_kept=len(failed) < count)


def _is_of_input(error: Exception) -> bool:
    return isinstance(error, TextError | TextRefused)


def _explain(error: Exception, positions: list[int], count: int, *, others_kept: bool) -> ApiError:
    where = "the input" if count == 1 else f"input {list_positions(positions)}"
    kept = " The vectors of the other inputs are stored, so a repeated request does not pay for them." * others_kept
    if isinstance(error, TextError):
        return ApiError(400, f"{where} is not valid Unicode: it has a lone surrogate.{kept}", param="input")
    if isinstance(error, TextRefused):
        return ApiError(400, f"{where} cannot be embedded: {_describe(error)}.{kept}", param="input")
    if isinstance(error, ReplayMiss):
        message = f'{where} is not in the cache, and mode = "replay" computes nothing'
        return ApiError(404, message, param="input", code="not_cached", positions=positions)
    if isinstance(error, SpaceError):
        return ApiError(400, f"{error}", param="input_type")
    status = read_status(error)
    if status in (401, 403):
        message = (
            f"the endpoint of the model refused the server's own key with status {status}; the administrator of this "
            f"server must correct api_key of the model.{kept}"
        )
        return ApiError(status, message, kind=UPSTREAM, code="upstream_unauthorized")
    if status is not None:
        return ApiError(
            status,
            f"the endpoint of the model answered with status {status} for {where}.{kept}",
            kind="rate_limit_error" if status == 429 else UPSTREAM,
            code=_read_code(error),
            retry_after=read_wait(error) if status in (429, 503) else None,
        )
    if is_timeout(error):
        return ApiError(504, f"the model did not answer in time for {where}.{kept}", kind=UPSTREAM, code="timeout")
    if isinstance(error, DriftError):
        return ApiError(502, f"{error}", kind=UPSTREAM, code="drift")
    if isinstance(error, ProviderError):
        return ApiError(502, f"the model's answer was refused for {where}: {error}.{kept}", kind=UPSTREAM)
    if isinstance(error, TierError):
        tier = "a tier" if error.tier is None else f'tier "{error.tier}"'
        message = f'{tier} failed, and its on_error is "raise"'
        return ApiError(503, message, kind="server_error", code="tier_error", retry_after=1)
    if isinstance(error, CacheClosed):
        return ApiError(503, "the server is stopping", kind="server_error", code="stopping", retry_after=1)
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
    """Return the reason of a refusal. A provider's own message may contain a text, so only embedonce's are shown."""
    return str(error) if error.__cause__ is None else "the model refuses it"


def _read_code(error: Exception) -> str | None:
    """Return the code of an upstream's error, such as ``insufficient_quota``, if it looks like a code."""
    current: BaseException | None = error
    while current is not None:
        code = getattr(current, "code", None)
        if isinstance(code, str) and _CODE.fullmatch(code):
            return code
        current = current.__cause__
    return None


def render(error: ApiError) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
    """Return the status, the body and the headers of an answer."""
    body = error.to_body()
    pairs = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    pairs += [(name.encode(), value.encode("latin-1")) for name, value in error.headers.items()]
    return error.status, body, pairs
