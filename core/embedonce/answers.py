"""The types of the values that the methods of a cache return."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from ._messages import format_count, quote_toml_key, strip_credentials
from ._reprs import format_counts, make_html_table, shorten
from .errors import Incomplete
from .keys import SpaceCard, Value, VectorSpace
from .prices import Price, format_money
from .vectors import NO_WORK, Matrix, Metadata, Vector, Work, matrix


@dataclass(frozen=True, slots=True)
class Fetched:
    """The result of ``fetch`` and ``lookup``, text by text."""

    rows: Sequence[Vector | None]
    """Per text: its read-only vector of shape (d,), or None if the text has no vector."""
    sources: Sequence[str | None]
    """Per text: the name of the tier or the importer that had its vector, ``"provider"``, or None if there is no
    vector."""
    failed: Mapping[int, Exception]
    """The error of each text that failed, by position."""
    metadata: Sequence[Metadata | None]
    """Per text: the metadata stored with its vector, or None."""
    space: VectorSpace
    """The vector space of all rows: the fallback's space if the fallback was used, else the provider's."""
    seconds: Mapping[str, float]
    """Seconds spent in each tier, by the tier's name. The seconds spent in the provider are under ``"provider"``. The
    durations of calls that ran at the same time are added up."""
    errors: Mapping[str, str]
    """The cause of the failure, for each tier that failed in this call."""
    dimensions: int | None = None
    """Number of dimensions of each vector; None if it is not known."""
    computed: Work = NO_WORK
    """The work of this call: the texts that it computed, their tokens and seconds. Texts that another call was already
    computing are not included, because that call pays for them. Equal texts count once."""
    saved: Work = NO_WORK
    """The work that the tiers have saved: the texts that they had, and the tokens and seconds that it took to compute
    these texts once. Equal texts count once."""
    wasted: Work = NO_WORK
    """The work of this call that the provider may have charged, and that gave none of these vectors: answers that were
    refused, requests that got no answer in time, and vectors that were computed before the provider drifted or failed.
    Each time that a text was sent counts. If a repeated request was answered, the earlier ones count the same tokens.
    The seconds of refused answers and lost requests are unknown."""
    imported: Set[int] = frozenset()
    """Positions of the texts whose vector an importer had. They are neither hits nor computed."""
    changed: Set[int] = frozenset()
    """With ``fresh=True``: positions of the texts whose stored vector is not the vector that was computed now."""

    @property
    def vectors(self) -> Matrix:
        """All rows as one float32 matrix of shape (n, d).

        Raises:
            Incomplete: a row is missing.
        """
        rows = [row for row in self.rows if row is not None]
        if len(rows) < len(self.rows):
            raise Incomplete(
                f"no vector for {len(self.rows) - len(rows)} of {format_count(len(self.rows), 'text')}; "
                "`failed` has the reasons, and `rows` has the vectors of the other texts"
            )
        return matrix(rows, self.dimensions)

    def _sources(self) -> dict[str, int]:
        return dict(Counter(source for source in self.sources if source is not None))

    def _missing(self) -> int:
        return sum(row is None for row in self.rows) - len(self.failed)

    def __repr__(self) -> str:
        size = "" if self.dimensions is None else f" of {format_count(self.dimensions, 'dimension')}"
        parts = [
            format_counts(self._sources()),
            f"{len(self.failed):,} failed" if self.failed else "",
            f"{self._missing():,} missing" if self._missing() else "",
            "tier errors: " + ", ".join(map(quote_toml_key, self.errors)) if self.errors else "",
        ]
        details = ", ".join(part for part in parts if part)
        return f"<Fetched {format_count(len(self.rows), 'text')}{size}{': ' if details else ''}{details}>"

    def _repr_html_(self) -> str:
        """Return a table of the vectors' sources, for notebooks."""
        rows: list[Sequence[object]] = [
            (source, f"{number:,}", f"{self.seconds.get(source, 0.0):.3f}", self.errors.get(source, ""))
            for source, number in (dict.fromkeys(self.seconds, 0) | self._sources()).items()
        ]
        rows += [("failed", f"{len(self.failed):,}", "", "")] if self.failed else []
        rows += [("missing", f"{self._missing():,}", "", "")] if self._missing() else []
        size = "" if self.dimensions is None else f", {format_count(self.dimensions, 'dimension')}"
        title = f"Fetched: {format_count(len(self.rows), 'text')}{size}"
        return make_html_table(title, ("source", "texts", "seconds", "error"), rows)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What it would cost to embed some texts: the result of ``estimate``. Equal texts count once, except in ``texts``.

    ``method`` says how the tokens were found:

    - ``"counted"``: the provider's own tokenizer has counted them, so ``min_tokens``, ``tokens`` and ``max_tokens`` are
      equal. A provider that charges no tokens, such as ``ngram``, counts 0.
    - ``"measured"``: ``tokens`` is the length of the missing texts, times the tokens per byte of the texts that the
      tiers have. The real number lies between ``min_tokens`` and ``max_tokens`` with a probability of about 95 %, if
      the missing texts are of the same kind as the texts in the tiers. The limits are measured on the calls that
      embedded those texts: the more the calls differ in tokens per byte, the further apart are the limits.
    - ``"guessed"``: the tiers have texts of fewer than about four calls of similar size, so no limits can be measured.
      ``tokens`` is computed as for ``"measured"`` if ``sample`` is above 0, else one token per 4 bytes.
      ``min_tokens`` is one token per 16 bytes and ``max_tokens`` is one token per byte. Almost every tokenizer stays
      between these limits.
    """

    texts: int
    """Number of texts that were given."""
    distinct: int
    """Number of distinct texts: the sum of ``hits``, ``missing`` and ``invalid``."""
    invalid: int
    """Number of texts that cannot be embedded, because they are not valid Unicode or a normalisation step failed."""
    hits: Mapping[str, int]
    """By tier: number of texts that this tier has and that no faster tier has. The last tier's number includes entries
    that wait for a background write."""
    missing: int
    """Number of texts that no tier has, so that the provider would be asked for them."""
    bytes: int
    """Length of the missing texts in UTF-8, after normalisation."""
    tokens: int
    """Tokens of the missing texts."""
    min_tokens: int
    """Minimum of the tokens, as described under ``method``."""
    max_tokens: int
    """Maximum of the tokens, as described under ``method``."""
    method: Literal["counted", "measured", "guessed"]
    sample: int
    """Number of the given texts that a tier has and whose tokens are known."""
    seconds: float | None
    """Expected duration of the provider's calls, or None if it is unknown. It is computed from the seconds per byte of
    the given texts that the tiers have, and is not below what the provider's limits per minute require."""
    price: Price | None
    """Price of the provider's tokens, or None if it is unknown."""
    errors: Mapping[str, str]
    """The cause of the failure, for each tier that failed: ``"timeout"``, the exception's class name, or ``"skipped"``
    if the tier was not asked because earlier calls failed. Its texts count as missing if no other tier has them."""

    @property
    def money(self) -> Decimal | None:
        """Price of the missing texts' tokens; None if the price is unknown."""
        return None if self.price is None else self.price.of(self.tokens)

    @property
    def max_money(self) -> Decimal | None:
        """Price of ``max_tokens`` tokens; None if the price is unknown."""
        return None if self.price is None else self.price.of(self.max_tokens)

    def __repr__(self) -> str:
        between = f", {self.min_tokens:,} to {self.max_tokens:,}" if self.min_tokens < self.max_tokens else ""
        parts = [
            format_counts(self.hits),
            f"{self.missing:,} missing",
            f"{self.invalid:,} invalid" if self.invalid else "",
            f"{format_count(self.tokens, 'token')} ({self.method}{between})",
            format_money(self.money, self.price.currency) if self.money is not None and self.price is not None else "",
            f"{self.seconds:.1f} s" if self.seconds else "",
            "tier errors: " + ", ".join(map(quote_toml_key, self.errors)) if self.errors else "",
        ]
        return f"<Estimate {format_count(self.texts, 'text')}: {', '.join(part for part in parts if part)}>"


