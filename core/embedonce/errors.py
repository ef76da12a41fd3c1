"""The exceptions of embedonce.

All derive from :class:`EmbedonceError`. An exception that a provider raises is not wrapped: it reaches
the caller unchanged, so that code which retries on a vendor's error keeps working.
No message contains a text, a vector or a secret.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class EmbedonceError(Exception):
    """Base class of all errors of embedonce. To catch all of these errors, catch this class."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One error in a configuration, and its place.

    ``line`` and ``column`` count from 1. Both are None if the value came from a dict, the environment
    or a default.
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
    """The configuration is invalid; ``problems`` lists all errors in it."""

    def __init__(self, problems: Sequence[Problem] | str) -> None:
        if isinstance(problems, str):
            problems = (Problem(problems),)
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class PluginError(EmbedonceError):
    """A plugin is not installed, cannot be loaded, or does not match its declaration."""


class SpaceError(EmbedonceError, ValueError):
    """A provider does not describe its vector space, or describes it with values that have no canonical form."""


class TextError(EmbedonceError, ValueError):
    """A text cannot be encoded, because it has a lone surrogate. It was not sent to the provider.

    ``position`` is the text's index in the batch, or in the iterable that ``embed_iter`` reads. Read the source of the
    text with the right encoding, or add ``"surrogates"`` to ``[key] normalize``.
    """

    def __init__(self, message: str, position: int = 0) -> None:
        super().__init__(message)
        self.position = position


class ProviderError(EmbedonceError):
    """The engine refused a provider's answer, or single vectors of it.

    If the answer has the wrong number of vectors or of dimensions, none of its vectors is stored. If single rows are
    missing, or have NaN, infinity, only zeros or a different length, only the texts of these rows get this error.
    """

    tokens: int | None = None
    """Tokens that the refused answer reports. A provider that refuses an answer itself sets this attribute, so that the
    tokens are counted although there are no vectors."""


class ErrorInAnswer(ProviderError):
    """An answer has the status 200, but its body is an error or has no vectors.

    One of the texts may be the reason, so the engine sends the texts in parts, as after an error of the provider.
    ``code`` is the status or the name of the error in the answer, or None if it has none.
    """

    def __init__(self, message: str, code: int | str | None = None) -> None:
        super().__init__(message)
        self.code = code


class ProviderTimeout(ProviderError, TimeoutError):
    """A provider did not answer within its ``timeout``."""


class DriftError(ProviderError):
    """The provider no longer returns the vectors that are stored in its vector space. Nothing was stored.

    Raised if the vectors of the canary texts have changed and the drift guard's ``action`` is ``"refuse"``. Also raised
    if an answer names a different model than earlier answers of the same vector space, unless the ``action`` is
    ``"warn"`` or ``"new-space"``. Change ``[key] version``, or go back to the previous model.
    """


