"""What an exception of a provider says: whether one text can be its cause, and how long to wait.

No vendor's library is imported. Statuses are read from attributes, and kinds of errors from the names of classes,
because each vendor, and each framework around it, has exceptions of its own.
"""

from __future__ import annotations

import inspect
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from embedonce.errors import EmbedonceError, ErrorInAnswer, ProviderError, ReplayMiss, TextError, TextRefused

from .durations import parse_duration

Cause: TypeAlias = Literal["text", "overload", "rate", "call"]
"""The likely cause of a failed request. ``"text"``: one of its texts, or their number. ``"overload"``: the server has
too much to do. ``"rate"``: too many requests. ``"call"``: something that any other text would meet too, such as a wrong
key, a missing model, a broken connection or an error in a program."""

MAX_WRAPPED = 8
"""Maximum number of exceptions in a chain of causes that are read."""

MAX_CHARACTERS = 4000
"""Maximum number of characters of a message or body that are searched."""

_CALL_STATUSES = frozenset({401, 402, 403, 404, 407})
_OVERLOAD_STATUSES = frozenset({408, 502, 503, 504, 520, 521, 522, 523, 524, 529})
_NAMED_STATUSES = {
    "resource_exhausted": 429,
    "rate_limit_exceeded": 429,
    "too_many_requests": 429,
    "throttlingexception": 429,
    "unauthenticated": 401,
    "invalid_api_key": 401,
    "permission_denied": 403,
    "not_found": 404,
    "model_not_found": 404,
    "deploymentnotfound": 404,
    "invalid_argument": 400,
    "context_length_exceeded": 400,
    "unavailable": 503,
    "deadline_exceeded": 504,
    "internal": 500,
}
_PROGRAM_ERRORS = (NameError, ImportError, NotImplementedError)
"""Errors that any text would meet. Others, such as TypeError, may come from a client that cannot read one vector."""
_RATE_NAME = re.compile(r"RateLimit|TooManyRequests|Throttl|ResourceExhausted")
_ACCESS_NAME = re.compile(r"Authenticat|Unauthorized|PermissionDenied|Forbidden|InvalidApiKey|ModelNotFound")
_CONNECTION_NAME = re.compile(
    r"Connect(ion|or|)(Error|Timeout|Exception)|Timeout|TransportError|NetworkError|Disconnect"
)
_ACCESS_CODE = re.compile(
    r"\b(API_KEY_INVALID|invalid_api_key|incorrect_api_key|authentication_error|permission_error|permission_denied"
    r"|model_not_found|MODEL_NOT_FOUND|DeploymentNotFound|deployment_not_found|model_not_available|invalid_model"
    r"|AccessDeniedException|UnrecognizedClientException|ResourceNotFoundException)\b"
)
_ACCESS_TEXT = re.compile(
    r"\bapi[ _-]?key\b.{0,20}\b(not valid|invalid|incorrect|missing|required)"
    r"|\b(invalid|incorrect|missing|no) api[ _-]?key\b"
    r"|\b(the|this|your) (model|deployment)\b.{0,80}?\b(not found|not exist|does not exist|doesn't exist|not supported)"
    r"|\b(no such|unknown|unsupported) (model|deployment)\b(?! token)",
    re.IGNORECASE | re.DOTALL,
)

_FINAL_TEXT = re.compile(r"insufficient_quota|billing_hard_limit_reached|billing_not_active")

_UNITS = r"(?!\s*(?:k?tokens?|char|byte|[kmg]i?b\b|dim|s\b|ms\b|sec|min|words?))"
_LIMIT_TEXT = re.compile(
    r"(?:(?:larger|greater|more|fewer|less|longer) than(?: or equal to)?|at most|up to|no more than|exceeds?|only"
    r"|max(?:imum)?|limit(?:ed)?|<=?|>=?|between \d+ and)[^\d\n]{0,40}?"
    r"\b(\d{1,3}(?:[,\u00a0\u202f ]\d{3})+|\d{1,6})\b(?!\.\d)" + _UNITS,
    re.IGNORECASE,
)
_BATCH_TEXT = re.compile(
    r"\b(batch(?:es)?|inputs|texts|items|array|elements|instances|requests|documents|contents|sentences|prompts)\b"
    r"|maxItems",
    re.IGNORECASE,
)
_SIZE_TEXT = re.compile(
    r"tokens?\b|too (?:large|long)|length|characters|bytes|payload|entity|physical batch|memory", re.IGNORECASE
)

