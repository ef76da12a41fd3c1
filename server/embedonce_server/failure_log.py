"""Log lines about models that fail, for the operator: at most one line a minute per model and cause."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from embedonce import CacheClosed, DriftError, EmbedonceError, ProviderError, ReplayMiss, SpaceError, TierError
from embedonce.errors import TextError, TextRefused
from embedonce.provider_errors import read_status

from .api.api_errors import ApiError, describe_invalid_answer, is_connection_error, is_timeout

log = logging.getLogger("embedonce.serve")

LOG_SECONDS = 60.0
"""Minimum number of seconds between two lines about the same model and cause."""

_OTHERS = (ApiError, TextError, TextRefused, ReplayMiss, SpaceError, CacheClosed)
"""Errors of one input or request."""

_HINTS = {
    401: "check api_key of the model",
    403: "check api_key of the model, and what this key may use",
    404: "check base_url and model of the model's provider",
    429: "the rate limit or the quota of the key is used up",
}


class FailureLog:
    """Logs why models fail, without texts and secrets. It belongs to one event loop.

    Args:
        clock: function that returns seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: dict[tuple[str, str], int] = {}
        """Number of requests since the last line, by model and cause."""
        self._due: dict[tuple[str, str], float] = {}
        """Time of the next line."""

    def record(self, model: str, errors: Iterable[Exception]) -> None:
        """Count a request of which some inputs failed with ``errors``, and log the causes that are due."""
        now = self._clock()
        for cause in dict.fromkeys(cause for error in errors if (cause := _describe_cause(error)) is not None):
            key = (model, cause)
            count = self._counts[key] = self._counts.get(key, 0) + 1
            if now >= self._due.get(key, now):
                requests = "1 request" if count == 1 else f"{count:,} requests since the last line like this"
                log.warning('model "%s": %s (%s)', model, cause, requests)
                self._counts[key], self._due[key] = 0, now + LOG_SECONDS


def _describe_cause(error: Exception) -> str | None:
    """Return the cause of a failure, and what to check; None if the failure is not the model's.

    There are few causes, so the memory of a log is bounded. The message of an error is not part of it, because it may
    contain a text.
    """
    if isinstance(error, _OTHERS):
        return None
    if isinstance(error, DriftError):
        return "it has drifted: it does not return the vectors that are stored, and nothing is computed"
    if isinstance(error, TierError):
        tier = "a tier" if error.tier is None else f'tier "{error.tier}"'
        return f'{tier} has failed, and its on_error is "raise"'
    status = read_status(error)
    if status is not None:
        hint = _HINTS.get(status)
        return f"the endpoint answered with status {status}" + (f"; {hint}" if hint else "")
    name = type(error).__name__
    if is_timeout(error):
        return f"the endpoint did not answer in time ({name})"
    if is_connection_error(error):
        return f"the endpoint cannot be reached ({name}); check base_url of the model's provider"
    if isinstance(error, ProviderError):
        return f"the endpoint's answer was refused: {describe_invalid_answer(error)}"
    return f"the provider failed ({name})" if not isinstance(error, EmbedonceError) else None
