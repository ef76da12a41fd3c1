"""The result of a run: what was read, computed and written, and what failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .failures import FailureGroup

if TYPE_CHECKING:
    from embedonce.events import Stats, TierStats


@dataclass(slots=True)
class Summary:
    """Result of a run, counted in passages.

    ``texts`` is ``computed`` + the sum of ``hits`` + ``repeated`` + the passages that could not be embedded.
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


def has_stored_nothing(tier: TierStats) -> bool:
    """Return whether a tier stored nothing although vectors were written to it."""
    return not tier.stored and bool(tier.errors or tier.dropped)


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """Return what was skipped, by suffix or reason, for example ``.pdf: 3, ignored by .gitignore: 20``."""
    return ", ".join(f"{reason}: {number:,}" for reason, number in skipped.items())