@dataclass(frozen=True, slots=True)
class Explanation:
    """How a text's key is built, what each tier has for the key, and possible reasons for a miss.

    The explanation does not contain the text itself.
    """

    key: str
    scope: str
    fingerprint: str
    task: str
    space: Mapping[str, Value]
    policy: Mapping[str, Value]
    normalized: bool
    """Whether normalisation changed the text."""
    tiers: Mapping[str, str]
    """Per tier: ``"hit"``, ``"miss"``, ``"expired"``, ``"coarser"`` (the entry has less precision than ``dtype``),
    ``"corrupt"``, ``"skipped"`` (the tier's breaker is open), or the error."""
    reasons: Sequence[str] = ()
    """For a miss: one sentence per tier and scope, for the scopes that are similar to the text's scope. Two scopes are
    similar if their space cards differ in only one or two parts, such as the version."""

    @property
    def found(self) -> str | None:
        """The first tier that has the entry, or None."""
        return next((tier for tier, outcome in self.tiers.items() if outcome == "hit"), None)

    def as_dict(self) -> dict[str, Any]:
        """Return a dict of all fields and of ``found``."""
        return asdict(self) | {"found": self.found}

    def __repr__(self) -> str:
        where = "in no tier" if self.found is None else f"found in {quote_toml_key(self.found)}"
        outcomes = ", ".join(
            f"{quote_toml_key(tier)} {quote_toml_key(outcome)}" for tier, outcome in self.tiers.items()
        )
        key = f"scope {quote_toml_key(self.scope)}, task {shorten(self.task)}"
        return f"<Explanation {where}{': ' if outcomes else ''}{outcomes}; {key}>"

    def _repr_html_(self) -> str:
        """Return a table of the key's parts, the tiers' outcomes and the reasons, for notebooks."""
        rows: list[Sequence[object]] = [
            ("key", self.key),
            ("scope", self.scope),
            ("fingerprint", self.fingerprint),
            ("task", self.task),
            *((f"space: {name}", shorten(value)) for name, value in self.space.items()),
            *((f"policy: {name}", shorten(value)) for name, value in self.policy.items()),
            ("normalisation changed the text", "yes" if self.normalized else "no"),
            *((f"tier: {tier}", strip_credentials(outcome)) for tier, outcome in self.tiers.items()),
            *(("reason", strip_credentials(reason)) for reason in self.reasons),
        ]
        title = "Explanation: in no tier" if self.found is None else f"Explanation: found in {self.found}"
        return make_html_table(title, ("part", "value"), rows)


