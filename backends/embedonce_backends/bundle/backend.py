"""The bundle tier: reads entries from an immutable folder of sorted Arrow files, which are mapped into memory.

All processes of a host that open the same bundle share its pages in memory. ``docs/bundles.md`` has the format.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embedonce import hookimpl
from embedonce.contracts import Capabilities, StoredSize, time_left
from embedonce.errors import CacheClosed, ConfigError
from embedonce.options import Doc
from embedonce.vectors import Entries, Entry

from .manifest import Card
from .opened import OpenedBundle, ScopeParts, open_bundle
from .parts import ALL_ROWS, Part, make_block
from .rows import (
    DIGEST_AT,
    ENTRY_KEY,
    KEY_BYTES,
    PREFIX_DIGITS,
    SCOPE_AT,
    Layout,
    compute_checksums,
    read_prefixes,
)
from .writing import BundleWriter

api = 1

MAX_BATCH_KEYS: Final = 4096
"""Maximum number of keys per call. The rows of a call are copied, so this limits the memory of a call."""
MAX_SPACES: Final = 3
"""Maximum number of vector spaces that :meth:`BundleBackend.describe` names."""
CORRUPT: Final = b""
"""Value of a damaged row. It is not a valid frame, so that the tier counts it as corrupt."""

Value: TypeAlias = Entry | bytes


class BundleBackend:
    """Reads the entries of a bundle, which ``embedonce export`` or a :class:`BundleWriter` has written."""

    capabilities = Capabilities(
        holds="either",
        scope="host",
        # A call copies rows from memory, or reads them from a local disk, which cannot be interrupted.
        deadline=True,
        get=True,
        scan=True,
        count=True,
        bounded=True,
        read_only=True,
        max_batch=MAX_BATCH_KEYS,
    )

    def __init__(self, *, path: Annotated[Path, Doc("Folder of the bundle. ~ means the home folder.")]) -> None:
        """Open the bundle. This maps its files into memory, and reads only the manifest and the schemas.

        Raises:
            ConfigError: there is no bundle at ``path``, or it is damaged. The message says what to do.
        """
        try:
            self.path = Path(path).expanduser().absolute()
        except RuntimeError as error:
            raise ConfigError(f"cannot expand ~ in path: {error}") from error
        self._bundle: OpenedBundle | None = open_bundle(self.path)

    @staticmethod
    def create_writer(path: Path, /, *, replace: bool) -> BundleWriter:
        """Return a writer that makes a new bundle in the folder ``path``.

        Raises:
            StoreExists: the folder has a bundle and ``replace`` is False, or it has other files.
            StoreBusy: another writer writes to the folder.
            OSError: the folder cannot be made.
        """
        return BundleWriter(path, replace=replace)

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, Value]:
        """Return the entries of the keys that the bundle has, as blocks; and frames, where the bundle is encrypted.

        A damaged row is returned as ``b""``, which the tier counts as corrupt.
        """
        bundle = self._get_bundle()
        time_left()
        if not keys:
            return Entries()
        batch = _parse_batch(keys)
        if batch is not None:
            return _read_scope(bundle.scopes.get(keys[0][SCOPE_AT : DIGEST_AT - 1]), list(keys), batch)
        found: dict[str, Value] = {key: bundle.cards[key] for key in keys if key in bundle.cards}
        for scope, names in _group_by_scope(keys).items():
            codes = np.frombuffer("".join(names).encode(), np.uint8).reshape(-1, KEY_BYTES)
            found.update(_as_dict(_read_scope(bundle.scopes.get(scope), names, codes)))
        return found

    def get(self, key: str, /) -> Value | None:
        """Return the entry or the frame of one key, or None."""
        bundle = self._get_bundle()
        if len(key) != KEY_BYTES:
            return bundle.cards.get(key)
        scope = bundle.scopes.get(key[SCOPE_AT : DIGEST_AT - 1])
        prefix = _read_prefix(key)
        if scope is None or prefix is None:
            return None
        needs_look = False
        for part in scope.parts:
            row = part.find_prefix(prefix) if part.first <= prefix <= part.last else None
            if row is None:
                continue
            entry = part.read_entry(key.encode(), row)
            if entry is not None:
                return entry
            needs_look = True  # a frame, or a row that is not plainly valid
        return self.get_many([key]).get(key) if needs_look else None

    def scan(self, prefix: str, /) -> Iterator[str]:
        """Yield the keys that start with ``prefix``, in ascending order."""
        bundle = self._get_bundle()
        cards = sorted(key for key in bundle.cards if key.startswith(prefix))
        streams = [part.list_keys(prefix) for part in sorted(bundle.parts, key=lambda part: part.record.first)]
        if all(scope.is_disjoint for scope in bundle.scopes.values()):
            # A chain is much faster than a merge of several streams. Scopes and "card" may be in any order.
            return heapq.merge(cards, chain.from_iterable(streams)) if cards else chain.from_iterable(streams)
        return _drop_repeated(heapq.merge(cards, *streams))

    def count(self, prefix: str, /) -> int:
        """Return how many keys start with ``prefix``."""
        bundle = self._get_bundle()
        if not all(scope.is_disjoint for scope in bundle.scopes.values()):
            return sum(1 for _ in self.scan(prefix))
        ranges = [part.find_range(prefix) for part in bundle.parts]
        return sum(end - start for start, end in ranges) + sum(key.startswith(prefix) for key in bundle.cards)

    def measure(self, prefix: str, /) -> StoredSize:
        """Return the size, the dates and the dimensions of the entries whose keys start with ``prefix``.

        Encrypted entries have no dates that can be read.
        """
        size, oldest, newest, dimensions = 0.0, math.inf, -math.inf, None
        for part in self._get_bundle().parts:
            start, end = part.find_range(prefix)
            if start == end:
                continue
            size += part.record.bytes * ((end - start) / part.rows)
            if part.layout is not None:
                dimensions = part.layout.dimensions
                dates = part.measure_dates(start, end)
                oldest, newest = min(oldest, dates[0]), max(newest, dates[1])
        return StoredSize(
            bytes=round(size),
            oldest=None if oldest == math.inf else oldest,
            newest=None if newest == -math.inf else newest,
            dimensions=dimensions,
        )

    def describe(self) -> str:
        """Describe how many entries the bundle has, of which vector spaces, and how large it is."""
        manifest = self._get_bundle().manifest
        size = sum(part.bytes for part in manifest.parts) / 2**20
        scopes = list(dict.fromkeys(part.scope for part in manifest.parts))
        named = [_name_space(manifest.spaces.get(scope)) for scope in scopes]
        spaces = ", ".join(f"{name} ({scope})" for name, scope in zip(named[:MAX_SPACES], scopes, strict=False))
        more = f" and {len(scopes) - MAX_SPACES} more" if len(scopes) > MAX_SPACES else ""
        parts = f"{len(manifest.parts)} part{'s' * (len(manifest.parts) != 1)}"
        return f"{manifest.entries:,} entries in {parts}, {size:,.1f} MiB{f', of {spaces}{more}' if spaces else ''}"

    def verify(self) -> str:
        """Read all parts, and check the files, the order of their keys, and the checksum of each row.

        Raises:
            TierError: a part is damaged. The message names the part and says what to do.
        """
        bundle = self._get_bundle()
        for part in bundle.parts:
            part.verify(self.path)
        parts = f"{len(bundle.parts)} part{'s' * (len(bundle.parts) != 1)}"
        return f"{bundle.manifest.entries:,} entries in {parts} are intact"

    def close(self) -> None:
        """Close the files. Calls in other threads that have begun go on."""
        self._bundle = None

    def _get_bundle(self) -> OpenedBundle:
        bundle = self._bundle
        if bundle is None:
            raise CacheClosed("the bundle backend is closed")
        return bundle


def _name_space(card: Card | None) -> str:
    model = card.get("model") if isinstance(card, Mapping) else None
    return model if isinstance(model, str) and model else "an unnamed space"


def _drop_repeated(keys: Iterator[str]) -> Iterator[str]:
    last = None
    for key in keys:
        if key != last:
            yield key
        last = key


# --- keys -------------------------------------------------------------------------------------


def _parse_batch(keys: Sequence[str]) -> NDArray[np.uint8] | None:
    """Return the ASCII codes of distinct keys of one scope, shape (n, KEY_BYTES); None if the keys are no such batch.

    Nearly every batch is.
    """
    if set(map(len, keys)) != {KEY_BYTES} or len(set(keys)) < len(keys):
        return None
    joined = "".join(keys)
    if not joined.isascii() or ENTRY_KEY.fullmatch(keys[0]) is None:
        return None
    codes = np.frombuffer(joined.encode(), np.uint8).reshape(-1, KEY_BYTES)
    return codes if (codes[:, :DIGEST_AT] == codes[0, :DIGEST_AT]).all() else None


def _read_prefix(key: str) -> int | None:
    """Return the first 8 bytes of the digest of a key as a number, or None if this is not the key of an entry."""
    return int(key[DIGEST_AT : DIGEST_AT + PREFIX_DIGITS], 16) if ENTRY_KEY.fullmatch(key) else None


def _group_by_scope(keys: Sequence[str]) -> dict[str, list[str]]:
    """Return the keys of entries by scope, each key once."""
    scopes: dict[str, dict[str, None]] = {}
    for key in keys:
        match = ENTRY_KEY.fullmatch(key)
        if match is not None:
            scopes.setdefault(match[1], {})[key] = None
    return {scope: list(names) for scope, names in scopes.items()}


# --- reading ----------------------------------------------------------------------------------


def _as_dict(found: Mapping[str, Value]) -> Mapping[str, Value]:
    return found.as_dict() if isinstance(found, Entries) else found


def _read_scope(scope: ScopeParts | None, keys: list[str], codes: NDArray[np.uint8]) -> Mapping[str, Value]:
    """Return what the parts of one scope have under some distinct keys. ``codes`` are the keys as ASCII codes."""
    entries = Entries()
    if scope is None:
        return entries
    prefixes = read_prefixes(codes)
    places, rows, suspects = _find_rows(scope, codes, prefixes)
    frames: dict[str, bytes] = {}
    corrupt: list[int] = []
    for layout in dict.fromkeys(part.layout for part in scope.parts):
        numbers = [number for number, part in enumerate(scope.parts) if part.layout == layout]
        if len(numbers) == len(scope.parts):
            positions = np.flatnonzero(places >= 0)
        else:
            positions = np.flatnonzero(np.isin(places, numbers))
        if not len(positions):
            continue
        parts = [(scope.parts[number], np.flatnonzero(places[positions] == number)) for number in numbers]
        parts = [(part, chosen) for part, chosen in parts if len(chosen)]
        names = keys if len(positions) == len(keys) else [keys[position] for position in positions.tolist()]
        if layout is None:
            frames |= _read_frames(parts, names, rows[positions])
        else:
            damaged = _read_entries(parts, layout, names, rows[positions], entries)
            corrupt += positions[damaged].tolist()
    corrupt += [position for position in suspects if places[position] < 0]
    for position in corrupt:
        frames[keys[position]] = CORRUPT
        _read_elsewhere(scope, keys[position], codes[position], entries, frames)
    if not frames:
        return entries
    return {**entries.as_dict(), **frames}


def _find_rows(
    scope: ScopeParts, codes: NDArray[np.uint8], prefixes: NDArray[np.uint64]
) -> tuple[NDArray[np.intp], NDArray[np.intp], list[int]]:
    """Return the number of the part and the row of each key, -1 if no part has it.

    The third result has the positions of keys for which a damaged row was found in their place.
    """
    places, rows = np.full((2, len(codes)), -1, np.intp)
    suspects: list[int] = []
    order = np.argsort(prefixes)
    ascending = prefixes[order]
    starts = np.searchsorted(ascending, scope.firsts)
    ends = np.searchsorted(ascending, scope.lasts, "right")
    for number in np.flatnonzero(starts < ends).tolist():
        part = scope.parts[number]
        found = part.find(codes, prefixes, order[starts[number] : ends[number]])
        is_new = places[found.positions] < 0  # an earlier part may have the key, too
        places[found.positions[is_new]] = number
        rows[found.positions[is_new]] = found.rows[is_new]
        if len(found.suspects):
            suspects += found.suspects[~part.is_sound(found.suspect_rows)].tolist()
    return places, rows, suspects


Parts: TypeAlias = Sequence[tuple[Part, NDArray[np.intp]]]
"""Parts, each with the indexes of the rows that are in it."""


def _read_frames(parts: Parts, keys: list[str], rows: NDArray[np.intp]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for part, chosen in parts:
        names = [keys[index] for index in chosen.tolist()]
        frames = part.read_texts(rows[chosen])
        found.update(zip(names, (frame or CORRUPT for frame in frames), strict=True))
    return found


def _read_entries(
    parts: Parts, layout: Layout, keys: list[str], rows: NDArray[np.intp], entries: Entries
) -> NDArray[np.intp]:
    """Add a block of the intact rows to ``entries``, and return the indexes of the damaged rows."""
    read = layout.make_rows(len(keys))
    sums = np.empty(len(keys), np.uint64)
    metadata: list[bytes] | None = None
    damaged: list[int] = []
    for part, chosen in parts:
        at = ALL_ROWS if len(parts) == 1 else chosen
        part.read_rows(rows[at], read, at)
        sums[at] = part.read_checksums(rows[at])
        if part.has_metadata():
            metadata = metadata or [b""] * len(keys)
            for index, text in zip(chosen.tolist(), part.read_texts(rows[chosen]), strict=True):
                metadata[index] = text or b""
                if text is None:
                    damaged.append(index)
    good = compute_checksums(read, metadata) == sums
    good[damaged] = False
    if not good.all():
        kept = np.flatnonzero(good).tolist()
        if not kept:
            return np.arange(len(keys))
        read, metadata = read[good], None if metadata is None else [metadata[index] for index in kept]
        block, invalid = make_block([keys[index] for index in kept], layout, read, metadata)
    else:
        block, invalid = make_block(keys, layout, read, metadata)
    entries.add_block(block)
    if invalid:
        for key in invalid:
            del entries[key]
        unreadable = set(invalid)
        good &= [key not in unreadable for key in keys]
    return np.flatnonzero(~good)


def _read_elsewhere(
    scope: ScopeParts, key: str, code: NDArray[np.uint8], entries: Entries, frames: dict[str, bytes]
) -> None:
    """Look for an intact row of a key whose row is damaged, because parts may overlap."""
    if scope.is_disjoint:
        return
    codes = code[None, :]
    prefixes = read_prefixes(codes)
    for part in scope.parts:
        found = part.find(codes, prefixes, np.zeros(1, np.intp))
        if not len(found.rows):
            continue
        if part.layout is None:
            frames.update(_read_frames([(part, found.positions)], [key], found.rows))
        elif not len(_read_entries([(part, found.positions)], part.layout, [key], found.rows, entries)):
            del frames[key]
            return


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    """Register the bundle backend."""
    return {"bundle": BundleBackend}
