"""Files of other programs are opened only if they are regular files, and never through a link."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from embedonce.errors import SourceError
from embedonce_importers import _files
from embedonce_importers._files import Folder, check_file, open_file, open_folder, read_file

LIMIT = 100


@pytest.fixture(params=[True, False], ids=["descriptors", "paths"])
def by_descriptor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run a test as on POSIX, and as on Windows, where folders have no descriptors."""
    if not request.param:
        monkeypatch.setattr(_files, "_HAS_FOLDER_DESCRIPTORS", False)
    elif not _files._HAS_FOLDER_DESCRIPTORS:
        pytest.skip("this system has no descriptors of folders")
    return bool(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file, and with everything that is not one."""
    (tmp_path / "secret").write_bytes(b"secret")
    folder = tmp_path / "store"
    (folder / "below").mkdir(parents=True)
    (folder / "file").write_bytes(b"content")
    (folder / "empty").write_bytes(b"")
    (folder / "large").write_bytes(b"x" * (LIMIT + 1))
    (folder / "below" / "file").write_bytes(b"inner")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "dangling").symlink_to(tmp_path / "nothing")
    (folder / "folder-link").symlink_to(tmp_path)
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(folder)  # the path of a socket is limited to about 100 bytes
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
    return folder


def test_a_regular_file_is_read(folder: Path) -> None:
    assert read_file(folder / "file", 7) == b"content"
    assert read_file(folder / "empty", 0) == b""
    with open_file(folder / "file") as file:
        assert file.read() == b"content"
    check_file(folder / "file")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "does not exist; check the path"),
        ("file/missing", "cannot be opened: Not a directory"),
        ("below", "is a folder, not a file; give a file"),
        ("link", "is a symbolic link, not a file; give the file that it points to"),
        ("dangling", "is a symbolic link"),
        ("fifo", "is a named pipe, not a file"),
        ("socket", "is a socket, not a file"),
    ],
)
def test_anything_else_is_an_error_that_names_it(folder: Path, name: str, message: str) -> None:
    for function in (check_file, open_file, lambda path: read_file(path, LIMIT)):
        with pytest.raises(SourceError, match=message) as caught:
            function(folder / name)
        assert name in str(caught.value)


def test_a_device_is_refused() -> None:
    with pytest.raises(SourceError, match="is a device, not a file"):
        read_file(Path("/dev/zero"), LIMIT)


def test_a_large_file_is_refused(folder: Path) -> None:
    with pytest.raises(SourceError, match="is larger than 100, which is too large"):
        read_file(folder / "large", LIMIT)


@pytest.mark.usefixtures("by_descriptor")
def test_files_of_a_folder_are_read_by_name(folder: Path) -> None:
    with open_folder(folder) as store:
        assert store.read("file", 7) == b"content"
        assert store.read("empty", LIMIT) == b""
        assert store.read("missing", LIMIT) is None
        assert store.read("x" * 300, LIMIT) is None
        with store.open_subfolder("below") as below, store.open_subfolder("missing", "inner") as missing:
            assert below is not None
            assert below.read("file", LIMIT) == b"inner"
            assert missing is None
        with store.open_subfolder() as same:
            assert same is store


@pytest.mark.usefixtures("by_descriptor")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("large", "larger than 100"),
        ("below", "not a regular file"),
        ("link", "a symbolic link|not a regular file"),
        ("dangling", "a symbolic link|not a regular file"),
        ("fifo", "not a regular file"),
        ("socket", "not a regular file"),
        *((name, "not a name") for name in ("", ".", "..", "../secret", "/etc/passwd", "below/file", "a\0b")),
    ],
)
def test_other_files_of_a_folder_are_not_read(folder: Path, name: str, reason: str) -> None:
    with open_folder(folder) as store, pytest.raises(ValueError, match=reason):
        store.read(name, LIMIT)


@pytest.mark.usefixtures("by_descriptor")
@pytest.mark.parametrize("names", [("folder-link",), ("file",), ("..",), ("below", ".."), ("/",), ("",), ("fifo",)])
def test_subfolders_are_no_links_and_stay_inside(folder: Path, names: tuple[str, ...]) -> None:
    with open_folder(folder) as store, pytest.raises(ValueError, match="not a"), store.open_subfolder(*names):
        pass


@pytest.mark.usefixtures("by_descriptor")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "does not exist; check the path"),
        ("file", "is a file, not a folder; give the folder of the store"),
        ("folder-link", "is a symbolic link, not a folder; give the folder that it points to"),
    ],
)
def test_a_store_that_is_no_folder_is_an_error(folder: Path, name: str, message: str) -> None:
    with pytest.raises(SourceError, match=message), open_folder(folder / name):
        pass


def test_what_may_not_be_read_is_not_an_exception_of_the_call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> int:
        raise PermissionError(13, "Permission denied")

    with open_folder(folder) as store:
        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(ValueError, match="permission denied"):
            store.read("file", LIMIT)
        with pytest.raises(SourceError, match="may not be read: Permission denied; check its permissions"):
            read_file(folder / "file", LIMIT)


def test_an_error_of_the_system_is_not_a_missing_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> int:
        raise OSError(24, "Too many open files")

    with open_folder(folder) as store:
        monkeypatch.setattr(os, "open", fail)
        with pytest.raises(OSError, match="Too many"):
            store.read("file", LIMIT)


def test_no_descriptor_stays_open(folder: Path) -> None:
    before = set(os.listdir("/dev/fd"))
    for name in ("file", "link", "below", "large", "fifo"):
        with open_folder(folder) as store:
            try:
                store.read(name, LIMIT)
            except ValueError:
                continue
    assert set(os.listdir("/dev/fd")) == before


def test_a_file_that_became_shorter_is_read_to_its_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = os.read, []

    def read_little(descriptor: int, size: int) -> bytes:
        calls.append(size)
        return read(descriptor, min(size, 3))

    monkeypatch.setattr(os, "read", read_little)
    with open_folder(folder) as store:
        assert isinstance(store, Folder)
        assert store.read("file", LIMIT) == b"content"
    assert calls == [7, 4, 1]