_RETRY_FIELD = re.compile(
    r"retry_?-?(?:delay|after|in)(?P<ms>_?-?ms)?[\"']?\s*(?::|=|\{)\s*[\"']?(?:\{?[\"']?seconds[\"']?\s*[:=]\s*[\"']?)?"
    r"(?P<time>\d+(?:\.\d+)?(?:[a-zµ]+(?:\d+(?:\.\d+)?[a-z]+)*)?)",
    re.IGNORECASE,
)
_RETRY_TEXT = re.compile(
    r"\b(?:try|retry|retrying|wait|again|available|resets?)\b[^\d\n]{0,40}?"
    r"(?P<time>\d+(?:\.\d+)?\s*(?:ms|milliseconds?|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h)(?![a-z])"
    r"(?:(?:\s|,|and)*\d+(?:\.\d+)?\s*(?:ms|milliseconds?|seconds?|secs?|s|minutes?|mins?|m)(?![a-z]))*"
    r"|\d+(?:h|m)[\dhms.]+s)",
    re.IGNORECASE,
)


def find_cause(error: Exception, texts: Sequence[str] = ()) -> Cause:
    """Return the likely cause of a failed request. An error that says nothing may be about a text.

    ``texts`` are those of the request. A server may repeat a text in its message, where it must not be read.
    """
    if isinstance(error, TextRefused | TextError | ReplayMiss):
        return "text"
    if isinstance(error, EmbedonceError) and not isinstance(error, ErrorInAnswer):
        # An invalid answer to a single text says nothing about the other texts.
        return "text" if type(error) is ProviderError and len(texts) == 1 else "call"
    status = read_status(error)
    names = [kind.__name__ for wrapped in _unwrap(error) for kind in type(wrapped).__mro__]
    if status == 429 or (status is None and any(map(_RATE_NAME.search, names))):
        return "rate"
    if status in _CALL_STATUSES:
        return "call"
    if status in _OVERLOAD_STATUSES:
        return "overload"
    if status in (None, 400):
        words = _read_text(error, texts)
        if any(map(_ACCESS_NAME.search, names)) or _ACCESS_CODE.search(words) or _ACCESS_TEXT.search(words):
            return "call"
    if status is not None:
        return "text"
    is_connection = any(isinstance(wrapped, OSError) for wrapped in _unwrap(error)) or any(
        map(_CONNECTION_NAME.search, names)
    )
    return "call" if is_connection or isinstance(error, _PROGRAM_ERRORS) else "text"


def is_about_provider(error: Exception) -> bool:
    """Return whether a request failed whatever its texts were: the provider is busy, away, or does not admit us."""
    is_invalid_answer = type(error) is ProviderError  # perhaps because of one text
    return not is_invalid_answer and find_cause(error) != "text"


def _remove_texts(message: str, texts: Iterable[str]) -> str:
    for text in texts:
        for written in (text, repr(text)[1:-1], json.dumps(text)[1:-1]):
            if written and written in message:
                message = message.replace(written, " ")
    return message


def is_server_failure(error: Exception) -> bool:
    """Return whether the server itself failed, or met a conflict, so that the same request may work later."""
    status = read_status(error)
    return status is not None and (status >= 500 or status in (408, 409)) and status not in (501, 505)


