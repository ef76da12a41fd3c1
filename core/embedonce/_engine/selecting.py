"""Which entries a copy or an export is about."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from embedonce._messages import join_words
from embedonce.errors import TransferRefused
from embedonce.keys import KEY_PREFIX, KeyPolicy, SpaceCard, make_digests, read_fingerprint

from .key_tables import KeyTable, make_key_table
from .ports import Port

MOST_NAMED = 5
"""Maximum number of scopes that an error message names."""


def matches_card(card: SpaceCard | None, parts: Mapping[str, str], where: Callable[[SpaceCard], bool] | None) -> bool:
    """Return whether a space card has these parts and satisfies ``where``. A missing card satisfies no condition."""
    if card is None:
        return not parts and where is None
    return all(card.get(part) == value for part, value in parts.items()) and (where is None or where(card))


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The entries that are wanted: those of some scopes, or of some texts in these scopes."""

    policy: KeyPolicy = field(repr=False)
    scope: str | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    """Parts that the space card of a scope must have, such as its model."""
    where: Callable[[SpaceCard], bool] | None = None
    except_scopes: Collection[str] = ()
    texts: Sequence[str] | None = field(default=None, repr=False)
    """Normalised texts; None for all entries of the scopes."""
    except_texts: Sequence[str] = field(default=(), repr=False)

    @property
    def prefix(self) -> str:
        """What the key of each selected entry begins with."""
        return KEY_PREFIX if self.scope is None else f"{KEY_PREFIX}{self.scope}."

    def matches(self, scope: str, card: SpaceCard | None) -> bool:
        """Return whether entries of this scope may be selected. ``card`` is None if the scope has no space card."""
        if scope in self.except_scopes or self.scope not in (None, scope):
            return False
        return matches_card(card, self.parts, self.where)

    async def apply(
        self, port: Port, listed: Mapping[str, KeyTable | None], cards: Mapping[str, SpaceCard]
    ) -> tuple[dict[str, KeyTable], dict[str, str]]:
        """Return the keys to look for, by scope, and the scopes in which no texts can be found, with the reasons.

        ``listed`` has the keys that a tier holds, by scope. The table of a scope is None if the tier cannot list its
        keys: then these are the keys that the texts would have.

        Raises:
            TransferRefused: the keys of the texts to leave out cannot be made for a scope.
        """
        selected: dict[str, KeyTable] = {}
        unknown: dict[str, str] = {}
        makers: dict[bytes, _TextKeys] = {}
        for scope in sorted(listed):
            card, keys = cards.get(scope), listed[scope]
            if not self.matches(scope, card):
                continue
            if self.texts is not None or self.except_texts:
                fingerprint = None if card is None else read_fingerprint(self.policy, scope, card)
                if fingerprint is None:
                    unknown[scope] = _explain_unknown(card)
                    continue
                if fingerprint not in makers:
                    await port.sleep(0)  # hashing many texts for many spaces must not block an event loop
                    makers[fingerprint] = _TextKeys(self, fingerprint)
                keys = makers[fingerprint].narrow(keys)
            if keys:
                selected[scope] = keys
        if unknown and self.texts is None:
            named = join_words(list(unknown)[:MOST_NAMED])
            more = f" and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
            reason = next(iter(unknown.values()))
            raise TransferRefused(
                f"cannot leave texts out of the scopes {named}{more}, because their keys are not known: {reason}. "
                "Leave these scopes out as well, with except_scopes (--except-scope on the command line)"
            )
        return selected, unknown


class _TextKeys:
    """The keys of the texts of a selection, in all scopes with one fingerprint."""

    def __init__(self, selection: Selection, fingerprint: bytes) -> None:
        policy, texts = selection.policy, selection.texts
        self._wanted = None if texts is None else make_key_table(make_digests(policy, fingerprint, texts))
        self._unwanted = make_key_table(make_digests(policy, fingerprint, selection.except_texts))

    def narrow(self, listed: KeyTable | None) -> KeyTable | None:
        """Return those of the listed keys that are selected. Without a listing, return all keys of the texts."""
        if self._wanted is not None:
            listed = self._wanted if listed is None else listed.intersect(self._wanted)
        return None if listed is None else listed.subtract(self._unwanted)


def _explain_unknown(card: SpaceCard | None) -> str:
    if card is None:
        return "the space card is missing"
    return "the space belongs to another secret, or its space card is from an earlier version"
