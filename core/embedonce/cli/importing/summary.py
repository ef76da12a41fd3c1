"""The result of an import: what was found, verified and stored, and what was left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from embedonce._messages import format_count
from embedonce.cli.embedding.failures import FailureGroup
from embedonce.cli.embedding.summary import describe_cost, format_share
from embedonce.cli.money import SummedCost

if TYPE_CHECKING:
    from .reading import Counts
    from .verification import Verification


@dataclass(slots=True)
class Summary:
    """Result of an import, counted in texts.

    ``found`` is ``imported`` + ``already_there`` + ``different`` + ``changed`` + the sum of ``invalid``, unless the
    import ended early.
    """

    source: str
    """The source, as the importer names it."""
    importer: str
    task: str
    dry_run: bool
    found: int = 0
    """Texts for which the source had a value that could be read. Like all counts, it is lower if the import ended
    early."""
    imported: int = 0
    """Texts whose vectors were given to the tiers. In a dry run: texts that an import would store."""
    already_there: int = 0
    """Texts that a tier has with an equal vector, or that the source has several times."""
    different: int = 0
    """Texts that a tier has with another vector. The tier keeps its vector."""
    changed: int = 0
    """Texts that normalisation changes. Their vectors do not belong to the texts that the provider would embed."""
    unreadable: dict[str, int] = field(default_factory=dict)
    """Values that the importer could not read, by reason."""
    invalid: dict[str, int] = field(default_factory=dict)
    """Texts and vectors that cannot be stored, by reason. A text with several different vectors in the source is one of
    them."""
    passages: int | None = None
    """With ``--texts``: the passages that were read."""
    missing: int | None = None
    """With ``--texts``: distinct texts that the source does not have. They are counted once per 2,048 passages."""
    failed: int = 0
    """With ``--texts``: broken lines and unreadable files."""
    failures: list[FailureGroup] = field(default_factory=list)
    """With ``--texts``: the failures by file and reason, in the order of the first failure of each group."""
    verified: int = 0
    """Texts that were embedded anew, to compare the vectors."""
    equal: int = 0
    """Number of the verified texts whose vectors are equal, apart from their precision."""
    cosine: float | None = None
    """The lowest cosine of a found and a computed vector; None if none were compared, or if their dimensions differ."""
    causes: list[str] = field(default_factory=list)
    """Why the vectors differ: ``dimensions``, ``model``, ``mixed``, ``task``, ``normalized``, ``not normalized``,
    ``scaled`` or ``precision``. Empty if they are equal."""
    spent: SummedCost | None = None
    """Cost of the verification. None if it could not be computed."""
    trouble: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of failures by tier and kind, as in the summary of ``embedonce embed``."""
    tier_causes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of errors and dropped writes by tier and cause. Tiers without errors are left out."""
    unstored: dict[str, int] = field(default_factory=dict)
    """Number of imported vectors that a tier has not stored because it failed, by tier. Only tiers that outlive the
    process are counted."""
    seconds: float = 0.0
    stopped: str | None = None
    """Reason why the import ended early, or None."""

    def take_counts(self, counts: Counts, *, with_texts: bool) -> None:
        """Take over the counts of a pass over the source."""
        self.found, self.changed = counts.found, counts.changed
        self.unreadable, self.invalid = dict(counts.unreadable), dict(counts.invalid)
        if with_texts:
            self.passages, self.missing = counts.passages, counts.missing

    def take_verification(self, verification: Verification) -> None:
        """Take over the result of the verification."""
        self.verified, self.equal, self.cosine = verification.compared, verification.equal, verification.cosine
        self.causes = [] if verification.difference is None else list(verification.difference.causes)


def describe_summary(summary: Summary) -> Iterator[str]:
    """Yield the lines of the summary for people."""
    if summary.passages is not None:
        yield format_count(summary.passages, "passage") + " read"
    if summary.causes:
        # The pass over the source was only for the sample, so its counts are not those of the source.
        precision = " apart from their precision" if "precision" in summary.causes else ""
        lowest = "" if summary.cosine is None else f", and the lowest cosine is {summary.cosine}"
        compared = format_count(summary.verified, "text")
        yield f"{compared} compared: {summary.equal:,} have equal vectors{precision}{lowest}"
        yield from _describe_end(summary)
        return
    yield f"{format_count(summary.found, 'text')} found in {summary.source}"
    verb = "would be imported" if summary.dry_run else "imported"
    yield f"  {format_share(summary.imported, summary.found)} {verb}"
    if summary.unstored:
        lost = max(summary.unstored.values())
        yield f"  {format_share(lost, summary.found)} of them not stored in every tier, reported above"
    for count, what in (
        (summary.already_there, "already there"),
        (summary.different, "already there with another vector; the tier keeps its vector"),
        (summary.changed, "changed by normalisation, so their vectors belong to other texts"),
    ):
        if count:
            yield f"  {format_share(count, summary.found)} {what}"
    for reason, count in summary.invalid.items():
        yield f"  {format_share(count, summary.found)} invalid: {reason}"
    for reason, count in summary.unreadable.items():
        yield f"{format_count(count, 'value')} unreadable: {reason}"
    if summary.missing:
        yield f"{format_count(summary.missing, 'text')} missing in the source"
    if summary.failed:
        yield f"{format_count(summary.failed, 'passage')} failed, reported above"
    if summary.verified:
        yield f"{format_count(summary.verified, 'text')} verified, the lowest cosine is {summary.cosine}"
    yield from _describe_end(summary)
    yield f"{summary.seconds:,.1f} s, {summary.found / max(summary.seconds, 1e-9):,.0f} texts/s"


def _describe_end(summary: Summary) -> Iterator[str]:
    if line := describe_cost(summary.spent):
        yield f"cost of the verification: {line}"
    if summary.dry_run or summary.causes:
        yield "nothing was stored"