@dataclass(frozen=True, slots=True)
class Held:
    """How many entries of one scope a tier holds, how large they are, and how old."""

    tier: str
    scope: str
    card: Mapping[str, Value] | None
    """The space card of the scope, or None if the tier has lost the card."""
    entries: int
    error: str | None = None
    """The reason why the tier cannot list its keys, or None. With an error, ``scope`` is empty and ``entries`` is 0."""
    dimensions: int | None = None
    """Number of dimensions of the vectors, or None if it is unknown."""
    bytes: int | None = None
    """Size of the values in the store, in bytes; None if the tier cannot tell."""
    oldest: float | None = None
    """Unix time at which the oldest entry was stored; None if the tier cannot tell."""
    newest: float | None = None
    """Unix time at which the newest entry was stored; None if the tier cannot tell."""
    unmeasured: str | None = None
    """The reason why ``bytes``, ``oldest`` and ``newest`` were not measured, or None."""
    current: bool | None = None
    """Whether the cache uses this scope now; None if the cache has no provider."""


@dataclass(frozen=True, slots=True)
class TierCheck:
    """The result of checking whether a tier answers and stores what is written to it."""

    tier: str
    type: str
    ok: bool
    seconds: float
    detail: str = ""
    writes: bool | None = None
    """Whether a probe was written, read and deleted. None if this was not tried, for example because the tier's
    ``write`` is ``"none"``."""
    read_only: bool = False
    """Whether the store is read-only, so that no probe is written."""
    verified: bool | None = None
    """Whether the whole store was read and is intact. None if this was not asked for, or its backend cannot do it."""


@dataclass(frozen=True, slots=True)
class ProviderCheck:
    """The result of checking a provider."""

    provider: str
    ok: bool
    seconds: float
    dimensions: int | None = None
    """Number of dimensions of the vector that the provider returned; None if it was not called or failed."""
    model: str | None = None
    """The name of the model according to the provider's answer; None if the answer does not name it."""
    detail: str = ""
    """The error if ``ok`` is False."""


