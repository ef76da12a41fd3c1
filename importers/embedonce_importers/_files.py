"""Opens files that another program has written: regular files only, no links, and never more than a given size.

A folder that others may write to can contain a link to a secret, a FIFO that blocks for ever, or a device. So no
function here follows a symbolic link at the end of a path or anywhere inside an opened folder, and each checks the file
after it has opened it. Links in front of the last part of the user's own path are followed, because that path comes
from the configuration.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from embedonce.errors import SourceError
from embedonce.options import format_size

# O_NONBLOCK: opening a FIFO returns at once. Windows has none of these flags.
_FILE_FLAGS = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
_FOLDER_FLAGS = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC"))
_HAS_FOLDER_DESCRIPTORS = os.open in os.supports_dir_fd
"""False on Windows. There, files of a folder are opened by their whole path."""

_SEPARATORS = frozenset("/\\" if os.name == "nt" else "/")


def open_file(path: Path, *, below: Path | None = None) -> BinaryIO:
    """Open a regular file for reading.

    ``below`` is a folder that contains the file. Then no folder between the two may be a link, not even one that was
    put there after the files were listed.

    Raises:
        SourceError: the file is missing, is not a regular file, or may not be read.
    """
    check_file(path)
    try:
        descriptor = os.open(path, _FILE_FLAGS) if below in (None, path) else _open_below(path, below)
    except OSError as error:
        raise _describe(path, error) from error
    try:
        _refuse_other_kinds(path, os.fstat(descriptor).st_mode)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_file(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        SourceError: the file is missing, is not a regular file, may not be read, or has more than ``max_bytes`` bytes.
    """
    with open_file(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise SourceError(f"{path} is larger than {format_size(max_bytes)}, which is too large for this kind of file")
    return content


def check_file(path: Path) -> None:
    """Check that a path is a regular file, without opening it.

    SQLite opens its files itself. If this process has the same database open, then opening and closing the file here
    would remove SQLite's locks, because POSIX locks belong to the process.

    Raises:
        SourceError: the file is missing or is not a regular file.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError as error:
        raise _describe(path, error) from error
    _refuse_other_kinds(path, mode)


def check_folder(path: Path) -> None:
    """Check that a path is a folder.

    Raises:
        SourceError: the folder is missing or is not a folder.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError as error:
        raise _describe(path, error) from error
    if not stat.S_ISDIR(mode):
        advice = "; give the folder that it points to" if stat.S_ISLNK(mode) else "; give the folder of the store"
        raise SourceError(f"{path} is {_name_kind(mode)}, not a folder{advice}")


class Folder:
    """An opened folder, from which files are read by name. Names never lead out of the folder."""

    __slots__ = ("_descriptor", "_path")

    def __init__(self, path: str, descriptor: int | None) -> None:
        self._path = path
        self._descriptor = descriptor

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Return the content of a file, or None if it is missing. ``name`` is a single name, without a separator.

        Raises:
            ValueError: the file is a link or not a regular file, is larger than ``max_bytes``, or may not be read. The
                message is a reason to be counted, without a path.
            OSError: another error of the system, such as too many open files.
        """
        if not _is_plain_name(name):
            raise ValueError("not a name of a file in the folder")
        try:
            descriptor = self._open(name, _FILE_FLAGS)
        except OSError as error:
            _check_missing(error)
            return None
        # The content is read without a file object, which takes as long as everything else here.
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("not a regular file")
            size = found.st_size
            if size > max_bytes:
                raise ValueError(f"larger than {format_size(max_bytes)}")
            content = os.read(descriptor, size)
            while len(content) < size and (more := os.read(descriptor, size - len(content))):
                content += more
            return content
        except PermissionError as error:
            raise ValueError("permission denied") from error
        finally:
            os.close(descriptor)

    def iter_names(self) -> Iterator[str]:
        """Yield the names of everything in the folder, in any order."""
        with os.scandir(self._path if self._descriptor is None else self._descriptor) as entries:
            for entry in entries:
                yield entry.name

    @contextmanager
    def open_subfolder(self, *names: str) -> Iterator[Folder | None]:
        """Open the folder below that ``names`` lead to, one name per level; None if it is missing.

        Raises:
            ValueError: a name is not a folder, such as a link, or may not be opened.
        """
        if not names:
            yield self
            return
        first, *rest = names
        if not _is_plain_name(first):
            raise ValueError("not a name of a folder")
        path = os.path.join(self._path, first)
        if self._descriptor is None:
            try:
                mode = os.lstat(path).st_mode
            except OSError as error:
                _check_missing(error)
                yield None
                return
            if not stat.S_ISDIR(mode):
                raise ValueError("in something that is not a folder")
            with Folder(path, None).open_subfolder(*rest) as inner:
                yield inner
            return
        try:
            descriptor = os.open(first, _FOLDER_FLAGS, dir_fd=self._descriptor)
        except NotADirectoryError:
            raise ValueError("in something that is not a folder") from None  # a link too
        except OSError as error:
            _check_missing(error)
            yield None
            return
        try:
            with Folder(path, descriptor).open_subfolder(*rest) as inner:
                yield inner
        finally:
            os.close(descriptor)

    def open(self, name: str) -> int:
        """Return a descriptor of what has this name. The caller checks that it is a regular file, and closes it.

        Raises:
            ValueError: on Windows, the name is not one of a regular file.
            OSError: it cannot be opened.
        """
        return self._open(name, _FILE_FLAGS)

    def _open(self, name: str, flags: int) -> int:
        if self._descriptor is not None:
            return os.open(name, flags, dir_fd=self._descriptor)
        path = os.path.join(self._path, name)
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise ValueError("not a regular file")
        return os.open(path, flags)


@contextmanager
def open_folder(path: Path) -> Iterator[Folder]:
    """Open a folder for the duration of a ``with`` block.

    One call of ``lookup`` opens the folder once, so no descriptor outlives the call, and none is shared after a fork.

    Raises:
        SourceError: the folder is missing, is not a folder, or may not be opened.
    """
    check_folder(path)
    if not _HAS_FOLDER_DESCRIPTORS:
        yield Folder(os.fspath(path), None)
        return
    try:
        descriptor = os.open(path, _FOLDER_FLAGS)
    except OSError as error:
        raise _describe(path, error) from error
    try:
        yield Folder(os.fspath(path), descriptor)
    finally:
        os.close(descriptor)


def _open_below(path: Path, folder: Path | None) -> int:
    """Return a descriptor of the file.

    Raises:
        SourceError: there is something else than a folder in between.
        OSError: the file cannot be opened.
    """
    assert folder is not None
    *parents, name = path.relative_to(folder).parts
    with open_folder(folder) as root:
        try:
            with root.open_subfolder(*parents) as parent:
                if parent is None:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
                return parent.open(name)
        except ValueError as error:
            raise SourceError(f"{path} is {error}; copy the store to a folder that nobody else changes") from None


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and "\0" not in name and _SEPARATORS.isdisjoint(name)


def _check_missing(error: OSError) -> None:
    """Check that an error means that there is no such file.

    Raises:
        ValueError: there is one, but it must not or may not be read.
        OSError: the error says nothing about this file.
    """
    # A name that is too long for the file system cannot be the name of a file.
    if isinstance(error, FileNotFoundError) or error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR):
        return
    if error.errno == errno.ELOOP:
        raise ValueError("a symbolic link") from None
    if error.errno in (errno.ENXIO, errno.EOPNOTSUPP):  # a socket, or a device without a driver
        raise ValueError("not a regular file") from None
    if isinstance(error, PermissionError):
        raise ValueError("permission denied") from None
    raise error


def _refuse_other_kinds(path: Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    advice = ""
    if stat.S_ISLNK(mode):
        advice = "; give the file that it points to"
    elif stat.S_ISDIR(mode):
        advice = "; give a file"
    raise SourceError(f"{path} is {_name_kind(mode)}, not a file{advice}")


def _name_kind(mode: int) -> str:
    for is_kind, name in (
        (stat.S_ISREG, "a file"),
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if is_kind(mode):
            return name
    return "a device"


def _describe(path: Path, error: OSError) -> SourceError:
    if isinstance(error, FileNotFoundError):
        return SourceError(f"{path} does not exist; check the path")
    if isinstance(error, PermissionError):
        return SourceError(f"{path} may not be read: {error.strerror}; check its permissions")
    return SourceError(f"{path} cannot be opened: {error.strerror}")
