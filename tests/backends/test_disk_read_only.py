"""The disk tier in folders that are read-only, shared or full."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from hashlib import sha256
from pathlib import Path

import diskcache
import pytest

import embedonce
from embedonce.errors import ConfigError
from embedonce.testing import CountingProvider
from embedonce.testing.contracts.support import run_in_fork
from embedonce_backends.disk import DiskBackend
from embedonce_backends.disk.errors import ReadOnlyFile
from embedonce_backends.disk.folder import find_permission_problem

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")

OTHER_USER = 12_345
TEXTS = [f"text {number}" for number in range(20)]


def make_items(start: int, count: int) -> dict[str, bytes]:
    numbers = range(start, start + count)
    return {f"eo1.0123456789abcdef.{number:064x}": sha256(b"%d" % number).digest() * 50 for number in numbers}


ITEMS = make_items(0, 100)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in which other users may look, unlike pytest's own folders."""
    above = Path(tempfile.mkdtemp())
    above.chmod(0o755)
    yield above / "cache"
    for path in [above, *above.rglob("*")]:
        path.chmod(0o700)
    shutil.rmtree(above)


def build(folder: Path, texts: list[str] = TEXTS) -> None:
    """Store items and texts, as a build job does, and make the folder readable by everybody and writable by nobody."""
    with closing(DiskBackend(path=folder)) as backend:
        backend.set_many(ITEMS, None)
    with embedonce.Cache(CountingProvider(), [DiskBackend(path=folder)]) as cache:
        cache.embed_batch(texts)
    make_read_only(folder)


def make_read_only(folder: Path) -> None:
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)


def run_as_other_user(work: Callable[[], None]) -> None:
    """Run ``work`` in a child process whose user may not write. Unless this process is root, its own user may not."""

    def child() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(OTHER_USER)
            os.setuid(OTHER_USER)
        work()

    run_in_fork(child, "another user's process")


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_bytes", [4 * 2**30, 2**30], ids=["same-limit", "other-limit"])
def test_a_read_only_folder_is_served_and_writes_fail(folder: Path, max_bytes: int) -> None:
    build(folder)

    def use() -> None:
        with closing(DiskBackend(path=folder, max_bytes=max_bytes)) as backend:
            for turn in range(3):
                assert backend.get_many(list(ITEMS)) == ITEMS
                assert backend.count("eo1.0123456789abcdef.") == len(list(backend.scan("eo1.0123456789abcdef."))) == 100
                with pytest.raises(ReadOnlyFile, match="stored entries are served"):
                    backend.set_many(make_items(1000 + turn, 1), None)
                with pytest.raises(ReadOnlyFile):
                    backend.add_many(make_items(1000 + turn, 1), 10.0)
                with pytest.raises(ReadOnlyFile):
                    backend.delete_many(list(ITEMS))

    run_as_other_user(use)
    assert {path.name for path in folder.iterdir()} == {"cache.db", "leases.db"}


def test_a_read_only_folder_of_an_earlier_version_is_served(folder: Path) -> None:
    """An earlier version stored the keys of entries as text, and had no table of leases."""
    with diskcache.Cache(str(folder)) as cache:
        for key, value in ITEMS.items():
            cache[key] = value
    make_read_only(folder)

    def use() -> None:
        with closing(DiskBackend(path=folder)) as backend:
            assert backend.get_many(list(ITEMS)) == ITEMS
            assert list(backend.scan("")) == sorted(ITEMS)
            assert backend.count("") == 100
            with pytest.raises(ReadOnlyFile):
                backend.add_many({"eo1.lease.x": b"token"}, 10.0)
            with pytest.raises(ReadOnlyFile):
                backend.compact()

    run_as_other_user(use)


