"""Proves that a tier can be written to: writes, reads and deletes a few probes."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

import numpy as np

from embedonce.errors import PartialAnswer, TierBusy, TierError
from embedonce.keys import KEY_PREFIX
from embedonce.vectors import Entry, freeze

from .ports import Port
from .tiers import PROBE_KEY, LiveTier

PROBES: Final = 16
"""Number of probes. They are spread over the nodes of a store, so that one lost node does not fail all of them."""

PROBE_SECONDS: Final = 60.0
"""Time to live of a probe, in case this process is killed before it deletes the probe."""

PROBE_VECTOR: Final = freeze(np.arange(1, 9, dtype=np.float32))

NOT_DELETABLE: Final = "no probe was written, because this tier cannot delete"
READ_ONLY: Final = 'read-only (write = "none")'


async def probe_writes(port: Port, tier: LiveTier, clock: Callable[[], float]) -> tuple[bool | None, str]:
    """Return whether a tier stores, returns and deletes probes, and a remark. None means that this was not tried.

    A probe is not in any scope, so it is neither listed nor counted. A probe that cannot be deleted expires. A bounded
    tier in this process gets no probe unless it is empty, because the probe could evict an entry.

    Raises:
        TierError: the tier failed, does not return what was written, or does not delete it.
    """
    caps = tier.capabilities
    if caps.read_only:
        return None, ""
    if tier.writer.mode == "none":
        return None, READ_ONLY
    if not caps.delete:
        return None, NOT_DELETABLE
    if caps.scope == "process" and caps.bounded is not False and not await _is_empty(port, tier):
        return None, ""
    token = secrets.token_hex(8)
    keys = [f"{PROBE_KEY}{token}{number:x}" for number in range(PROBES)]
    try:
        written = await _write(port, tier, keys, clock)
        await _check_values(port, tier, written)
    except BaseException as error:
        with suppress(TierError):
            await tier.erase(port, keys)
        if isinstance(error, TierError) and isinstance(error.__cause__, TierBusy):
            return None, "no probe was written, because this tier is busy"
        raise
    # A node that did not store its probes is probably lost, so its probes, if there are any, are left to expire.
    return True, await _delete(port, tier, written)


async def _is_empty(port: Port, tier: LiveTier) -> bool:
    if not tier.capabilities.count:
        return False
    return await tier.count(port, KEY_PREFIX) == 0


async def _write(port: Port, tier: LiveTier, keys: Sequence[str], clock: Callable[[], float]) -> Sequence[str]:
    """Write a probe under each key, and return the keys that the tier stored."""
    now = clock()
    entries = {key: Entry(PROBE_VECTOR, now, expires=now + PROBE_SECONDS) for key in keys}
    values = tier.codec.encode(entries)
    try:
        for chunk in tier.calls.split_into_chunks(keys):
            part = {key: values[key] for key in chunk}
            await tier.calls.call_strictly(port, partial(tier.backend.set_many, part, PROBE_SECONDS))
    except TierError as error:
        cause = error.__cause__
        if not isinstance(cause, PartialAnswer) or not set(keys) - set(cause.failed):
            raise
        return [key for key in keys if key not in cause.failed]
    return keys


async def _check_values(port: Port, tier: LiveTier, keys: Sequence[str]) -> None:
    decoded = tier.decode(await _read(port, tier, keys), dtype="float32", dimensions=PROBE_VECTOR.size)
    if not decoded.entries:
        raise TierError("a probe was written, but it is missing when it is read", tier.name)
    if any(not np.array_equal(entry.vector, PROBE_VECTOR) for entry in decoded.entries.as_dict().values()):
        raise TierError("a probe was written, but it has another value when it is read", tier.name)


async def _delete(port: Port, tier: LiveTier, keys: Sequence[str]) -> str:
    """Delete the probes, check that they are gone, and return a remark, which is usually empty.

    Raises:
        TierError: the tier cannot delete, or it still returns a probe.
    """
    try:
        await tier.erase(port, keys)
        left = await _read(port, tier, keys)
    except TierError as error:
        if isinstance(error.__cause__, TierBusy):
            return f"a probe was not deleted, because this tier is busy; it expires within {PROBE_SECONDS:.0f} s"
        raise TierError(f"a probe was written, but it cannot be deleted ({error})", tier.name) from error.__cause__
    if left:
        raise TierError("a probe was deleted, but it can still be read", tier.name)
    return ""


async def _read(port: Port, tier: LiveTier, keys: Sequence[str]) -> Mapping[str, Any]:
    try:
        return await tier.peek(port, keys)
    except TierError as error:
        if isinstance(error.__cause__, PartialAnswer):
            return dict(error.__cause__.answer)
        raise
