"""Encodes entries for a backend, and decodes and checks the frames or entries that the backend returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from embedonce.contracts import Capabilities
from embedonce.keys import CARD_PREFIX, SERVED_MODEL
from embedonce.vectors import Decoded, Dtype, Entries, Entry, decode_frames, encode_frames

from .checks import check_entries

if TYPE_CHECKING:
    from embedonce.encryption import Encryption

TEXT_PREVIEW = "text_preview"
"""Name of the metadata field for the start of a text. Only tiers that store previews have this field."""


class Codec:
    """Converts entries to the values that one backend stores, and back."""

    def __init__(
        self, capabilities: Capabilities, encryption: Encryption | None, *, clock: Callable[[], float]
    ) -> None:
        self._holds = capabilities.holds
        self._is_trusted = capabilities.scope == "process"
        self._keeps_previews = capabilities.text_preview
        self._encryption = encryption
        self._clock = clock

    @property
    def is_encrypted(self) -> bool:
        return self._encryption is not None

    def encode(self, entries: Mapping[str, Entry]) -> Mapping[str, Any]:
        """Return the values that the backend stores for these entries."""
        if self._encryption is not None:
            return self._encryption.encrypt(encode_frames(entries))
        return encode_frames(entries) if self._holds == "frames" else entries

    def decode(
        self, values: Mapping[str, Any], *, dtype: Dtype, dimensions: int | None, now: float | None = None
    ) -> Decoded:
        """Check the frames or entries that the backend returned. In an encrypted tier, decrypt the frames first."""
        now = self._clock() if now is None else now
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


def _select_entries(values: Mapping[str, Any]) -> Mapping[str, Entry]:
    return values if isinstance(values, Entries) else {k: v for k, v in values.items() if type(v) is Entry}