def test_a_cache_with_a_read_only_tier_hits_and_reports_its_writes(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(folder)

    def use() -> None:
        with embedonce.Cache(CountingProvider(), [DiskBackend(path=folder)]) as cache:
            assert cache.fetch(TEXTS).sources == ["disk"] * len(TEXTS)
            with caplog.at_level(logging.WARNING):
                for number in range(100):
                    cache.embed(f"new {number}")
            tier = cache.stats().tiers["disk"]
            assert tier.hits == len(TEXTS)
            assert set(tier.causes) <= {"ReadOnlyFile", "skipped"}
            assert tier.causes["ReadOnlyFile"] > 0
            failing = [
                record for record in caplog.records if "writes are failing (ReadOnlyFile)" in record.getMessage()
            ]
            assert len(failing) == 1
            (check,) = cache.check()
            assert "read-only" in check.detail
            assert cache.fetch(TEXTS).sources == ["disk"] * len(TEXTS)

    run_as_other_user(use)


def test_a_read_only_file_in_a_writable_folder_is_served(folder: Path) -> None:
    build(folder)
    folder.chmod(0o755)

    def use() -> None:
        with closing(DiskBackend(path=folder)) as backend:
            assert backend.get_many(list(ITEMS)) == ITEMS
            with pytest.raises(ReadOnlyFile):
                backend.set_many(make_items(1000, 1), None)
            assert backend.get_many(list(ITEMS)) == ITEMS

    run_as_other_user(use)


def test_a_read_only_copy_with_its_log_is_served_only_with_the_content_of_the_log(folder: Path) -> None:
    """Without its log, the file would still contain an entry that has been removed."""
    source = folder.with_name("source")
    with closing(DiskBackend(path=source)) as backend:
        backend.set_many(ITEMS, None)
        backend.close()
    with closing(DiskBackend(path=source)) as backend, closing(sqlite3.connect(source / "cache.db")) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT COUNT(*) FROM Cache").fetchall()
        gone = next(iter(ITEMS))
        with embedonce.contracts.deadline(0.5), pytest.raises(embedonce.TierError):
            backend.delete_many([gone])
        shutil.copytree(source, folder)
    make_read_only(folder)

    def use(expected: str) -> None:
        with closing(DiskBackend(path=folder)) as backend:
            if expected == "served":
                assert gone not in backend.get_many(list(ITEMS))
                assert len(backend.get_many(list(ITEMS))) == 99
            else:
                with pytest.raises(ReadOnlyFile, match="its log has content"):
                    backend.get_many(list(ITEMS))

    run_as_other_user(lambda: use("served"))
    folder.chmod(0o755)
    (folder / "cache.db-shm").unlink()
    make_read_only(folder)
    run_as_other_user(lambda: use("refused"))


def test_an_empty_log_in_a_read_only_folder_does_no_harm(folder: Path) -> None:
    build(folder)
    folder.chmod(0o755)
    (folder / "cache.db-wal").touch()
    make_read_only(folder)

    def use() -> None:
        with closing(DiskBackend(path=folder)) as backend:
            assert backend.get_many(list(ITEMS)) == ITEMS

    run_as_other_user(use)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="root writes what another user only reads")
def test_a_reader_sees_what_another_user_changes_in_a_folder_that_it_may_not_write(folder: Path) -> None:
    build(folder)
    folder.chmod(0o755)
    (folder / "cache.db").chmod(0o644)
    turns = [os.pipe(), os.pipe()]

    def change() -> None:
        with closing(DiskBackend(path=folder)) as backend:
            os.read(turns[0][0], 1)
            backend.set_many(make_items(1000, 50), None)
            backend.delete_many(list(make_items(0, 50)))
            os.write(turns[1][1], b"1")
            os.read(turns[0][0], 1)

    def read() -> None:
        def work() -> None:
            with closing(DiskBackend(path=folder)) as backend:
                assert backend.get_many(list(ITEMS)) == ITEMS
                os.write(turns[0][1], b"1")
                os.read(turns[1][0], 1)
                for _ in range(2):
                    found = backend.get_many([*ITEMS, *make_items(1000, 50)])
                    assert found == {**make_items(50, 50), **make_items(1000, 50)}
                os.write(turns[0][1], b"1")

        run_as_other_user(work)

    run_in_fork(read, "the reader", meanwhile=_once(change))


def _once(work: Callable[[], None]) -> Callable[[], None]:
    done: list[bool] = []

    def call() -> None:
        if not done:
            done.append(True)
            work()

    return call


def test_a_folder_that_becomes_writable_is_written_again(folder: Path) -> None:
    build(folder)
    if os.geteuid() == 0:
        for path in (folder, *folder.iterdir()):
            os.chown(path, OTHER_USER, OTHER_USER)

    def use() -> None:
        with closing(DiskBackend(path=folder)) as backend:
            assert backend.get_many(list(ITEMS)) == ITEMS
            with pytest.raises(ReadOnlyFile):
                backend.set_many(make_items(1000, 1), None)
            folder.chmod(0o755)
            (folder / "cache.db").chmod(0o644)
            backend.set_many(make_items(1000, 1), None)
            assert backend.get_many([*ITEMS, *make_items(1000, 1)]) == {**ITEMS, **make_items(1000, 1)}

    run_as_other_user(use)


# --- mounts -----------------------------------------------------------------------------------


def run_in_mount(command: str, code: str, folder: Path) -> str:
    """Run Python code after a shell command that mounts something, in a namespace of its own; skip if impossible."""
    if shutil.which("unshare") is None:
        pytest.skip("requires the program unshare")
    works = subprocess.run(["unshare", "-rm", "sh", "-c", f"{command} && exit 7"], capture_output=True, check=False)
    if works.returncode != 7:
        pytest.skip("this system allows no mounts")
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{command} && exec "$0" -c "$1" "$2"', sys.executable, code, str(folder)],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0
    return done.stdout


MOUNTED = """
import sys
from embedonce import Cache
from embedonce.testing import CountingProvider
from embedonce_backends.disk import DiskBackend
with Cache(CountingProvider(), [DiskBackend(path=sys.argv[1])]) as cache:
    found = cache.fetch([f"text {number}" for number in range(20)] + ["new"])
    print(found.sources.count("disk"), *cache.stats().tiers["disk"].causes)
"""


def test_a_read_only_mount_is_served(tmp_path: Path) -> None:
    build(tmp_path / "cache")
    mount = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path}"
    assert run_in_mount(mount, MOUNTED, tmp_path / "cache") == "20 ReadOnlyFile\n"