def read_status(error: Exception) -> int | None:
    """Return the HTTP status that an exception, or an exception that it wraps, has; None if it has none."""
    for wrapped in _unwrap(error):
        response = _get(wrapped, "response")
        places = [(wrapped, name) for name in ("status_code", "http_status", "status", "code")]
        places += [(response, name) for name in ("status_code", "status")]
        for place, name in places:
            status = _to_status(_get(place, name))
            if status is not None:
                return status
        if isinstance(response, Mapping):  # botocore
            metadata, details = response.get("ResponseMetadata"), response.get("Error")
            named = _to_status(details.get("Code")) if isinstance(details, Mapping) else None
            status = _to_status(metadata.get("HTTPStatusCode")) if isinstance(metadata, Mapping) else None
            if named is not None or status is not None:
                return named or status
    return None


def may_be_charged(error: Exception) -> bool:
    """Return whether a request that failed may have been charged: it got no answer in time, or an invalid one.

    An answer with an error status is not charged.
    """
    if isinstance(error, TextRefused | ErrorInAnswer) or read_status(error) is not None:
        return False
    if isinstance(error, ProviderError):
        return True
    # Clients of HTTP have timeouts of their own. One that could not connect has sent nothing.
    return is_timeout(error) and not re.search(r"Connect|Pool", type(error).__name__)


def is_timeout(error: Exception) -> bool:
    """Return whether an error is a timeout, whichever client raises it."""
    return any("Timeout" in kind.__name__ for kind in type(error).__mro__)


def is_final(error: Exception) -> bool:
    """Return whether waiting does not help, because an account has no credit left."""
    codes = " ".join(
        str(_get(wrapped, name))[:MAX_CHARACTERS] for wrapped in _unwrap(error) for name in ("code", "type", "body")
    )
    return bool(_FINAL_TEXT.search(codes) or _FINAL_TEXT.search(_read_text(error)))


def read_wait(error: Exception) -> float | None:
    """Return the seconds that an error asks to wait before the next request; None if it names no time.

    ``Retry-After`` comes before the body and the message, and these before headers that say when a limit is reset.
    """
    headers = _read_headers(error)
    text = _read_text(error)
    for seconds in (_read_retry_after(headers), _read_body_wait(text), _read_reset(headers)):
        if seconds is not None and 0 < seconds < float("inf"):
            return seconds
    return None


def read_batch_limit(error: Exception, texts: Sequence[str]) -> int | None:
    """Return the number of texts that an error names as the most of one request, if the request had more ``texts``."""
    text = _read_text(error, texts)
    if not _BATCH_TEXT.search(text):
        return None
    status = read_status(error)
    named = (int(re.sub(r"\D", "", found[1])) for found in _LIMIT_TEXT.finditer(text))
    return max((number for number in named if 0 < number < len(texts) and number != status), default=None)


def speaks_of_size(error: Exception, texts: Iterable[str]) -> bool:
    """Return whether an error is about the length of the texts, and names no number of texts."""
    text = _read_text(error, texts)
    return bool(_SIZE_TEXT.search(text)) or (read_status(error) == 413 and not _BATCH_TEXT.search(text))


def is_refusal(error: Exception, texts: Iterable[str]) -> bool:
    """Return whether the request was refused for what it contains, so that the same request would fail again.

    Any other failure may have been a passing one.
    """
    status = read_status(error)
    if isinstance(error, TextRefused) or status in (400, 413, 422):
        return True
    text = _read_text(error, texts)
    return status not in _OVERLOAD_STATUSES and bool(_BATCH_TEXT.search(text) or _SIZE_TEXT.search(text))


