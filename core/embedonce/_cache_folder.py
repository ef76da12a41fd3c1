"""The user's cache folder: where it is, and whether it can be used."""

from __future__ import annotations

import os
from pathlib import Path


class NoCacheFolder(Exception):
    """The user has no cache folder that can be written to. The message is a clause that says why."""


def find_cache_path(name: str) -> Path:
    """Return the absolute path of a file or folder of embedonce in the user's cache folder. It may not exist yet.

    Raises:
        NoCacheFolder: no home folder is known. Or ``name`` does not exist, and its folder cannot be created or
            written to.
    """
    import platformdirs

    try:
        folder = platformdirs.user_cache_path("embedonce", appauthor=False)
        if not folder.is_absolute() and not str(folder).startswith("~"):
            # XDG_CACHE_HOME is a relative path, which its specification says to ignore.
            folder = Path(os.path.expanduser("~/.cache/embedonce"))
    except Exception as error:  # platformdirs raises various errors if there is no home folder
        raise NoCacheFolder("the home folder is unknown") from error
    is_given = os.path.isabs(os.environ.get("XDG_CACHE_HOME", ""))
    if not folder.is_absolute() or (os.environ.get("HOME") == "" and not is_given):  # "" would mean the root folder
        raise NoCacheFolder("the home folder is unknown")
    path = folder / name
    if not os.path.lexists(path):  # what exists can be read, even if nothing can be written to it
        _check_writable(folder)
    return path


def _check_writable(folder: Path) -> None:
    """Check that a folder can be written to, or can be created.

    Raises:
        NoCacheFolder: it cannot.
    """
    for existing in (folder, *folder.parents):
        if os.path.lexists(existing):
            if not existing.is_dir():
                raise NoCacheFolder(f"{existing} is not a folder")
            if not os.access(existing, os.W_OK | os.X_OK):
                raise NoCacheFolder(f"{existing} cannot be written to")
            return