def test_a_read_only_mount_without_a_cache_is_an_error_of_the_tier(tmp_path: Path) -> None:
    mount = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path}"
    for folder in (tmp_path, tmp_path / "missing"):
        assert run_in_mount(mount, MOUNTED, folder) == "0 ReadOnlyFile\n"


def test_a_read_only_mount_of_another_users_folder_is_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many(ITEMS, None)
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(tmp_path).st_uid + 1)
    monkeypatch.setattr("embedonce_backends.disk.folder.find_permission_problem", lambda *_: "belongs to another user")
    with pytest.raises(ConfigError, match="belongs to another user"):
        DiskBackend(path=tmp_path)
    statvfs = os.statvfs

    class ReadOnly:
        f_flag = statvfs(tmp_path).f_flag | os.ST_RDONLY

    monkeypatch.setattr(os, "statvfs", lambda _: ReadOnly)
    with closing(DiskBackend(path=tmp_path)) as backend:
        assert backend.get_many(list(ITEMS)) == ITEMS


FULL = """
import sys
from pathlib import Path
from embedonce_backends.disk import DiskBackend
folder = Path(sys.argv[1])
with open(folder / "other", "wb") as other:
    other.write(bytes(3 * 2**20))
backend = DiskBackend(path=folder / "cache")
items = {f"eo1.x.{n}": bytes(1600) for n in range(100)}
backend.set_many(items, None)
names = set()
for turn in range(60):
    try:
        backend.set_many({f"eo1.{turn}.{n}": bytes(1600) for n in range(100)}, None)
    except Exception as error:
        names.add(type(error).__name__)
assert backend.get_many(list(items)) == items
(folder / "other").unlink()
backend.set_many({f"eo1.y.{n}": bytes(1600) for n in range(100)}, None)
assert len(backend.get_many([f"eo1.y.{n}" for n in range(100)])) == 100
print(*names)
"""


def test_a_full_disk_is_named_and_used_again_once_it_has_space(tmp_path: Path) -> None:
    assert run_in_mount(f"mount -t tmpfs -o size=8m none {tmp_path}", FULL, tmp_path) == "DiskFull\n"


def test_a_process_without_file_descriptors_is_told_so_and_goes_on_when_it_has_some(tmp_path: Path) -> None:
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many(ITEMS, None)

    def use() -> None:
        import resource

        with closing(DiskBackend(path=tmp_path)) as backend:
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            for spare in (0, 1, 2):
                taken = []
                with suppress(OSError):
                    while True:
                        taken.append(os.open(os.devnull, os.O_RDONLY))
                for _ in range(spare):
                    os.close(taken.pop())
                with pytest.raises(OSError, match=r"no file descriptors left|Too many open files") as caught:
                    backend.get_many(list(ITEMS))
                assert caught.value.errno == errno.EMFILE
                for descriptor in taken:
                    os.close(descriptor)
            backend.set_many(make_items(1000, 1), None)
            assert backend.get_many(list(ITEMS)) == ITEMS

    run_in_fork(use, "a process without file descriptors")


# --- folders of several users -----------------------------------------------------------------


def test_a_volume_that_every_user_may_write_is_refused_with_the_line_to_write(tmp_path: Path) -> None:
    problem = find_permission_problem(Path("/var/cache"), 0, 0o777, 1000)
    assert problem == (
        'is writable by every user; give the disk tier a folder inside it: path = "/var/cache/embedonce"'
    )
    problem = find_permission_problem(Path("/var/cache"), 1000, 0o777, 1000)
    assert problem is not None
    assert "chmod o-w" in problem, "the owner can also change the mode"
    assert 'path = "/var/cache/embedonce"' in problem


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o2777], ids=oct)
def test_the_folder_that_the_message_names_works(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)

    def use() -> None:
        with pytest.raises(ConfigError, match="is writable by every user") as caught:
            DiskBackend(path=folder)
        inside = str(caught.value).split('path = "')[1].split('"')[0]
        with closing(DiskBackend(path=Path(inside))) as backend:
            backend.set_many(ITEMS, None)
            assert backend.get_many(list(ITEMS)) == ITEMS
        assert stat.S_IMODE(os.stat(inside).st_mode) == 0o700

    run_as_other_user(use)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="only root can make folders for a group")
def test_users_of_a_group_share_a_folder_that_root_has_made_for_the_group(folder: Path) -> None:
    folder.mkdir()
    os.chown(folder, 0, OTHER_USER)
    folder.chmod(0o2770)

    def use(user: int, stored: int) -> None:
        os.setgroups([OTHER_USER])
        os.setgid(user)
        os.setuid(user)
        os.umask(0o077)
        with closing(DiskBackend(path=folder)) as backend:
            assert backend.get_many(list(ITEMS)) == make_items(0, stored)
            backend.set_many(make_items(stored, 10), None)

    run_in_fork(lambda: use(OTHER_USER + 1, 0), "the first user of the group")
    run_in_fork(lambda: use(OTHER_USER + 2, 10), "the second user of the group")
    assert stat.S_IMODE((folder / "cache.db").stat().st_mode) == 0o660