def _unwrap(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and the exceptions that it was raised from.

    ``__context__`` is not followed, because an exception that happened to be handled at the time may be unrelated.
    """
    current: BaseException | None = error
    for _ in range(MAX_WRAPPED):
        if current is None:
            return
        yield current
        current = current.__cause__


def _get(place: Any, name: str) -> Any:
    """Return an attribute or None. A property of a foreign class may raise anything."""
    try:
        return getattr(place, name, None)
    except Exception:  # noqa: BLE001
        return None


def _call_if_method(value: Any) -> Any:
    """Return the result of a method without arguments, as gRPC has them; return None for any other callable."""
    if not callable(value):
        return value
    if isinstance(value, type) or inspect.iscoroutinefunction(value):
        return None
    try:
        return value()
    except Exception:  # noqa: BLE001  (it is a method of another kind)
        return None


def _to_status(value: Any) -> int | None:
    value = _call_if_method(value)
    if isinstance(value, bool):
        return None
    if not isinstance(value, int | str):
        number = _get(value, "value")
        value = number if isinstance(number, int) and not isinstance(number, bool) else _get(value, "name")
    if isinstance(value, str):
        value = int(value) if value.isdecimal() else _NAMED_STATUSES.get(value.lower().replace("-", "_"))
    return int(value) if isinstance(value, int) and 400 <= value < 600 else None


def _read_text(error: Exception, texts: Iterable[str] = ()) -> str:
    """Return the messages and bodies of an exception and of the exceptions that it wraps, without the ``texts``."""
    parts: list[str] = []
    for wrapped in _unwrap(error):
        values: list[Any] = [wrapped]
        values += [_get(wrapped, name) for name in ("message", "body", "http_body", "details", "errors", "retry_delay")]
        response = _get(wrapped, "response")
        values.append(response if isinstance(response, Mapping) else _get(response, "text"))
        for value in values:
            try:
                found = _call_if_method(value)
                text = "" if found is None else str(found)
            except Exception:  # noqa: BLE001  (the body may not have been read, or the class may be broken)
                continue
            if text and text[:MAX_CHARACTERS] not in parts:
                parts.append(text[:MAX_CHARACTERS])
    return _remove_texts("\n".join(parts), texts)


def _read_headers(error: Exception) -> dict[str, str]:
    """Return the headers of the answer, with names in lower case."""
    for wrapped in _unwrap(error):
        response = _get(wrapped, "response")
        found = _get(wrapped, "headers") or _get(response, "headers")
        if not found and isinstance(response, Mapping):
            metadata = response.get("ResponseMetadata")
            found = metadata.get("HTTPHeaders") if isinstance(metadata, Mapping) else None
        try:
            headers = {str(name).lower(): str(value) for name, value in dict(found or {}).items()}
        except Exception:  # noqa: BLE001  (it is something else that is called headers)
            continue
        if headers:
            return headers
    return {}


def _to_number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _read_retry_after(headers: Mapping[str, str]) -> float | None:
    milliseconds = _to_number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    value = headers.get("retry-after")
    if value is None:
        return None
    seconds = _to_number(value)
    if seconds is not None:
        return seconds
    from email.utils import parsedate_to_datetime

    try:
        return parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return parse_duration(value)


def _read_body_wait(text: str) -> float | None:
    field = _RETRY_FIELD.search(text)
    if field is not None:
        number = _to_number(field["time"])
        if number is not None:
            return number / 1000 if field["ms"] else number
        seconds = parse_duration(field["time"])
        if seconds is not None:
            return seconds
    sentence = _RETRY_TEXT.search(text)
    return None if sentence is None else parse_duration(sentence["time"])


def _read_reset(headers: Mapping[str, str]) -> float | None:
    """Return the seconds until a limit is reset: the longest of the limits that are used up, else the shortest."""
    used_up: list[float] = []
    others: list[float] = []
    for name, value in headers.items():
        if "ratelimit-reset" not in name:
            continue
        number = _to_number(value)
        seconds = parse_duration(value) if number is None else number
        if seconds is None:
            continue
        if seconds > 1e11:  # milliseconds
            seconds /= 1000
        if seconds > 1e9:  # a date in seconds since 1970
            seconds -= time.time()
        left = headers.get(name.replace("reset", "remaining"))
        (used_up if _to_number(left) == 0 else others).append(seconds)
    return max(used_up) if used_up else min(others, default=None)