class TextRefused(ProviderError, ValueError):
    """A provider refuses to embed some texts, for example because they are empty or too long.

    Providers raise this error. ``positions`` are the indexes of the refused texts in the chunk. A provider that cannot
    tell which texts it refuses leaves ``positions`` empty. The engine then halves the chunk until it has found the
    refused texts. It does the same for most other exceptions, so a provider need not translate its client's errors.

    In the error that the cache raises or reports, ``positions`` are the indexes in the caller's batch, or in the
    iterable that ``embed_iter`` reads.
    """

    def __init__(self, message: str, positions: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.positions = tuple(positions)


class ReplayMiss(EmbedonceError, LookupError):
    """A text is in no tier, and ``mode = "replay"`` computes nothing."""


class SourceError(EmbedonceError):
    """An importer cannot read its source, because it is missing, is of another kind, or is damaged.

    Importers raise this error. The message says what to do, and contains no text and no secret.
    """


class ImportRefused(EmbedonceError):
    """The vectors of a source must not be imported, because they are not those that the provider would compute.

    Raised if the verification has failed, or if the source has vectors of another task. Nothing was imported.
    """


class StoreExists(EmbedonceError):
    """A new read-only store cannot be written, because there is something at its place already."""


class StoreBusy(StoreExists):
    """A new read-only store cannot be written now, because another writer writes to its place."""


class Incomplete(EmbedonceError):
    """``Fetched.vectors`` was read although some rows are missing; read ``rows`` and ``failed`` instead."""


class TierError(EmbedonceError):
    """A tier with ``on_error = "raise"`` failed; ``tier`` is the name of the tier."""

    def __init__(self, message: str, tier: str = "") -> None:
        super().__init__(message)
        self.tier = tier


class TierTimeout(TierError, TimeoutError):
    """A tier did not answer within its ``timeout``."""


class LoopBusy(TierTimeout):
    """A call on an event loop did not end in time, and other tasks blocked the loop meanwhile.

    This counts as an error with the cause ``busy_loop``. It opens the breaker only if it happens three times in a row.
    Run the work that blocks the loop in a thread, for example with ``asyncio.to_thread``.

    ``started`` is the time on ``time.monotonic`` at which the call began.
    """

    def __init__(self, started: float, tier: str = "") -> None:
        message = "other tasks blocked the event loop, so an answer could not be read in time"
        super().__init__(f"tier {tier!r}: {message}" if tier else message, tier)
        self.started = started


class TierBusy(TierError):
    """All connections to a tier, or all of its threads, are in use.

    This counts as an error but does not open the breaker. Backends raise this error when their connection pool is
    exhausted.
    """


class PartialAnswer(TierError):
    """Some nodes or shards of a backend failed, and other nodes answered.

    Backends raise this error, and the engine uses the values of the nodes that answered.

    ``answer`` is the return value of the call for the keys that did not fail. It is a mapping for ``get_many``, the set
    of added keys for ``add_many``, and None for ``set_many`` and ``delete_many``. ``failed`` contains the keys for
    which the call failed. A requested key that is neither in ``answer`` nor in ``failed`` counts as a miss.

    Raise this error ``from`` the error of the failed node. The failed keys are counted under that error, and the tier's
    breaker reacts as if the backend had raised that error. A backend may skip a failed node for some time, so
    that no call waits for the node. During that time, raise this error ``from`` a :class:`TierBusy`. The breaker
    ignores a :class:`TierBusy`, so the other nodes stay in use. If no node answered, raise the error of a node instead
    of a ``PartialAnswer``.
    """

    def __init__(self, message: str, *, answer: Any = None, failed: Collection[str]) -> None:
        if not failed:
            raise ValueError("failed= must contain at least one key")
        super().__init__(message)
        self.answer = answer
        self.failed = frozenset(failed)


class TransferRefused(EmbedonceError, ValueError):
    """Entries cannot be copied or exported as requested. Nothing was stored. The message says what to do."""


class TransferStopped(TierError):
    """A tier failed while entries were copied or exported; ``tier`` is its name.

    Entries that were copied until then are stored, and the same call continues with the rest. Of an export, nothing is
    left. ``result`` has the counts until then: a :class:`~embedonce.answers.Copied`, or an
    :class:`~embedonce.answers.Exported`.
    """

    def __init__(self, message: str, tier: str, result: Any) -> None:
        super().__init__(message, tier)
        self.result = result


class EraseIncomplete(EmbedonceError):
    """``forget`` or ``purge`` could not erase everything, but erased the requested entries from everywhere else.

    ``tiers`` maps the name of each failed tier to the reason. Call the method again once these tiers are reachable.
    ``scopes`` maps each scope whose keys ``forget`` cannot make to the reason. ``purge`` can remove such a scope.
    ``unable`` has the names of those of ``tiers`` that cannot list or cannot delete keys at all. Calling the method
    again does not help there: their entries stay until they expire or are evicted, and in a read-only tier for good.
    After ``purge``, ``matched`` maps the scopes that matched to their space cards, and ``removed`` has the number of
    removed entries of each tier that worked, as ``Purged`` has them. After ``forget(where=…)``, ``left`` has the cards
    that it would have returned.

    ``kept`` has the read-only tiers among ``tiers`` that have some of the entries, with their number by scope. The
    reason of such a tier says how to rebuild its store without these entries.
    """

    def __init__(
        self,
        message: str,
        tiers: Mapping[str, str] | None = None,
        scopes: Mapping[str, str] | None = None,
        unable: Iterable[str] = (),
        kept: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        super().__init__(message)
        self.tiers = dict(tiers or {})
        self.scopes = dict(scopes or {})
        self.unable = frozenset(unable)
        self.kept = dict(kept or {})
        self.matched: dict[str, Mapping[str, Any] | None] = {}
        self.removed: dict[str, int] = {}
        self.left: dict[str, Mapping[str, Any]] = {}


class CacheClosed(EmbedonceError, RuntimeError):
    """The cache was used after ``close``."""
