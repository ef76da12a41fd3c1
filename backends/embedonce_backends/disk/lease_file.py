"""The file of the leases, ``leases.db``.

Leases come and go with every new entry. In the table of entries, each lease would cost as much as an entry, and leave a
gap. In a file of their own, leases also need not wait until a large batch of entries is stored.
"""

from __future__ import annotations

from pathlib import Path

from .file import DatabaseFile
from .sqlite import Connection, fetch_rows
from .statements import MAKE_LEASES

MAX_BYTES = 2**30
"""Size in bytes that the limit of the log follows from. The file itself has no limit, because leases expire soon."""


class LeaseFile(DatabaseFile):
    """The file of the leases. It is made with the first lease."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "leases.db", MAX_BYTES)

    def make_tables(self, connection: Connection) -> None:
        """Make the table of leases."""
        if not fetch_rows(connection, "PRAGMA table_info(Leases)"):
            fetch_rows(connection, MAKE_LEASES)
