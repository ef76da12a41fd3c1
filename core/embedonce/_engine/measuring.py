"""How many entries of a scope a tier holds, how large they are, and how old."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from embedonce.answers import Held
from embedonce.contracts import StoredSize
from embedonce.keys import CARD_PREFIX, KEY_PREFIX, SpaceCard

from .ports import Port
from .tiers import LiveTier

MAX_READ: Final = 1024
"""Maximum number of entries of one scope that are read to measure them, if the backend cannot measure them itself."""


def group_by_scope(keys: Iterable[str]) -> dict[str, list[str]]:
    """Return the keys of entries, by scope. Other keys, such as those of space cards and leases, are left out."""
    scopes: dict[str, list[str]] = {}
    for key in keys:
        if not key.startswith(CARD_PREFIX) and key.count(".") == 2:
            scopes.setdefault(key.split(".", 2)[1], []).append(key)
    return scopes


async def measure(port: Port, tier: LiveTier, scope: str, keys: Sequence[str], card: SpaceCard | None) -> Held:
    """Return what a tier holds of one scope.

    Raises:
        TierError: the tier failed.
    """
    unmeasured = None
    if hasattr(tier.backend, "measure"):
        prefix = f"{KEY_PREFIX}{scope}."
        size: StoredSize = await tier.calls.call_strictly(port, lambda: tier.backend.measure(prefix), listing=True)
    elif tier.capabilities.scope == "process":  # reading an entry may change which entry is evicted next
        size, unmeasured = StoredSize(), "its backend cannot measure"
    elif len(keys) > MAX_READ:
        size, unmeasured = StoredSize(), f"more than {MAX_READ:,} entries, and its backend cannot measure"
    else:
        size = await _measure_values(port, tier, keys)
    dimensions = _read_dimensions(card) or size.dimensions
    if dimensions is None and tier.capabilities.scope != "process":
        dimensions = (await _measure_values(port, tier, keys[:1])).dimensions
    return Held(
        tier.name,
        scope,
        card,
        len(keys),
        dimensions=dimensions,
        bytes=size.bytes,
        oldest=size.oldest,
        newest=size.newest,
        unmeasured=unmeasured,
    )


def _read_dimensions(card: SpaceCard | None) -> int | None:
    dimensions = None if card is None else card.get("dimensions")
    return dimensions if isinstance(dimensions, int) else None


async def _measure_values(port: Port, tier: LiveTier, keys: Sequence[str]) -> StoredSize:
    """Read the values of some keys and measure them."""
    values = await tier.peek(port, keys)
    entries = list(tier.decode(values, dtype="int8", dimensions=None).entries.as_dict().values())
    dates = [entry.created for entry in entries]
    return StoredSize(
        bytes=sum(map(_count_bytes, values.values())),
        oldest=min(dates, default=None),
        newest=max(dates, default=None),
        dimensions=next((entry.vector.size for entry in entries), None),
    )


def _count_bytes(value: Any) -> int:
    """Return the size of a frame, or of an entry's vector."""
    return len(value) if isinstance(value, bytes | memoryview) else int(value.vector.nbytes)
