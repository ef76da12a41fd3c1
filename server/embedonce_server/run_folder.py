"""The folders that the workers of one ``embedonce serve`` share."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from embedonce.config import Config

from .tenants.rates import Rates

log = logging.getLogger("embedonce.serve")

_PREFIX = "embedonce-"
_LOCK = "lock"

MAX_PARENT = 104 - len("/embedonce-12345678/worker-1234.sock") - 1
"""Maximum length of the folder in which a temporary folder is made."""

_HINT = "set state_dir in [serve] to a folder that can be written to"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A temporary folder for this run, and a folder that outlives it."""

    path: Path
    """Exists as long as the server runs. Only its user may open it. The path is short, because the name of a Unix
    socket has at most 104 characters."""
    state: Path
    """Holds the tenants' budgets and rates."""

    @property
    def is_lasting(self) -> bool:
        """Whether :attr:`state` outlives the server."""
        return self.state.parent != self.path

    @property
    def metrics(self) -> Path:
        """The folder for the metrics of all workers."""
        return self.path / "metrics"

    @property
    def budgets(self) -> Path:
        return self.state / "budgets.db"

    @property
    def rates(self) -> Path:
        return self.state / "rates"

    def get_socket(self, worker: int) -> Path:
        """Return the path of the Unix socket on which the other workers reach a worker."""
        return self.path / f"worker-{worker}.sock"


class NoStateFolder(Exception):
    """The folder that outlives the server cannot be used. The message says why, and what to do."""


@contextmanager
def open_run_folder(config: Config) -> Iterator[tuple[RunFolder, list[int]]]:
    """Create the folders of one server, and remove the temporary one at the end.

    The second value has the descriptors of locks on the folders. Each worker inherits them, so that another server can
    use or remove a folder only after all of them have ended.

    A server without tenants and without ``state_dir`` needs no lasting folder. It uses one all the same if it can,
    because a reload may add tenants.

    Raises:
        NoStateFolder: the state folder cannot be written to, or another server uses it.
    """
    parent = Path(_find_short_folder() or tempfile.gettempdir())
    _remove_abandoned_folders(parent)
    path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        locks = [stack.enter_context(_lock_new_folder(path))]
        (path / "metrics").mkdir(mode=0o700)
        try:
            state = config.serve.state_dir or _choose_state_folder(config)
            locks.append(stack.enter_context(_lock(state)))
            _check_rates(state)
        except NoStateFolder as error:
            if config.serve.tenants or config.serve.state_dir is not None:
                raise
            del locks[1:]
            log.warning("%s. Until then, a reload cannot add tenants with tokens_per_day", error)
            state = path / "state"
            state.mkdir(mode=0o700)
        yield RunFolder(path, state), locks


@contextmanager
def _lock_new_folder(folder: Path) -> Iterator[int]:
    """Lock a temporary folder, so that other servers see that it is in use."""
    new = folder / "new-lock"
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # It gets its name only now, because others would remove the folder if they found the file without a lock.
        new.rename(folder / _LOCK)
        yield descriptor
    finally:
        os.close(descriptor)


def _remove_abandoned_folders(parent: Path) -> None:
    """Remove the temporary folders of this user's servers that were killed together with all their workers."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if folder.lstat().st_uid != os.getuid():
                continue
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def _check_rates(state: Path) -> None:
    """Check that the file of the rates can be used, so that one error says so before any worker starts.

    Raises:
        NoStateFolder: it cannot.
    """
    rates = RunFolder(state, state).rates
    try:
        Rates(rates).close()
    except OSError as error:
        message = f"cannot use {rates}: {error.strerror}; make it a file that can be written to, or {_HINT}"
        raise NoStateFolder(message) from error


def _find_short_folder() -> str | None:
    """Return a folder for temporary files in which the names of sockets are short enough; None for the usual one."""
    return None if len(tempfile.gettempdir()) <= MAX_PARENT else "/tmp"


def _choose_state_folder(config: Config) -> Path:
    """Return the folder for the state of servers with this configuration file.

    Raises:
        NoStateFolder: there is no home folder.
    """
    name = "default" if config.file is None else hashlib.sha256(bytes(config.file)).hexdigest()[:16]
    try:
        folder = platformdirs.user_state_path("embedonce", appauthor=False) / "serve" / name
    except Exception as error:
        raise NoStateFolder(f"the home folder is unknown; {_HINT}") from error
    if not folder.is_absolute():
        raise NoStateFolder(f"the home folder is unknown; {_HINT}")
    return folder


@contextmanager
def _lock(folder: Path) -> Iterator[int]:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise NoStateFolder(f"cannot create the folder {folder}: {error.strerror}; {_HINT}") from error
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NoStateFolder(f"cannot write to the folder {folder}: {error.strerror}; {_HINT}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise NoStateFolder(
                f"another embedonce serve, or a worker of one that is stopping, uses {folder} for the budgets of its "
                f"tenants; stop it, or set another state_dir in [serve]"
            ) from None
        yield descriptor
    finally:
        os.close(descriptor)
