"""The result of a run: what was read, computed and written, and what failed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from embedonce._messages import format_count
from embedonce.cli.money import SummedCost
from embedonce.prices import format_money

from .failures import FailureGroup
from .progress import format_seconds

if TYPE_CHECKING:
    from embedonce.events import Stats, TierStats


@dataclass(slots=True)
class Summary:
    """Result of a run, counted in passages.

    ``texts`` is ``computed`` + the sums of ``hits`` and ``imported`` + ``repeated`` + the passages that could not be
    embedded.
    """

    texts: int = 0
    """Passages that were read."""
    unique: int | None = 0
    """Distinct passages, compared as they were read, before the key policy normalises them. None means that there was
    not enough memory to count them."""
    computed: int = 0
    """Passages that the provider embedded."""
    hits: dict[str, int] = field(default_factory=dict)
    """Passages whose vector a tier had, by tier name."""
    imported: dict[str, int] = field(default_factory=dict)
    """Passages whose vector an importer had, by the importer's name."""
    spent: SummedCost | None = None
    """Cost of the texts that the provider embedded. None if it could not be computed, and in a dry run."""
    saved: SummedCost | None = None
    """Cost that was stored with the vectors that were read from the tiers: what it would have cost to embed their texts
    again. Each distinct text counts once per window. None if it could not be computed, and in a dry run."""
    repeated: int = 0
    """Passages that got the vector of an equal passage in the same window; that vector was computed only once."""
    failed: int = 0
    """Broken lines, unreadable files, and passages that could not be embedded."""
    failures: list[FailureGroup] = field(default_factory=list)
    """The failures by file and reason, in the order of the first failure of each group: at most MAX_GROUPS groups."""
    rows: int = 0
    """Rows of the output."""
    dimensions: int | None = None
    files: int = 0
    binary: int = 0
    """Number of binary files that were found in folders and skipped."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of other files and folders that were skipped, by suffix (``.pdf``) or reason."""
    unknown: list[str] = field(default_factory=list)
    """Names of statistics that could not be computed. The output does not depend on them."""
    trouble: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of failures by tier and kind.

    The kinds are errors, corrupt entries, dropped writes, and texts for which the tier was skipped.

    Tiers without failures are left out.
    """
    causes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of errors and dropped writes by tier and cause. Tiers that have none are left out."""
    unstored: list[str] = field(default_factory=list)
    """Tiers that outlive the process, had errors or dropped writes, and stored no vector at all."""
    bytes: int = 0
    seconds: float = 0.0
    out: str | None = None
    """Path of the output. None means that no output was written and that an earlier output is unchanged."""
    index: str | None = None
    """Path of the file with the source of each row of a .npy output."""
    stopped: str | None = None
    """Reason why the run ended early, or None."""
    estimate: dict[str, Any] | None = None
    """With ``--dry-run`` and ``--max-cost``: the estimate of what it costs to embed the passages. It is made before
    anything is computed."""


def subtract_money(after: Mapping[str, Decimal], before: Mapping[str, Decimal]) -> dict[str, Decimal]:
    """Return the difference by currency."""
    return {currency: amount - before.get(currency, Decimal(0)) for currency, amount in after.items()}


def describe_cost(cost: SummedCost | None) -> str | None:
    """Return a cost for people, or None if there is nothing to say: no text, or less than a second and no tokens."""
    if cost is None or not cost.texts:
        return None
    parts = []
    if cost.tokens:  # a local provider may use no tokens at all
        parts = [format_count(cost.tokens, "token")]
        parts += [format_money(Decimal(amount), currency) for currency, amount in cost.money.items()]
    parts += [] if cost.seconds is None or cost.seconds < 1 else [f"{format_seconds(cost.seconds)} of computation"]
    if not parts:
        is_unknown = cost.tokens is None and cost.seconds is None
        return f"the cost of {format_count(cost.texts, 'text')} is unknown" if is_unknown else None
    unknown = cost.unknown_seconds if cost.tokens is None else max(cost.unknown_tokens, cost.unknown_seconds)
    note = f" (not included: {format_count(unknown, 'text')} with unknown cost)" if unknown else ""
    return f"{', '.join(parts)}{note}"


def collect_tier_failures(stats: Stats) -> dict[str, dict[str, int]]:
    """Return the number of failures per tier and kind. Tiers and kinds without failures are left out."""
    kinds = ("errors", "corrupt", "skipped", "dropped")
    by_tier = {name: {kind: getattr(tier, kind) for kind in kinds} for name, tier in stats.tiers.items()}
    found = {name: {kind: number for kind, number in counted.items() if number} for name, counted in by_tier.items()}
    return {name: counted for name, counted in found.items() if counted}


def collect_causes(stats: Stats) -> dict[str, dict[str, int]]:
    """Return the number of errors and dropped writes per tier and cause. Leave out tiers that have none."""
    found = {name: {**tier.causes, **tier.drops} for name, tier in stats.tiers.items()}
    return {name: by_cause for name, by_cause in found.items() if by_cause}


def describe_tier_failures(
    trouble: Mapping[str, Mapping[str, int]], causes: Mapping[str, Mapping[str, int]]
) -> Iterator[str]:
    """Yield one line per tier that failed. The arguments are the results of the two functions above."""
    for tier, kinds in trouble.items():
        by_cause = "; ".join(f"{cause}: {number:,}" for cause, number in causes.get(tier, {}).items())
        counted = ", ".join(_format_failure_count(kind, number) for kind, number in kinds.items())
        yield f"tier {tier}: {counted}{f' ({by_cause})' if by_cause else ''}"


def _format_failure_count(kind: str, number: int) -> str:
    """Return ``1 error``, ``2 errors``, ``3 skipped``."""
    return format_count(number, "error") if kind == "errors" else f"{number:,} {kind}"


def has_stored_nothing(tier: TierStats) -> bool:
    """Return whether a tier stored nothing although vectors were written to it."""
    return not tier.stored and bool(tier.errors or tier.dropped)


def format_share(part: int, whole: int) -> str:
    """Return a number and its share of the whole, in columns: ``      12 ( 33.3 %)``."""
    return f"{part:>12,} ({100 * part / max(whole, 1):5.1f} %)"


def describe_left_out(summary: Summary) -> Iterator[str]:
    """Yield the lines about what failed and what was skipped."""
    if summary.failed:
        yield f"{summary.failed:,} failed, reported above"
    if summary.binary:
        yield f"{format_count(summary.binary, 'binary file')} skipped"
    if summary.skipped:
        yield f"skipped: {describe_skipped(summary.skipped)}"


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """Return what was skipped, by suffix or reason, for example ``.pdf: 3, ignored by .gitignore: 20``."""
    return ", ".join(f"{reason}: {number:,}" for reason, number in skipped.items())
