"""Find the nearest configuration, and read it only if nobody else can have written it.

A configuration says where texts and secrets are sent. A file that is found, and not named, may belong to anybody who
can write to a folder above the current folder. So its owner and its folders are checked first, as git checks a
repository.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedonce.errors import ConfigError, Problem

from .places import TomlPath

FILE = "embedonce.toml"
PYPROJECT = "pyproject.toml"
TABLE = ("tool", "embedonce")
"""Names of the nested tables that lead to the configuration in a pyproject.toml."""

MAX_BYTES = 4 << 20
"""Maximum size of a file that is found. No configuration is that large."""

ONLY_NAMED = "it works only in a file that you name: by --config FILE, by EMBEDONCE_CONFIG, or as an argument in Python"


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A configuration that was found: its path and its content."""

    path: Path
    content: bytes


def find_file() -> FoundFile | None:
    """Return the nearest configuration in the current folder or above it; None if there is none.

    The search ends after the home folder and after the root folder of a repository.

    Raises:
        ConfigError: the file cannot be read, or somebody else may have written it.
    """
    for folder in _list_folders():
        file = folder / FILE
        if os.path.lexists(file):  # also True for a broken link; ignoring the link would hide a mistake
            return FoundFile(file, _read_trusted(file))
        file = folder / PYPROJECT
        if _has_configuration(file):
            return FoundFile(file, _read_trusted(file))
    return None


def get_table(data: Any) -> Any:
    """Return ``[tool.embedonce]`` of a pyproject.toml, or None."""
    for name in TABLE:
        data = data.get(name) if isinstance(data, dict) else None
    return data


def find_risk(file: Path) -> str:
    """Return the reason why an existing file is not used unless it is named, or "" if it is used when it is found."""
    try:
        return _find_risk(file, os.stat(file))
    except OSError:  # the file or its folder was changed meanwhile
        return ""


def relative_name(file: Path) -> str:
    """Return a file's path, relative to the current folder if the file is in or below that folder."""
    try:
        return str(file.relative_to(Path.cwd()))
    except (ValueError, OSError):  # OSError: the current folder was removed
        return str(file)


def find_remote_code(value: Any, where: TomlPath = ()) -> Iterator[TomlPath]:
    """Yield the path of each ``trust_remote_code`` that is not false. A file that is only found must not set it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, item in items:
        if step == "trust_remote_code" and item not in (False, None, "", "false"):
            yield (*where, step)
        yield from find_remote_code(item, (*where, step))


def _list_folders() -> Iterator[Path]:
    """Yield the current folder and the folders above it, up to the home folder or the root of a repository."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the current folder was removed; change to a folder that exists") from None
    home = _identify(Path(os.path.expanduser("~")))
    for folder in (here, *here.parents):
        yield folder
        if os.path.lexists(folder / ".git") or (home is not None and _identify(folder) == home):
            return


def _identify(folder: Path) -> tuple[int, int] | None:
    """Return what tells a folder from all others; None for a relative path or if there is no such folder."""
    if not folder.is_absolute():  # the home folder is unknown
        return None
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _has_configuration(pyproject: Path) -> bool:
    """Return whether a pyproject.toml contains a configuration. Errors in an unrelated pyproject.toml are ignored.

    A table that only says where a session of tests keeps its ``bundle`` does not configure a cache.
    """
    try:
        content, _ = _read_regular(pyproject)
    except (OSError, ConfigError):
        return False
    if b"embedonce" not in content:
        return False
    try:
        table = get_table(tomllib.loads(content.decode("utf-8-sig")))
    except (ValueError, RecursionError):
        return b"tool.embedonce" in content  # if True, the caller reads the file and reports why it is invalid
    return table is not None and not (isinstance(table, dict) and table.keys() == {"bundle"})


def _read_trusted(file: Path) -> bytes:
    """Return the content of a file that was found.

    Raises:
        ConfigError: the file cannot be read, or somebody else may have written it.
    """
    try:
        content, opened = _read_regular(file)
        reason = _find_risk(file, opened)
    except FileNotFoundError:
        word = "is a broken symbolic link" if file.is_symlink() else "was removed while it was read"
        raise ConfigError([Problem(word, relative_name(file))]) from None
    except OSError as error:
        raise ConfigError([Problem(f"cannot be read: {error.strerror or error}", relative_name(file))]) from error
    if reason:
        raise _refuse(file, reason)
    return content


