"""Joins what was found in the tiers and what was computed in several parts to one answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import copy
from typing import NamedTuple

from embedonce import Fetched, TextError, TextRefused
from embedonce.vectors import NO_WORK, Metadata, Vector


class Part(NamedTuple):
    """Some of the texts that were missing, and what was fetched for them."""

    texts: Sequence[str]
    fetched: Fetched


def fail_rest(texts: Sequence[str], fetched: Fetched) -> Part:
    """Return a part whose texts were not sent, because all texts of the part before failed."""
    error = next(iter(fetched.failed.values()))
    empty = [None] * len(texts)
    failed = dict.fromkeys(range(len(texts)), error)
    return Part(texts, Fetched(empty, empty, failed, empty, fetched.space, {}, {}))


def combine(
    count: int, found: Fetched | None, parts: Sequence[Part], places: Mapping[str, Sequence[int]]
) -> Fetched | None:
    """Return the answer for ``count`` texts, or None if its vectors would belong to different vector spaces.

    ``found`` has the texts that the tiers had. ``places`` has the positions of each text in ``parts``.
    """
    answers = [*([] if found is None else [found]), *(part.fetched for part in parts)]
    filled = [answer for answer in answers if any(row is not None for row in answer.rows)] or answers[-1:]
    space = filled[0].space
    if any(answer.space != space for answer in filled):
        return None
    rows: list[Vector | None] = [None] * count if found is None else list(found.rows)
    sources: list[str | None] = [None] * count if found is None else list(found.sources)
    metadata: list[Metadata | None] = [None] * count if found is None else list(found.metadata)
    failed: dict[int, Exception] = {} if found is None else dict(found.failed)
    changed: set[int] = set()
    for texts, fetched in parts:
        for i, text in enumerate(texts):
            for place in places[text]:
                rows[place], sources[place], metadata[place] = fetched.rows[i], fetched.sources[i], fetched.metadata[i]
                if i in fetched.failed:
                    failed[place] = _set_position(fetched.failed[i], place)
                if i in fetched.changed:
                    changed.add(place)
    seconds: defaultdict[str, float] = defaultdict(float)
    errors: dict[str, str] = {}
    for answer in answers:
        for name, spent in answer.seconds.items():
            seconds[name] += spent
        errors.update(answer.errors)
    return Fetched(
        rows=rows,
        sources=sources,
        failed=dict(sorted(failed.items())),
        metadata=metadata,
        space=space,
        seconds=dict(seconds),
        errors=errors,
        dimensions=next((answer.dimensions for answer in filled if answer.dimensions is not None), None),
        computed=sum((answer.computed for answer in answers), NO_WORK),
        saved=sum((answer.saved for answer in answers), NO_WORK),
        wasted=sum((answer.wasted for answer in answers), NO_WORK),
        changed=frozenset(changed),
    )


def _set_position(error: Exception, place: int) -> Exception:
    """Return a copy of an error of one text with the position of the text in the request."""
    if isinstance(error, TextRefused):
        own = copy(error)
        own.positions = (place,)
        own.__cause__ = error.__cause__
        return own
    if isinstance(error, TextError):
        own_ = copy(error)
        own_.position = place
        return own_
    return error
