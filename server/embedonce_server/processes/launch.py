"""What a supervisor tells a worker when it starts, and the messages between them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from embedonce import config as configuration
from embedonce.config import Config
from embedonce.errors import ConfigError, EmbedonceError, Problem
from embedonce_server.run_folder import RunFolder

MAX_MESSAGE = 64 * 1024 * 1024
"""Maximum number of bytes of a message. The largest has the text of a configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A configuration as it was read, so that all workers use the same one, even if the file changes meanwhile."""

    text: str | None = None
    file: str | None = None
    is_found: bool = False
    data: Mapping[str, Any] | None = None
    """The default configuration, which has no file."""

    @classmethod
    def of(cls, config: Config) -> Source:
        document = config.document
        if config.file is None:
            return cls(data=document.data)
        return cls(text=document.text, file=str(config.file), is_found=document.is_found)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load(self) -> Config:
        """Return the configuration.

        Raises:
            ConfigError: it is invalid in this process, for example because a plugin was removed.
        """
        if self.text is None or self.file is None:
            return configuration.load(self.data)
        return configuration.load_text(self.text, self.file, is_found=self.is_found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How one ``embedonce serve`` runs. The supervisor sends it to each worker."""

    source: Source
    """The configuration with which the server started. Tiers, keys and the place of listening are always from it."""
    latest: Source | None = None
    """The configuration of the last reload. ``[serve]`` is from it."""
    worker: int = 1
    workers: int = 1
    host: str | None = None
    """The host of the command line, which replaces that of ``[serve]``."""
    port: int | None = None
    run: str
    """The temporary folder of the server."""
    state: str
    """The folder that outlives the server."""
    supervisor: int = 0
    """Process id of the supervisor; 0 without one."""
    listeners: Sequence[int] = ()
    """Descriptors of the listening sockets that a worker inherits."""
    locks: Sequence[int] = ()
    """Descriptors of files that stay locked as long as a worker runs."""
    has_access_log: bool = False

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.run), Path(self.state))

    def apply_options(self, config: Config) -> Config:
        """Return a configuration with the host and the port of the command line, if it has them."""
        host = config.serve.host if self.host is None else self.host
        port = config.serve.port if self.port is None else self.port
        return replace(config, serve=replace(config.serve, host=host, port=port))

    def encode(self) -> bytes:
        return encode_message(asdict(self))

    @classmethod
    def decode(cls, line: bytes) -> Launch:
        values = json.loads(line)
        latest = values.pop("latest")
        return cls(
            **{**values, "source": Source(**values["source"])}, latest=None if latest is None else Source(**latest)
        )


def encode_message(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def encode_problems(error: EmbedonceError) -> list[dict[str, Any]]:
    if isinstance(error, ConfigError):
        return [asdict(problem) for problem in error.problems]
    return [asdict(Problem(f"{type(error).__name__}: {error}"))]


def decode_problems(problems: list[dict[str, Any]]) -> ConfigError:
    return ConfigError([Problem(**problem) for problem in problems])
