"""The folder of a disk tier: which folders are refused, and how folders and files are made."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

from embedonce.errors import ConfigError


def check_folder(folder: Path) -> None:
    """Refuse a folder in which other users can plant or replace files.

    Raises:
        ConfigError: the folder is unsafe or not a folder; the message says what to do.
    """
    try:
        found = folder.stat()
    except OSError:  # missing or inaccessible; making the folder will report the problem
        return
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{folder} is not a folder; set the disk tier's path to a folder of its own")
    if sys.platform == "win32" or _is_mounted_read_only(folder):
        return
    if problem := find_permission_problem(folder, found.st_uid, found.st_mode, os.geteuid()):
        raise ConfigError(f"{folder} {problem}")


def find_permission_problem(folder: Path, owner: int, mode: int, user: int) -> str | None:
    """Return why a folder is unsafe for ``user``, or None if it is safe."""
    if mode & stat.S_IWOTH:
        # A shared folder, such as /tmp or a volume that Kubernetes mounts, must stay as it is. A folder that is made
        # inside it belongs to this user, and is checked again whenever the file is opened.
        inside = f"path = {json.dumps(str(folder / 'embedonce'), ensure_ascii=False)}"
        chmod = "run `chmod o-w` on it, or " if user in (0, owner) else ""
        return f"is writable by every user; {chmod}give the disk tier a folder inside it: {inside}"
    # Root may use any user's folder, because in a container, root often gets folders that belong to users of the host.
    if user not in (0, owner) and owner != 0:
        return f"belongs to another user (uid {owner}); give the disk tier a path of your own"
    return None


def _is_mounted_read_only(folder: Path) -> bool:
    """Return whether the folder's file system is mounted read-only, so that nobody can change files through it."""
    try:
        return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, accessible to this user only, whatever the umask is."""
    missing = [folder]
    missing.extend(parent for parent in folder.parents if not parent.exists())
    for path in reversed(missing):
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            continue
        path.chmod(0o700)


def make_file(path: Path) -> None:
    """Make an empty file unless it exists. Only this user can access it, or also the group of a group's folder."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except FileExistsError:
        return
    try:
        if sys.platform != "win32":
            # SQLite gives its log and index the same mode.
            os.fchmod(handle, 0o660 if _belongs_to_group(path.parent) else 0o600)
    finally:
        os.close(handle)


def _belongs_to_group(folder: Path) -> bool:
    """Return whether all users of the folder's group are meant to share new files.

    The set-group-ID bit says so: new files get the group of the folder. Kubernetes sets it for ``fsGroup``.
    """
    shared = stat.S_ISGID | stat.S_IWGRP
    return folder.stat().st_mode & shared == shared
