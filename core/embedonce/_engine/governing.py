"""What governs the chains of a test session: a store that every chain asks last, and who is told the answers of calls.

Without a governor, a chain does nothing of this, and its hits cost no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from embedonce.contracts import Backend
from embedonce.errors import ReplayMiss
from embedonce.keys import Value
from embedonce.vectors import Entry

from .chain import Tier

if TYPE_CHECKING:
    from embedonce.encryption import Encryption

    from .call import Answer

STORE = "bundle"
"""Name of the tier that a governor adds to a chain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The answer of one call of a governed cache."""

    scope: str
    """The scope of the keys."""
    card: Mapping[str, Value]
    """The space card of the scope."""
    entries: Mapping[str, Entry]
    """The entries of the texts, by key, wherever they come from. They have no expiry dates."""
    missing: Mapping[str, int]
    """In replay, the keys of the texts that no tier has, and the position of each text in its call, from 0."""
    encryption: Encryption | None
    """The encryption of the chain's first encrypted tier. What the governor stores must be encrypted with it."""


class Governor(Protocol):
    """Changes the chains that are made while it governs, and is told what their calls answer.

    Calls may come from any thread.
    """

    @property
    def replays(self) -> bool:
        """Whether the chains compute nothing, and read only their in-process tiers and ``store``.

        If False, the chains work as without the governor, and ask ``store`` after their tiers and before the provider.
        """
        ...

    @property
    def store(self) -> Backend:
        """The store that every chain asks last. The chains write nothing to it, and do not close it."""
        ...

    def take_answer(self, answered: Answered, /) -> None:
        """Take the answer of a call. It is called only if the governor does not replay."""
        ...

    def explain_misses(self, answered: Answered, /) -> ReplayMiss:
        """Return the error of the texts in ``answered.missing``. It is called only if the governor replays."""
        ...


ChooseGovernor: TypeAlias = Callable[[], Governor | None]

_choose: ChooseGovernor | None = None


@contextmanager
def govern_chains(choose: ChooseGovernor) -> Iterator[None]:
    """Govern every chain that is made in this process inside the ``with`` block.

    ``choose`` is called once for each new cache with tiers of its own. It returns the governor of these tiers, or None
    if the cache shall work as usual. Caches of ``for_provider`` and ``for_namespace`` share the tiers and the governor.
    """
    global _choose
    before, _choose = _choose, choose
    try:
        yield
    finally:
        _choose = before


def choose_governor() -> Governor | None:
    """Return the governor of a new chain, or None."""
    return None if _choose is None else _choose()


class GovernedChain:
    """A chain as its governor changes it."""

    def __init__(self, governor: Governor, chain: Sequence[tuple[str, Tier]]) -> None:
        self._governor = governor
        kept = [
            (name, tier) for name, tier in chain if not governor.replays or tier.backend.capabilities.scope == "process"
        ]
        names = {name for name, _ in kept}
        self._encryption = next((tier.encryption for _, tier in chain if tier.encryption is not None), None)
        store = Tier(
            governor.store,
            on_error="raise" if governor.replays else "skip",
            write="none",
            encryption=self._encryption,
        )
        name = STORE if STORE not in names else next(n for i in range(2, 1000) if (n := f"{STORE}-{i}") not in names)
        self.tiers = [*kept, (name, store)]
        self.replaced: list[Any] = [tier.backend for name, tier in chain if all(tier is not other for _, other in kept)]
        """Backends that the chain does not use. They are closed with the chain."""

    @property
    def replays(self) -> bool:
        return self._governor.replays

    @property
    def store(self) -> Backend:
        """The governor's store. It serves other chains too, so this chain does not close it."""
        return self._governor.store

    def report(self, answer: Answer, card: Mapping[str, Value]) -> None:
        """Tell the governor what a call has answered. The texts that are missing in replay get the governor's error."""
        failed = answer.failed
        missing: dict[str, int] = {}
        if failed:
            for position, key in enumerate(answer.keys, answer.first):
                if isinstance(failed.get(key), ReplayMiss):
                    missing.setdefault(key, position)
        if not missing and self.replays:
            return
        entries = {} if self.replays else answer.entries.as_dict()
        answered = Answered(
            scope=answer.route.keyer.scope,
            card=card,
            entries={key: entry._replace(expires=None) for key, entry in entries.items()},
            missing=missing,
            encryption=self._encryption,
        )
        if self.replays:
            failed.update(dict.fromkeys(missing, self._governor.explain_misses(answered)))
        elif entries:
            self._governor.take_answer(answered)
