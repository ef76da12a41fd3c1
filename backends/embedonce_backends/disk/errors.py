"""The disk tier's errors. The names appear as causes in a cache's statistics."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

from embedonce.errors import TierError, TierTimeout


class DiskFull(OSError):
    """The disk has no space left, so nothing can be stored. Stored entries are still served."""


class ReadOnlyFile(OSError):
    """The file or its folder is read-only, so nothing can be stored. Stored entries are still served."""


class LogTooLarge(OSError):
    """SQLite's log has reached its limit, because another connection still reads an old state of the file.

    Nothing is stored until that connection ends its transaction or is closed. Stored entries are still served.
    """


class DataNotOverwritten(TierError):
    """Removed entries are no longer served, but the folder still contains their data, because a reader needs it.

    Remove the same keys again once the reader has ended its transaction.
    """


def get_primary_code(error: Exception) -> int:
    """Return SQLite's primary result code, without the extended part, or 0 if Python itself raised the error."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF


def explain_error(error: Exception, file: Path) -> Exception:
    """Return the exception to raise for an error of SQLite.

    If the disk is full, permissions are missing or the file is damaged, the exception's message says what to do.
    """
    code = get_primary_code(error)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_INTERRUPT):
        return TierTimeout(f"{file}: timed out ({error})")
    if code == sqlite3.SQLITE_FULL:
        return DiskFull(errno.ENOSPC, f"disk full ({error}); free some space or lower max_bytes", str(file))
    if code == sqlite3.SQLITE_READONLY and file.exists():
        return ReadOnlyFile(
            errno.EROFS,
            f"nothing can be stored, because the file or its folder is read-only ({error}); stored entries are "
            'served. If this is intended, set write = "none" for this tier',
            str(file),
        )
    # SQLite does not say which error of the system it got. If the file can be accessed, descriptors were missing for
    # its log or index.
    if code == sqlite3.SQLITE_CANTOPEN and (_has_no_descriptors() or is_writable(file)):
        return OSError(
            errno.EMFILE,
            f"cannot open the file, probably because this process has no file descriptors left ({error}); close files "
            "and connections, or raise the limit (ulimit -n)",
            str(file),
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return OSError(
            errno.EACCES,
            f"cannot open the file for writing ({error}); check that the file's folder exists, and check the "
            "permissions of the file and of its folder",
            str(file),
        )
    if code == sqlite3.SQLITE_IOERR:
        return OSError(errno.EIO, f"cannot read or write ({error})", str(file))
    # If the schema is damaged, SQLite's message may quote invalid UTF-8, and Python then raises UnicodeDecodeError.
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or isinstance(error, UnicodeDecodeError):
        return sqlite3.DatabaseError(
            f"{file}: {error}; remove the folder of this file, and the texts will be embedded again"
        )
    return error


def is_writable(file: Path) -> bool:
    """Return whether this user may write to a file and to its folder."""
    effective = os.access in os.supports_effective_ids
    return all(os.access(path, os.W_OK, effective_ids=effective) for path in (file, file.parent))


def _has_no_descriptors() -> bool:
    """Return whether this process cannot open any file at the moment."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return False
