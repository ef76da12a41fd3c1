"""One call while it is under way: how it waits, its place in the order of calls, and what it has gathered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedonce.answers import Fetched
from embedonce.errors import TierError
from embedonce.vectors import Entries, Metadata

from .flights import Ticket
from .ports import Port
from .routes import Route

PROVIDER = "provider"

PREVIEW = 200
"""Characters of a text that a tier with ``text_preview`` keeps."""


@dataclass(slots=True)
class Answer:
    """What a call has gathered so far, by key."""

    route: Route
    keys: list[str]
    texts: Sequence[str]
    store: bool
    metadata: Mapping[str, Metadata] = field(default_factory=dict)
    entries: Entries = field(default_factory=Entries)
    found: list[tuple[str, Iterable[str]]] = field(default_factory=list)
    failed: dict[str, Exception] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    errors: dict[str, str] = field(default_factory=dict)
    failing: set[str] = field(default_factory=set)
    """Tiers that are not written to in this call, because they failed in it or are left out."""
    unknown: dict[str, set[str]] = field(default_factory=dict)
    """By tier the keys that a part of it failed for, which are not written to it."""
    store_error: TierError | None = None
    """A tier with ``on_error = "raise"`` that could not be written to."""
    _texts_by_key: dict[str, str] | None = None

    @property
    def dimensions(self) -> int | None:
        if self.route.dimensions is None and self.entries:
            return next(iter(self.entries.sizes()))
        return self.route.dimensions

    def preview(self, key: str) -> str:
        """Return the beginning of the text of a key, as it was asked for."""
        return self.texts_by_key()[key][:PREVIEW]

    def texts_by_key(self) -> dict[str, str]:
        """Return the text of each key, the first one where normalisation makes several the same."""
        if self._texts_by_key is None:
            self._texts_by_key = dict(zip(reversed(self.keys), reversed(self.texts), strict=True))
        return self._texts_by_key

    def find_missing(self) -> list[str]:
        failed = self.failed
        missing = self.entries.lacking(dict.fromkeys(self.keys))
        return [key for key in missing if key not in failed] if failed else missing

    def rows(self) -> list[Any]:
        """Return every row in order.

        Raises:
            Exception: what the first text that failed, failed with.
        """
        self._check()
        entries = self.entries.as_dict()
        return [entries[key].vector for key in self.keys]

    def matrix(self) -> NDArray[np.float32]:
        """Return every row in order, as a matrix (n, d). Raises as :meth:`rows` does."""
        self._check()
        return self.entries.matrix(self.keys, self.route.dimensions)

    def _check(self) -> None:
        if self.failed:
            for key in self.entries.lacking(self.keys):
                raise self.failed[key]

    def to_fetched(self) -> Fetched:
        sources = dict.fromkeys(self.entries, PROVIDER)
        for name, keys in self.found:
            sources.update(dict.fromkeys(keys, name))
        held = self.entries.as_dict()
        entries = [held.get(key) for key in self.keys]
        return Fetched(
            rows=[None if entry is None else entry.vector for entry in entries],
            sources=[sources.get(key) for key in self.keys],
            failed={i: self.failed[key] for i, key in enumerate(self.keys) if key in self.failed},
            # Copies: what is returned must not be a way to change what is cached.
            metadata=[
                None if entry is None or entry.metadata is None else deepcopy(entry.metadata) for entry in entries
            ],
            space=self.route.space,
            seconds=dict(self.seconds),
            errors=self.errors,
            dimensions=self.dimensions,
        )


class Call(NamedTuple):
    """What every step of the plan needs of the call that it is a part of."""

    port: Port
    ticket: Ticket
    answer: Answer