def _refuse(file: Path, reason: str) -> ConfigError:
    name = shlex.quote(str(file))
    message = (
        f"is not used, because you did not name it, and {reason}. A configuration says where texts and secrets "
        f"are sent. If you trust this file, name it: --config {name}, or EMBEDONCE_CONFIG={name}"
    )
    return ConfigError([Problem(message, relative_name(file))])


def _read_regular(file: Path) -> tuple[bytes, os.stat_result]:
    """Return the content and the status of a regular file. Anything else is not opened, or at least never waits.

    The status is that of the opened file, so nobody can put another file in its place between the check and the read.

    Raises:
        ConfigError: it is not a regular file, or it is too large.
        OSError: it cannot be read.
    """
    _require_regular(file, os.stat(file))  # opening a device may have an effect
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(file, flags)
    with open(descriptor, "rb") as stream:
        opened = os.fstat(descriptor)
        _require_regular(file, opened)
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ConfigError(
            [Problem(f"is larger than {MAX_BYTES >> 20} MiB, so it is not a configuration", relative_name(file))]
        )
    return content, opened


def _require_regular(file: Path, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
    raise _refuse(file, f"it is not a regular file but {kind}")


# --- who may have written a file --------------------------------------------------------------


def _find_risk(file: Path, opened: os.stat_result) -> str:
    """Return the reason why somebody else may have written a file, or "" if only this user or root can have.

    Members of the owner's group count as trusted, because on many systems each user has a group of their own.
    """
    if not hasattr(os, "geteuid"):  # Windows has neither owners as numbers nor these permissions
        return ""
    owner = _describe_stranger(opened)
    if owner:
        return f"it belongs to {owner}"
    if opened.st_mode & stat.S_IWOTH:
        return "every user may write to it"
    reason = _find_link_risk(file)
    if reason:
        return reason
    for folder in dict.fromkeys((Path(os.path.realpath(file.parent)), Path(os.path.realpath(file)).parent)):
        reason = _find_folder_risk(folder, opened)
        if reason:
            return reason
    return ""


def _find_link_risk(file: Path) -> str:
    """Return the reason why somebody else may have made one of the symbolic links that lead to a file, or ""."""
    for _ in range(40):  # the limit of Linux for links to links
        status = os.lstat(file)
        if not stat.S_ISLNK(status.st_mode):
            return ""
        owner = _describe_stranger(status)
        if owner:
            return f"the link {file} belongs to {owner}"
        file = Path(os.path.realpath(file.parent)) / os.readlink(file)
        reason = _find_folder_risk(Path(os.path.realpath(file.parent)), None)
        if reason:
            return reason
    return "it is a link to too many links"


def _find_folder_risk(folder: Path, opened: os.stat_result | None) -> str:
    """Return the reason why somebody else may have put a file into a folder, or "".

    A sticky folder such as /tmp does not keep others from adding a file. It does keep them from renaming a folder of
    this user, so a folder below /tmp is fine.
    """
    status = os.stat(folder)
    if status.st_mode & stat.S_IWOTH:
        return f"every user may write to its folder {folder}"
    owner = _describe_stranger(status)
    if owner and opened is not None and opened.st_nlink > 1:  # a second name for a file of this user
        return f"it has a second name, and its folder {folder} belongs to {owner}"
    for above in folder.parents:
        mode = os.stat(above).st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"every user may rename its folder, because they may write to {above}"
    return ""


def _describe_stranger(status: os.stat_result) -> str:
    """Return the owner of a file if it is neither this user nor root, else ""."""
    if status.st_uid in _list_trusted_users():
        return ""
    try:
        import pwd

        return f"the user {pwd.getpwuid(status.st_uid).pw_name}"
    except (ImportError, KeyError):
        return f"the user {status.st_uid}"


def _list_trusted_users() -> set[int]:
    """Return this user, root, and, for root, the user who called sudo."""
    user = os.geteuid()
    caller = os.environ.get("SUDO_UID", "")
    return {0, user, *([int(caller)] if user == 0 and caller.isascii() and caller.isdigit() else [])}
