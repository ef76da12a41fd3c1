"""The folders that the workers of one ``embedonce serve`` share."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from embedonce.config import Config

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
def open_run_folder(config: Config) -> Iterator[tuple[RunFolder, int | None]]:
    """Create the folders of one server, and remove the temporary one at the end.

    The second value is the descriptor of a lock on the state folder, or None without tenants. Each worker inherits it,
    so that another server can use the folder only after all of them have ended.

    Raises:
        NoStateFolder: the state folder cannot be written to, or another server uses it.
    """
    path = Path(tempfile.mkdtemp(prefix="embedonce-", dir=_find_short_folder()))
    try:
        (path / "metrics").mkdir(mode=0o700)
        if not config.serve.tenants and config.serve.state_dir is None:
            # Only tenants have budgets and rates.
            state = path / "state"
            state.mkdir(mode=0o700)
            yield RunFolder(path, state), None
        else:
            state = config.serve.state_dir or _choose_state_folder(config)
            with _lock(state) as descriptor:
                yield RunFolder(path, state), descriptor
    finally:
        shutil.rmtree(path, ignore_errors=True)


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
