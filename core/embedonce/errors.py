"""Every exception that embedonce raises of its own.

All derive from :class:`EmbedonceError`. A provider's own exception is not wrapped: it reaches the
caller as the provider raised it, so that code which retries on a vendor's error keeps working.
No message holds a text, a vector or a secret.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class EmbedonceError(Exception):
    """Base of every error below; catch it to catch them all."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a configuration, and where.

    ``line`` and ``column`` count from 1; both are None where the value came from a dict, the
    environment or a default.
    """

    message: str
    file: str | None = None
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        if self.file is None:
            return self.message
        if self.line is None:
            return f"{self.file}: {self.message}"
        return f"{self.file}:{self.line}:{self.column or 1}: {self.message}"


class ConfigError(EmbedonceError, ValueError):
    """A configuration cannot be used; ``problems`` lists everything that is wrong with it."""

    def __init__(self, problems: Sequence[Problem] | str) -> None:
        if isinstance(problems, str):
            problems = (Problem(problems),)
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class PluginError(EmbedonceError):
    """A plugin is not installed, cannot be loaded, or is not what it declares itself to be."""


class SpaceError(EmbedonceError, ValueError):
    """A provider does not describe its vector space, or describes it with values that have no canonical form."""


class TextError(EmbedonceError, ValueError):
    """A text that cannot be encoded (a lone surrogate); nothing was sent or stored.

    ``position`` is its place in the batch.
    """

    def __init__(self, message: str, position: int = 0) -> None:
        super().__init__(message)
        self.position = position


class ProviderError(EmbedonceError):
    """A provider's answer was refused (count, dimension, NaN, infinity, all zero); nothing of it was stored."""


class ProviderTimeout(ProviderError, TimeoutError):
    """A provider did not answer within its ``timeout``."""


class DriftError(ProviderError):
    """The provider makes other vectors than those that are stored in the same vector space; nothing was computed.

    Raised where the drift guard's ``action`` is ``"refuse"``. Raise ``[key] version``, or go back to the former model.
    """


class TextRefused(ProviderError, ValueError):
    """Raised by a provider for texts that it will not embed (empty, too long).

    ``positions`` are their places in the chunk that the provider was given; leave it empty where the
    provider cannot tell which, and the engine halves the chunk until it knows.
    """

    def __init__(self, message: str, positions: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.positions = tuple(positions)


class ReplayMiss(EmbedonceError, LookupError):
    """``mode = "replay"``: a text is in no tier, and nothing is computed in this mode."""


class Incomplete(EmbedonceError):
    """``Fetched.vectors`` was read although some rows are missing; read ``rows`` and ``failed`` instead."""


class TierError(EmbedonceError):
    """A tier with ``on_error = "raise"`` failed; ``tier`` is its name."""

    def __init__(self, message: str, tier: str = "") -> None:
        super().__init__(message)
        self.tier = tier


class TierTimeout(TierError, TimeoutError):
    """A tier did not answer within its ``timeout``."""


class TierBusy(TierError):
    """Raised by a backend whose connection pool is exhausted: an error, but no reason to call the store dead."""


class PartialAnswer(TierError):
    """Raised by a backend of several parts (nodes, shards) of which some failed: what the others said still counts.

    ``answer`` is what the call would have returned without the keys that failed: a mapping from ``get_many``, the
    keys that are now there from ``add_many``, None from ``set_many`` and ``delete_many``. ``failed`` names the keys of
    which nothing is known (of a write: that are not stored). Every other key that was asked for is answered: a key
    that is in neither is a miss.

    Raise it ``from`` the error of the part that failed: that is its cause, under which the keys are counted, and
    which moves the tier's breaker as it would alone. A part that is left out until it answers again, so that no
    call waits for it, is a :class:`TierBusy`: it moves no breaker, and the other parts go on being asked. Where no
    part answered, raise the error itself.
    """

    def __init__(self, message: str, *, answer: Any = None, failed: Collection[str]) -> None:
        if not failed:
            raise ValueError("a partial answer names the keys that failed")
        super().__init__(message)
        self.answer = answer
        self.failed = frozenset(failed)


class EraseIncomplete(EmbedonceError):
    """``forget`` or ``purge`` could not reach every tier; the tiers that it could reach are done.

    ``tiers`` maps each tier's name to the reason. Call again when the tier is back.
    """

    def __init__(self, message: str, tiers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.tiers = dict(tiers or {})


class CacheClosed(EmbedonceError, RuntimeError):
    """The cache was used after ``close``."""
