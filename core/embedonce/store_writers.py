"""What writes a new read-only store, such as a bundle: part of the contract of backends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from .vectors import Entry

BUNDLE: Final = "bundle"
"""Name of the plugin whose backend reads the bundles that an export writes."""


class StoreWriter(Protocol):
    """Writes a new read-only store, such as a bundle. One thread uses it. Nothing is there until :meth:`commit`."""

    def add(self, items: Mapping[str, Entry | bytes], /) -> None:
        """Add entries of any scopes, and space cards. A value is bytes if it is an encrypted frame.

        The keys of entries come in ascending order, within one call and from call to call. Space cards may come at any
        time.

        Raises:
            ValueError: a key is out of order, or belongs to neither an entry nor a space card.
            OSError: the store cannot be written.
        """
        ...

    def commit(self) -> WrittenStore:
        """Finish the store in one step, and return what it holds."""
        ...

    def close(self) -> None:
        """Remove what was written, unless it was committed. A second call does nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenStore:
    """What a :class:`StoreWriter` has written."""

    entries: int
    parts: int
    """Number of files with entries."""
    bytes: int
    """Size of all files in bytes."""
