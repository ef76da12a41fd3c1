"""Read-only tiers: what they keep of erased entries, and what they hold if a cache does not use it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from embedonce._messages import format_count
from embedonce.keys import CARD_PREFIX, KEY_PREFIX, SpaceCard

from .card_words import MOST_NAMED, compare_cards, name_space
from .ports import Port
from .tiers import LiveTier, TierUnable


class EntriesKept(TierUnable):
    """A read-only tier has some of the entries that are to be erased. ``scopes`` has their number by scope."""

    def __init__(self, message: str, tier: str, scopes: Mapping[str, int]) -> None:
        super().__init__(message, tier)
        self.scopes = scopes


# --- words ------------------------------------------------------------------------------------


def describe_kept(tier: str, backend: object, scopes: Mapping[str, int], without: str, folder: str = "FOLDER") -> str:
    """Return why a read-only tier still has some entries, and the command that makes its store without them.

    ``scopes`` has the number of these entries by scope, and ``without`` the options of ``embedonce export`` that leave
    them out. ``backend`` is the tier's backend or its class. If it has no writer, no command can make its store.
    """
    kept = f"it is read-only and keeps {sum(scopes.values()):,} of the entries"
    if not hasattr(backend, "create_writer"):
        return f"{kept}; rebuild its store without them"
    command = f"embedonce export --from {shlex.quote(tier)} --out {folder} --replace {without}"
    return f"{kept}; rebuild it without them: {command}"


def exclude_texts(file: str = "FILE") -> str:
    """Return the option of ``embedonce export`` that leaves out the texts of a file."""
    return f"--except-texts {file}"


def exclude_scopes(scopes: Iterable[str]) -> str:
    """Return the options of ``embedonce export`` that leave out some scopes. At most :data:`MOST_NAMED` are named."""
    names = list(scopes)
    options = " ".join(f"--except-scope {name}" for name in names[:MOST_NAMED])
    more = len(names) - MOST_NAMED
    return f"{options} (and so for {format_count(more, 'more scope')})" if more > 0 else options


# --- erasing ----------------------------------------------------------------------------------


async def refuse_to_forget(port: Port, tier: LiveTier, keys: Sequence[str]) -> None:
    """Check that a read-only tier has none of the keys.

    Raises:
        EntriesKept: it has some of them.
        TierError: the tier failed.
    """
    _refuse(tier, Counter(key.split(".", 2)[1] for key in await tier.find_stored(port, keys)), exclude_texts())


async def refuse_to_purge(port: Port, tier: LiveTier, scopes: Iterable[str]) -> None:
    """Check that a read-only tier has no entries of these scopes.

    Raises:
        EntriesKept: it has some.
        TierError: the tier failed, or can neither count nor list its keys.
    """
    counts = await count_entries(port, tier, scopes)
    _refuse(tier, counts, exclude_scopes(counts))


def _refuse(tier: LiveTier, scopes: Mapping[str, int], without: str) -> None:
    if scopes:
        raise EntriesKept(describe_kept(tier.name, tier.backend, scopes, without), tier.name, dict(scopes))


async def count_entries(port: Port, tier: LiveTier, scopes: Iterable[str]) -> dict[str, int]:
    """Return the number of entries of each of these scopes. Scopes without entries are left out.

    Raises:
        TierError: the tier failed, or can neither count nor list its keys.
    """
    counts = {scope: await tier.count(port, f"{KEY_PREFIX}{scope}.") for scope in scopes}
    return {scope: count for scope, count in counts.items() if count}


# --- checking ---------------------------------------------------------------------------------


async def describe_unused(
    port: Port, tier: LiveTier, stored: Mapping[str, SpaceCard], own: Mapping[str, SpaceCard]
) -> str:
    """Return what a read-only tier holds, if it has no entries of the cache's ``own`` scopes; otherwise "".

    ``stored`` has the cards that the tier stores, by scope. A backend that cannot count is not asked, because listing
    its keys may take long.

    Raises:
        TierError: the tier failed.
    """
    if not tier.capabilities.count or await count_entries(port, tier, own):
        return ""
    # The keys of space cards have the prefix of the keys of entries.
    total = await tier.count(port, KEY_PREFIX) - await tier.count(port, CARD_PREFIX)
    if total <= 0:
        return "holds no entries"
    counts = await count_entries(port, tier, stored)
    named = [(count, name_space(stored[name])) for name, count in counts.items()]
    unknown = total - sum(counts.values())
    if unknown > 0:
        named.append((unknown, "unknown spaces"))
    spaces = [f"{format_count(count, 'entry', 'entries')} of {name}" for count, name in named]
    if len(spaces) > MOST_NAMED:
        spaces[MOST_NAMED:] = [format_count(len(spaces) - MOST_NAMED, "more space")]
    differences: list[str] = min(
        (compare_cards(mine, stored[name]) for mine in own.values() for name in counts), key=len, default=[]
    )
    why = f": {', '.join(differences)}" if differences else ""
    return f"holds {'; '.join(spaces)}, none of which this configuration uses{why}"
