"""Verify that a sample of a source's vectors are those that the provider computes for the same texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from embedonce._engine.import_checks import list_other_tasks
from embedonce._engine.verifying import LEAST_COSINE, Cause, Difference, compute_cosines, find_difference
from embedonce._messages import format_count
from embedonce.cli.embedding.failures import describe_error
from embedonce.cli.embedding.run import TEXT_ERRORS
from embedonce.cli.output import Failed
from embedonce.contracts import Task
from embedonce.vectors import Dtype, Vector

from .sampling import SamplesBySize

if TYPE_CHECKING:
    from embedonce.cache import Cache

BATCH = 1024
"""Maximum number of texts that are computed in one call."""
TASK_TEXTS = 3
"""Number of differing texts that are also embedded for the other tasks."""

ADVICE: Mapping[Cause, str] = {
    "dimensions": "Choose in [provider] the model and the dimensions with which the vectors were made, or check the "
    "options of the importer",
    "model": "Choose in [provider] the model with which the vectors were made, or check the options of the importer "
    "and --task",
    "mixed": "If an option of the importer can choose the part of the source that one model has made, set this option. "
    "Otherwise let embedonce compute the vectors",
    "normalized": "Let the provider normalise its vectors, if it has an option for it, or let embedonce compute the "
    "vectors",
    "not normalized": "Choose the provider's option that leaves vectors as the model returns them, if it has one, or "
    "let embedonce compute the vectors",
    "scaled": "Let embedonce compute the vectors",
    "precision": 'If float16 is precise enough for all vectors, set dtype = "float16" in [cache]. Digits that the '
    "source has lost otherwise can only be computed anew",
}
"""What the user can do about each cause."""


class ProviderFailed(Failed):
    """The provider could not compute the vectors that the verification needs. This says nothing about the source."""


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of comparing vectors of a source with those that the provider has computed."""

    compared: int
    """Number of texts whose vectors were compared."""
    cosine: float | None
    """The lowest cosine of a found and a computed vector; None if their dimensions differ."""
    dimensions: int
    """Dimensions of the provider's vectors."""
    difference: Difference | None = None
    other_task: Task | None = None
    """The task whose vectors the source has, if the verification has found out."""

    @property
    def equal(self) -> int:
        """Number of compared texts whose vectors are equal, apart from their precision."""
        return self.compared if self.difference is None else self.difference.equal

    def describe_difference(self, source: str) -> str:
        """Return what is wrong with the vectors of ``source``, and what to do."""
        assert self.difference is not None
        if self.other_task is not None:
            advice = f"Import them with --task {self.other_task}"
        else:
            advice = ". ".join(ADVICE[cause] for cause in self.difference.causes if cause in ADVICE)
        compared = format_count(self.compared, "verified text")
        precision = " apart from their precision" if "precision" in self.difference.causes else ""
        return (
            f"cannot import from {source}: its vectors are not those that the provider computes. "
            f"{self.difference.equal:,} of {compared} have equal vectors{precision}; {self.difference}. {advice}"
        )


def verify_samples(
    cache: Cache, samples: SamplesBySize, task: Task, *, dimensions: int | None, dtype: Dtype
) -> Verification | None:
    """Compute the texts of a sample anew, and compare the vectors. Return None if there is no text to compare.

    ``dimensions`` are those of the provider's vectors, if they are known. Nothing is stored.

    Raises:
        ProviderFailed: the provider has computed no vector, or has failed for other reasons than a text.
    """
    by_size = samples.by_dimensions
    size = dimensions if dimensions in by_size else samples.find_most_common()
    if size is None:
        return None
    pairs = _compute(cache, by_size[size].items, task)
    expected = pairs[0].computed.size
    if expected != size and expected in by_size:
        pairs = _compute(cache, by_size[expected].items, task)
    difference = _compare(pairs, dtype)
    if pairs[0].found.size != expected:
        return Verification(len(pairs), None, expected, difference)
    cosines = compute_cosines(np.stack([pair.found for pair in pairs]), np.stack([pair.computed for pair in pairs]))
    result = Verification(len(pairs), round(float(cosines.min()), 6), expected, difference)
    if difference is None or not {"model", "mixed"} & set(difference.causes):
        return result
    differing = [(pairs[i].text, pairs[i].found) for i in np.flatnonzero(cosines < LEAST_COSINE)[:TASK_TEXTS]]
    for other in list_other_tasks(cache.provider, task):
        try:
            others = _compute(cache, differing, other)
        except ProviderFailed:
            continue  # the cause is then reported as far as it is known
        if _compare(others, dtype) is None:
            return replace(result, difference=replace(difference, causes=("task",)), other_task=other)
    return result


class Pair(NamedTuple):
    """Two vectors of one text."""

    text: str
    found: Vector
    computed: Vector


def _compute(cache: Cache, found: Sequence[tuple[str, Vector]], task: Task) -> list[Pair]:
    """Compute the vectors of texts. Leave out the texts that the provider cannot embed.

    Raises:
        ProviderFailed: no text could be computed, or one of them failed for another reason than the text itself.
    """
    space = cache.lookup([], task=task).space
    pairs: list[Pair] = []
    refusal: tuple[Exception | None, str] | None = None
    for start in range(0, len(found), BATCH):
        batch = found[start : start + BATCH]
        fetched = cache.fetch([text for text, _ in batch], task, fresh=True, store=False)
        if fetched.space != space:
            raise ProviderFailed(
                "the vectors could not be verified, because the provider failed, and the fallback has another vector "
                "space"
            )
        for place, ((text, row), computed) in enumerate(zip(batch, fetched.rows, strict=True)):
            if computed is not None:
                pairs.append(Pair(text, row, computed))
                continue
            error = fetched.failed.get(place)
            if not isinstance(error, TEXT_ERRORS):
                raise _explain_failure(error, text)
            refusal = error, text
    if not pairs:
        raise _explain_failure(*(refusal or (None, "")))
    return pairs


def _explain_failure(error: Exception | None, text: str) -> ProviderFailed:
    return ProviderFailed(
        f"the vectors could not be verified, because the provider failed: {describe_error(error, text)}"
    )


def _compare(pairs: Sequence[Pair], dtype: Dtype) -> Difference | None:
    return find_difference([pair.found for pair in pairs], [pair.computed for pair in pairs], dtype)
