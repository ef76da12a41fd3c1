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

NOT_DELETABLE: Final = "no probe was written, because this tier cannot delete"
READ_ONLY: Final = 'read-only (write = "none")'


async def probe_writes(port: Port, tier: LiveTier, clock: Callable[[], float]) -> tuple[bool | None, str]:
    """Return whether a tier can be written to, and a remark. None means that this was not tried.

    A probe is not in any scope, so it is neither listed nor counted. It is deleted afterwards. A bounded tier in
    this process gets no probe unless it is empty, because the probe could evict an entry.

    Raises:
        TierError: the tier failed, or it does not return what was written.
    """
    if tier.writer.mode == "none":
        return None, READ_ONLY
    caps = tier.capabilities
    if not caps.delete:
        return None, NOT_DELETABLE
    if caps.scope == "process" and caps.bounded is not False and not await _is_empty(port, tier):
        return None, ""
    token = secrets.token_hex(8)
    keys = [f"{PROBE_KEY}{token}{number:x}" for number in range(PROBES)]
    try:
        return await _write_and_read(port, tier, keys, clock)
    finally:
        with suppress(TierError):
            await tier.erase(port, keys)


async def _is_empty(port: Port, tier: LiveTier) -> bool:
    if not tier.capabilities.count:
        return False
    count: int = await tier.calls.call_strictly(port, lambda: tier.backend.count(KEY_PREFIX), listing=True)
    return count == 0


async def _write_and_read(
    port: Port, tier: LiveTier, keys: Sequence[str], clock: Callable[[], float]
) -> tuple[bool | None, str]:
    now = clock()
    vector = freeze(np.arange(1, 9, dtype=np.float32))
    entries = {key: Entry(vector, now, expires=now + PROBE_SECONDS) for key in keys}
    values = tier.codec.encode(entries)
    try:
        for chunk in tier.calls.split_into_chunks(keys):
            part = {key: values[key] for key in chunk}
            await tier.calls.call_strictly(port, partial(tier.backend.set_many, part, PROBE_SECONDS))
    except TierError as error:
        cause = error.__cause__
        if isinstance(cause, TierBusy):
            return None, "no probe was written, because this tier is busy; try again later"
        if not isinstance(cause, PartialAnswer) or not set(keys) - set(cause.failed):
            raise
        keys = [key for key in keys if key not in cause.failed]
    decoded = tier.decode(await _read(port, tier, keys), dtype="float32", dimensions=vector.size)
    if not decoded.entries:
        raise TierError("a probe was written, but it is missing when it is read", tier.name)
    if any(not np.array_equal(entry.vector, vector) for entry in decoded.entries.as_dict().values()):
        raise TierError("a probe was written, but it has another value when it is read", tier.name)
    return True, ""


async def _read(port: Port, tier: LiveTier, keys: Sequence[str]) -> Mapping[str, Any]:
    try:
        return await tier.peek(port, keys)
    except TierError as error:
        if isinstance(error.__cause__, PartialAnswer):
            return dict(error.__cause__.answer)
        raise
