"""Encodes entries for a backend, and decodes and checks the frames or entries that the backend returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from embedonce.contracts import Capabilities
from embedonce.keys import CARD_PREFIX, SERVED_MODEL
from embedonce.vectors import Decoded, Dtype, Entries, Entry, decode_frame, decode_frames, encode_frames

from .checks import check_entries, is_usable_entry

if TYPE_CHECKING:
    from embedonce.encryption import Encryption

MAX_CLOCK_DIFFERENCE = 60.0
"""Maximum number of seconds by which the clocks of two hosts may differ. For short TTLs, a tenth of the TTL."""

TEXT_PREVIEW = "text_preview"
"""Name of the metadata field for the start of a text. Only tiers that store previews have this field."""


class Codec:
    """Converts entries to the values that one backend stores, and back."""

    def __init__(
        self,
        capabilities: Capabilities,
        encryption: Encryption | None,
        *,
        longest_ttl: float | None,
        clock: Callable[[], float],
    ) -> None:
        self.longest_ttl = longest_ttl
        """Maximum number of seconds from the writing of an entry with an expiry date until it expires; None if there is
        no limit."""
        self.longest_life = _add_tolerance(longest_ttl)
        """Maximum number of seconds from now until an entry with an expiry date expires.

        An entry that expires later has expired already: the clock was set back after the entry was written.
        """
        self._holds = capabilities.holds
        # If this chain writes to a tier in this process, it has checked the tier's entries already.
        self._is_trusted = capabilities.scope == "process" and not capabilities.read_only
        self._keeps_previews = capabilities.text_preview
        self._encryption = encryption
        self._clock = clock
        self._is_plain = encryption is None and not capabilities.text_preview
        """Whether values are frames or entries, without encryption and previews."""

    @property
    def is_encrypted(self) -> bool:
        return self._encryption is not None

    def encode(self, entries: Mapping[str, Entry]) -> Mapping[str, Any]:
        """Return the values that the backend stores for these entries.

        An entry that does not fit into a frame is left out. For example, its metadata may become too large because a
        preview is added.
        """
        if self._encryption is not None:
            return self._encryption.encrypt(_encode_valid(entries))
        return _encode_valid(entries) if self._holds == "frames" else entries

    def decode(
        self, values: Mapping[str, Any], *, dtype: Dtype, dimensions: int | None, now: float | None = None
    ) -> Decoded:
        """Check the frames or entries that the backend returned. In an encrypted tier, decrypt the frames first."""
        now = self._clock() if now is None else now
        decoded = self._decode(values, dtype, dimensions, now)
        if self.longest_life < math.inf and math.isfinite(now):
            _drop_late(decoded, now + self.longest_life)
        return decoded

    def decode_plain(self, key: str, value: Any, dtype: Dtype, dimensions: int) -> Entry | None:
        """Return the entry of one valid frame, or one valid entry. Return None for any other value.

        :meth:`decode` judges the values for which the result is None. A call for one text needs no collection of
        entries, so this takes a third of the time of :meth:`decode`.
        """
        if not self._is_plain:
            return None
        now = self._clock()
        if type(value) is bytes and self._holds != "entries":
            entry = decode_frame(key, value, now=now, dtype=dtype, dimensions=dimensions)
        elif type(value) is Entry and self._holds != "frames" and is_usable_entry(value, now, dtype, dimensions):
            entry = value
        else:
            return None
        is_late = entry is not None and entry.expires is not None and entry.expires - now > self.longest_life
        return None if is_late else entry

    def _decode(self, values: Mapping[str, Any], dtype: Dtype, dimensions: int | None, now: float) -> Decoded:
        if self._holds == "entries":
            return check_entries(values, now=now, dtype=dtype, dimensions=dimensions, trusted=self._is_trusted)
        if self._holds == "frames" or not (entries := _select_entries(values)):
            return self._decode_frames(values, now, dtype, dimensions)
        if self._encryption is None:
            decoded = check_entries(entries, now=now, dtype=dtype, dimensions=dimensions)
        else:  # these entries were stored before encryption was turned on
            decoded = Decoded(missed=list(entries))
        if len(entries) < len(values):
            rest = {key: value for key, value in values.items() if key not in entries}
            frames = self._decode_frames(rest, now, dtype, dimensions)
            decoded.entries.add(frames.entries)
            decoded.corrupt.extend(frames.corrupt)
            decoded.missed.extend(frames.missed)
        return decoded

    def _decode_frames(self, frames: Mapping[str, Any], now: float, dtype: Dtype, dimensions: int | None) -> Decoded:
        if self._encryption is None:
            return decode_frames(frames, now=now, dtype=dtype, dimensions=dimensions)
        plain, corrupt, unencrypted = self._encryption.decrypt(frames)
        decoded = decode_frames(plain, now=now, dtype=dtype, dimensions=dimensions)
        decoded.corrupt.extend(corrupt)
        decoded.missed.extend(unencrypted)
        return decoded

    def read_served_models(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Return, by scope, the names of models in the space cards that the backend returned. Skip other cards."""
        found = {}
        for key, card in self.decode(values, dtype="int8", dimensions=None).entries.items():
            name = (card.metadata or {}).get(SERVED_MODEL)
            if isinstance(name, str) and name:
                found[key.removeprefix(CARD_PREFIX)] = name
        return found

    def add_previews(self, entries: Mapping[str, Entry], preview_of: Callable[[str], str]) -> Mapping[str, Entry]:
        """Return the entries to store. In a tier with previews, each entry's metadata gets the start of the text."""
        if not self._keeps_previews:
            return entries
        return {
            key: entry._replace(metadata={**(entry.metadata or {}), TEXT_PREVIEW: preview_of(key)})
            for key, entry in entries.items()
        }

    def remove_previews(self, entries: Entries) -> Entries:
        """Return the entries without previews, so that a promotion does not copy texts into other tiers."""
        if not self._keeps_previews:
            return entries
        for key, entry in entries.as_dict().items():
            if entry.metadata is not None and TEXT_PREVIEW in entry.metadata:
                rest = {name: value for name, value in entry.metadata.items() if name != TEXT_PREVIEW}
                entries[key] = entry._replace(metadata=rest or None)
        return entries


def _add_tolerance(ttl: float | None) -> float:
    """Return a TTL plus the difference that the clocks of two hosts may have."""
    return math.inf if ttl is None else ttl + min(MAX_CLOCK_DIFFERENCE, ttl / 10)


def _drop_late(decoded: Decoded, latest: float) -> None:
    """Move the entries that expire after ``latest`` to the missed ones. Entries that never expire stay."""
    entries = decoded.entries
    late = [key for key, entry in entries.loose().items() if entry.expires is not None and entry.expires > latest]
    for block in entries.blocks:
        is_late = (block.expires > latest) & np.isfinite(block.expires)
        late += [block.keys[row] for row in np.flatnonzero(is_late).tolist()]
    for key in late:
        del entries[key]
    decoded.missed.extend(late)


def _encode_valid(entries: Mapping[str, Entry]) -> dict[str, bytes]:
    try:
        return encode_frames(entries)
    except (TypeError, ValueError):
        frames: dict[str, bytes] = {}
        for key, entry in entries.items():
            with suppress(TypeError, ValueError):
                frames |= encode_frames({key: entry})
        return frames


def _select_entries(values: Mapping[str, Any]) -> Mapping[str, Entry]:
    return values if isinstance(values, Entries) else {k: v for k, v in values.items() if type(v) is Entry}