@dataclass(frozen=True, slots=True)
class ImporterCheck:
    """The result of checking whether an importer can read its source."""

    importer: str
    source: str
    ok: bool
    seconds: float
    verification: str
    """``"off"``, ``"unverified"``, ``"verified"`` or ``"refused"``, as in :data:`embedonce.events.Verification`."""
    detail: str = ""
    """The error if ``ok`` is False."""


@dataclass(frozen=True, slots=True)
class ChainWarning:
    """A probable mistake in a chain of tiers. The chain works in spite of the mistake."""

    tier: str
    message: str


@dataclass(frozen=True, slots=True)
class Purged:
    """The result of ``purge``. With ``dry_run``, nothing was removed, and the result says what would be removed."""

    scopes: Mapping[str, Mapping[str, Value] | None]
    """The scopes that matched, with their space cards."""
    removed: Mapping[str, int] = field(default_factory=dict)
    """Number of removed entries, by tier. With ``dry_run``, the number of entries that would be removed."""
    kept: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Number of entries that a read-only tier keeps of each scope, by tier. Only the result of a ``dry_run`` has such
    tiers. Otherwise, ``purge`` raises :class:`~embedonce.errors.EraseIncomplete`."""

    def __repr__(self) -> str:
        details = format_counts(self.removed)
        if kept := format_counts({tier: sum(scopes.values()) for tier, scopes in self.kept.items()}, " in "):
            details = f"{details}{'; ' if details else ''}kept: {kept}"
        return f"<Purged {format_count(len(self.scopes), 'scope')}{': ' if details else ''}{details}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """The result of ``copy``, counted in entries. With ``dry_run``, nothing was stored, and ``copied`` would be."""

    source: str
    """Name of the tier that was read."""
    target: str
    """Name of the tier that was written to."""
    scopes: Mapping[str, SpaceCard | None]
    """The scopes of the entries that were found, with their space cards."""
    copied: int = 0
    already_there: int = 0
    """Entries that the target had already."""
    expired: int = 0
    """Entries whose life in the source is over."""
    corrupt: int = 0
    """Entries that are damaged in the source, or that its keys cannot decrypt, or that a newer version has written."""
    too_large: int = 0
    """Entries that are too large for the target."""
    decrypted: bool = False
    """Whether the source is encrypted and the target is not, so that the copies can be read without a key."""
    unused: Set[str] = frozenset()
    """Those of ``scopes`` that neither the provider nor the fallback uses now. Empty without a provider."""
    unknown: Mapping[str, str] = field(default_factory=dict)
    """Scopes in which the texts of ``texts=`` could not be found, because their keys are not known, with the reasons.
    """

    @property
    def found(self) -> int:
        """Number of selected entries that the source has."""
        return self.copied + self.already_there + self.expired + self.corrupt + self.too_large

    def __repr__(self) -> str:
        more = format_counts({name: getattr(self, name) for name in ("already_there", *_LEFT_OUT, "too_large")}, " ")
        copied = format_count(self.copied, "entry", "entries")
        return f"<Copied {copied} from {self.source} to {self.target}{': ' if more else ''}{more}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """The result of ``export``. If ``entries`` is 0, nothing was found, and no bundle was written.

    With ``dry_run``, no bundle was written either.
    """

    path: Path
    sources: Sequence[str]
    """Names of the tiers that were read."""
    scopes: Mapping[str, SpaceCard | None]
    """The scopes of the entries that were found, with their space cards."""
    entries: int = 0
    expired: int = 0
    """Entries whose life is over in every tier."""
    corrupt: int = 0
    """Entries that are damaged, or that the tiers' keys cannot decrypt, or that a newer version has written."""
    encrypted: bool = False
    """Whether the bundle has encrypted frames."""
    unknown: Mapping[str, str] = field(default_factory=dict)
    """As in :class:`Copied`."""
    parts: int = 0
    """Number of files with entries."""
    bytes: int = 0
    """Size of all files in bytes."""

    @property
    def found(self) -> int:
        """Number of selected entries that the tiers have."""
        return self.entries + self.expired + self.corrupt

    def __repr__(self) -> str:
        more = format_counts({name: getattr(self, name) for name in _LEFT_OUT}, " ")
        entries = format_count(self.entries, "entry", "entries")
        return f"<Exported {entries} to {str(self.path)!r}{': ' if more else ''}{more}>"


_LEFT_OUT = ("expired", "corrupt")
